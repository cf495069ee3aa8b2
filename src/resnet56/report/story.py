"""Interpretation of the metrics of a run, as pure functions from numbers to sentences.

A sentence states only what its numbers support, and says so if they are inconclusive.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from resnet56.recipe import Recipe
from resnet56.report.words import count, listed, loss, percent, plural, points, quoted
from resnet56.runs.schema import ClassMetrics

LARGE_GAP = 0.02  # a gap outside the interval is large from this value on
MEMORIZED = 0.99  # training accuracy above which the training images count as memorized
STILL_FALLING = 0.05  # relative drop of the loss over the last epochs that counts as a trend
TAIL = 10  # the trend compares the last tenth of the epochs with the tenth before it

Interval = tuple[float, float]


def result(test: Mapping[str, Any]) -> str:
    """The test accuracy and its confidence interval."""
    low, high = test["accuracy_interval"]
    right = sum(row[i] for i, row in enumerate(test["confusion_matrix"]))
    return (
        f"The network classifies {count(right)} of {count(test['n'])} test images correctly: "
        f"{percent(test['accuracy'])} test accuracy. The 95 % confidence interval for this number "
        f"of images is {percent(low)} to {percent(high)}, {points(high - low)} wide."
    )


def against_chance(accuracy_interval: Interval, classes: int) -> list[str]:
    """A warning if the result could be guessing among equally frequent classes."""
    low, high = accuracy_interval
    chance = 1 / classes
    if low > chance:
        return []
    relation = "includes" if high >= chance else "lies below"
    return [
        f"The interval {relation} {percent(chance)}, the accuracy of guessing among {classes} "
        "equally frequent classes, so there is no evidence that the network has learned the task."
    ]


def gap(train: float, test: float, test_interval: Interval, *, augmented: bool) -> list[str]:
    """Compare training accuracy (without augmentation) with test accuracy."""
    difference = train - test
    low, high = test_interval
    numbers = f"training accuracy is {percent(train)} and test accuracy {percent(test)}"
    if difference < 0:
        return [
            f"No sign of overfitting: {numbers}, {points(-difference)} higher on images that the "
            "network has not seen."
        ]
    if low <= train <= high:
        return [
            f"No significant overfitting: {numbers}. The gap of {points(difference)} lies within "
            "the confidence interval of the test accuracy."
        ]
    helped = "Augmentation did not prevent it" if augmented else "The training used no augmentation"
    if difference < LARGE_GAP:
        return [f"Little overfitting: {numbers}, a gap of {points(difference)}."]
    if train >= MEMORIZED:
        return [
            f"Overfitting: {numbers}. The network has almost memorized its training images, and "
            f"{points(difference)} of this accuracy do not generalize to new images. {helped}."
        ]
    return [
        f"Some overfitting: {numbers}, a gap of {points(difference)}. {helped}. With a training "
        f"accuracy of {percent(train)}, the network has not memorized its training images."
    ]


def trend(rows: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[str]:
    """Whether the loss was still falling in the last epochs."""
    if len(rows) < 2:
        return ["One epoch is not enough for a trend."] if rows else []
    if rows[-1]["epoch"] < recipe.epochs:
        first, last = rows[0], rows[-1]
        return [
            f"So far, the training loss has changed from {loss(first['train_loss'])} in epoch "
            f"{first['epoch']} to {loss(last['train_loss'])} in epoch {last['epoch']}."
        ]
    tail = max(1, len(rows) // TAIL)
    late = [row["train_loss"] for row in rows[-tail:]]
    before = [row["train_loss"] for row in rows[-2 * tail : -tail]]
    now, then = sum(late) / len(late), sum(before) / len(before)
    span = "in the last epoch" if tail == 1 else f"over the last {tail} epochs"
    numbers = f"from {loss(then)} to {loss(now)} {span}"
    falls_to_zero = recipe.schedule != "step"
    sentences = []
    if then > 0 and (then - now) / then > STILL_FALLING:
        cause = (
            ". Part of this is due to the learning rate, which falls to zero, so only a longer "
            "run can show whether more epochs help"
            if falls_to_zero
            else ". More epochs may help"
        )
        sentences.append(f"The training loss was still falling at the end, {numbers}{cause}.")
    elif then > 0 and (now - then) / then > STILL_FALLING:
        sentences.append(f"The training loss was rising at the end, {numbers}.")
    else:
        sentences.append(f"The training loss had leveled off, {numbers}.")
    return sentences + best_epoch(rows)


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The epoch with the highest validation accuracy, if there are validation images."""
    validated = [row for row in rows if "val_accuracy" in row]
    if not validated:
        return []
    best = max(validated, key=lambda row: float(row["val_accuracy"]))
    last = validated[-1]
    if best["val_accuracy"] <= last["val_accuracy"]:
        return [
            "Validation accuracy was highest at the end: "
            f"{percent(last['val_accuracy'])} after epoch {last['epoch']}."
        ]
    return [
        f"Validation accuracy was highest after epoch {best['epoch']} "
        f"({percent(best['val_accuracy'])}) and was {percent(last['val_accuracy'])} after "
        "the last epoch."
    ]


def best_and_worst(per_class: Mapping[str, ClassMetrics]) -> list[str]:
    """The classes with the highest and the lowest F1, among those that have images."""
    scored = {
        name: row["f1"]
        for name, row in per_class.items()
        if row["support"] > 0 and row["f1"] is not None
    }
    if len(scored) < 2:
        return []
    high, low = max(scored.values()), min(scored.values())
    if high == low:
        return [f"All {len(scored)} classes have the same F1 score, {high:.4f}."]
    best, worst = (_names(scored, value) for value in (high, low))
    return [
        f"{best} {_verb(scored, high)} the highest F1 score ({high:.4f}) and {worst} the lowest "
        f"({low:.4f})."
    ]


def _names(scored: Mapping[str, float], value: float, most: int = 3) -> str:
    names = [quoted(name) for name, score in scored.items() if score == value]
    return listed(names) if len(names) <= most else f"{len(names)} classes"


def _verb(scored: Mapping[str, float], value: float) -> str:
    return "has" if sum(score == value for score in scored.values()) == 1 else "have"


def confusions(most_confused: Sequence[Mapping[str, Any]]) -> list[str]:
    """The pair of classes that is confused most often, and its reverse if that is listed."""
    if not most_confused:
        return ["All test images are classified correctly, so no classes are confused."]
    first = most_confused[0]
    true, predicted = quoted(first["true"]), quoted(first["predicted"])
    sentence = (
        f"The most frequent error is to classify {true} as {predicted}: "
        f"{plural(first['count'], 'image')}, {percent(first['fraction'])} of that class"
    )
    for pair in most_confused[1:]:
        if (pair["true"], pair["predicted"]) == (first["predicted"], first["true"]):
            return [f"{sentence}. The reverse error occurs for {plural(pair['count'], 'image')}."]
    return [sentence + "."]


def mean_confidence(bins: Sequence[Mapping[str, Any]]) -> float:
    """The mean confidence of all predictions, from the calibration bins."""
    filled = [item for item in bins if item["count"]]
    total = sum(item["count"] for item in filled)
    return float(sum(item["count"] * item["confidence"] for item in filled) / total)


def confidence(calibration: Mapping[str, Any], accuracy: float, interval: Interval) -> list[str]:
    """Whether the network is overconfident, underconfident, or neither within the interval."""
    mean = mean_confidence(calibration["bins"])
    low, high = interval
    numbers = f"mean confidence is {percent(mean)} and accuracy {percent(accuracy)}"
    error = f"the expected calibration error is {calibration['ece']:.4f}"
    if low <= mean <= high:
        return [
            "The network is neither overconfident nor underconfident within the interval: "
            f"{numbers}, and {error}."
        ]
    word = "over" if mean > accuracy else "under"
    return [
        f"The network is {word}confident by {points(abs(mean - accuracy))}: {numbers}, and {error}."
    ]


def robustness(metrics: Mapping[str, Any] | None) -> list[str]:
    """Accuracy on corrupted images, and which corruption lowers it most."""
    if not metrics or not metrics.get("corruptions"):
        return []
    means = {name: sum(v) / len(v) for name, v in metrics["corruptions"].items() if v}
    worst = min(means, key=lambda name: means[name])
    mildest = max(means, key=lambda name: means[name])
    sentence = (
        f"On corrupted images, accuracy is {percent(metrics['mean_accuracy'])} on average, "
        f"{points(metrics['clean_accuracy'] - metrics['mean_accuracy'])} lower than on the clean "
        "images"
    )
    if len(means) < 2:
        return [f"{sentence}."]
    return [
        f"{sentence}. It is lowest for {quoted(spaced(worst))} (mean {percent(means[worst])}) and "
        f"highest for {quoted(spaced(mildest))} ({percent(means[mildest])})."
    ]


def spaced(name: str) -> str:
    """'motion_blur' -> 'motion blur'."""
    return name.replace("_", " ")


def hardware(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results of comparing devices and precisions, if measured."""
    return [str(comparison["verdict"]) for comparison in comparisons]


def unfinished(epochs_done: int, epochs: int, *, tested: bool) -> list[str]:
    """What is missing from the run, if anything."""
    if epochs_done < epochs:
        done = f"{epochs_done} of {plural(epochs, 'epoch')}"
        if tested:
            return [f"This run is not finished. It was tested after {done}."]
        return [f"This run has completed {done} and has not been tested."]
    return [] if tested else ["This run is finished, but has not been tested yet."]
