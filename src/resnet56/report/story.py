"""Pure functions that write sentences about the metrics of a run.

The sentences state only what the numbers support, and say when the numbers are inconclusive.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from resnet56.recipe import Recipe
from resnet56.report.recipe_words import disabled_in_tail
from resnet56.report.words import count, listed, loss, percent, plural, points, quoted
from resnet56.runs.schema import ClassMetrics

LARGE_GAP = 0.02  # minimum generalization gap that counts as large
FITTED = 0.99  # minimum training accuracy of a network that fits almost all training images
STILL_FALLING = 0.05  # minimum relative change of the loss that counts as a trend
TAIL = 10  # The trend compares the last tenth of the epochs with the previous tenth.
FEW_MISTAKES = 30  # With fewer mistakes, an improvement is hard to measure.
# Test accuracy on CIFAR-10 in He et al. 2015 (arXiv:1512.03385), table 6.
PUBLISHED = {"resnet56": 0.9303}

Interval = tuple[float, float]


def result(test: Mapping[str, Any]) -> str:
    """State the test accuracy and its confidence interval."""
    low, high = test["accuracy_interval"]
    correct = test["n"] - mistakes(test)
    return (
        f"The network reaches {percent(test['accuracy'])} test accuracy: it classifies "
        f"{count(correct)} of {plural(test['n'], 'test image')} correctly. The 95 % confidence "
        f"interval is {percent(low)} to {percent(high)}."
    )


def mistakes(test: Mapping[str, Any]) -> int:
    """Return the number of misclassified test images."""
    return int(test["n"] - sum(row[i] for i, row in enumerate(test["confusion_matrix"])))


def most_frequent(test: Mapping[str, Any]) -> float:
    """Return the accuracy of always predicting the most frequent class."""
    return float(max(sum(row) for row in test["confusion_matrix"]) / test["n"])


def against_chance(test: Mapping[str, Any]) -> list[str]:
    """Warn if always predicting the most frequent class could be as accurate as the network."""
    low, high = test["accuracy_interval"]
    chance = most_frequent(test)
    if low > chance:
        return []
    baseline = f"{percent(chance)}, the accuracy of always predicting the most frequent class"
    if high >= chance:
        return [
            f"The interval includes {baseline}, so there is no evidence that the network has "
            "learned the task."
        ]
    return [f"The interval lies below {baseline}."]


class Gap(NamedTuple):
    """A comparison of training accuracy and test accuracy."""

    difference: float  # training accuracy minus test accuracy
    verdict: str  # such as "The network overfits"
    details: str  # the accuracies, and further sentences


def gap(train: float, test: float, test_interval: Interval, *, augmented: bool | None) -> Gap:
    """Compare training accuracy (without augmentation) with test accuracy.

    Args:
        train: training accuracy.
        test: test accuracy.
        test_interval: confidence interval of the test accuracy.
        augmented: whether the training images were augmented, or None if this is not recorded.
    """
    difference = train - test
    low, high = test_interval
    numbers = f"training accuracy is {percent(train)} and test accuracy is {percent(test)}"
    if difference < 0:
        return Gap(
            difference,
            "There is no sign of overfitting",
            f"{numbers}, which is {points(-difference)} higher.",
        )
    if low <= train <= high:
        return Gap(
            difference,
            "There is no significant overfitting",
            f"{numbers}. The training accuracy lies within the confidence interval of the test "
            "accuracy.",
        )
    numbers += f", a gap of {points(difference)}."
    if difference < LARGE_GAP:
        return Gap(difference, "There is little overfitting", numbers)
    fit = (
        "It fits almost all training images."
        if train >= FITTED
        else "It does not fit all training images."
    )
    if augmented is None:
        return Gap(difference, "The network probably overfits", f"{numbers} {fit}")
    used = "with augmentation" if augmented else "without augmentation"
    return Gap(difference, "The network overfits", f"{numbers} {fit} It was trained {used}.")


def trend(rows: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[str]:
    """State whether the loss was still falling in the last epochs."""
    if len(rows) < 2:
        return ["One epoch is not enough to show a trend."] if rows else []
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
    numbers = (
        f"it was {loss(now)} in the last epoch and {loss(then)} in the previous epoch"
        if tail == 1
        else f"its mean was {loss(now)} over the last {tail} epochs and {loss(then)} over the "
        f"previous {tail} epochs"
    )
    if then - now > STILL_FALLING * then:
        sentence = f"The training loss was still falling at the end: {numbers}. "
        sentence += _why_falling(recipe, 2 * tail)
    elif now - then > STILL_FALLING * then:
        sentence = f"The training loss was rising at the end: {numbers}."
    else:
        sentence = f"The training loss had leveled off: {numbers}."
    return [sentence, *best_epoch(rows)]


def _why_falling(recipe: Recipe, window: int) -> str:
    """Explain why a loss may still be falling in the last `window` epochs."""
    causes = []
    if recipe.schedule != "step" and recipe.warmup_epochs < recipe.epochs:
        causes.append("the learning rate falls to zero")
    if recipe.plain_tail < window and disabled_in_tail(recipe):
        causes.append("the augmentation is weaker in the last epochs")
    if not causes:
        return "More epochs may help."
    return (
        f"This is expected because {listed(causes)}, so it does not show that more epochs would "
        "help."
    )


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """State the epoch with the highest validation accuracy, if there are validation images."""
    validated = [row for row in rows if "val_accuracy" in row]
    if not validated:
        return []
    best = max(validated, key=lambda row: float(row["val_accuracy"]))
    last = validated[-1]
    if best["val_accuracy"] <= last["val_accuracy"]:
        return [
            f"Validation accuracy was highest at the end, {percent(last['val_accuracy'])} after "
            f"epoch {last['epoch']}."
        ]
    return [
        f"Validation accuracy was highest after epoch {best['epoch']} "
        f"({percent(best['val_accuracy'])}). It was {percent(last['val_accuracy'])} after epoch "
        f"{last['epoch']}."
    ]


def best_and_worst(per_class: Mapping[str, ClassMetrics]) -> list[str]:
    """State the classes with the highest and lowest F1 score, among classes with images."""
    scored = scores(per_class, "f1")
    if len(scored) < 2:
        return []
    high, low = max(scored.values()), min(scored.values())
    if high == low:
        return [f"All {len(scored)} classes have the same F1 score, {high:.4f}."]
    best, worst = (
        f"{_names(scored, value)} {_verb(scored, value)} the {word} ({value:.4f})"
        for value, word in ((high, "highest F1 score"), (low, "lowest"))
    )
    return [f"{best}, and {worst}."]


def scores(per_class: Mapping[str, ClassMetrics], key: str) -> dict[str, float]:
    """Return one metric for each class that has images."""
    rows: Mapping[str, Mapping[str, Any]] = per_class
    return {
        name: row[key] for name, row in rows.items() if row["support"] > 0 and row[key] is not None
    }


def _names(scored: Mapping[str, float], value: float, most: int = 3) -> str:
    names = [quoted(name) for name, score in scored.items() if score == value]
    return listed(names) if len(names) <= most else f"{len(names)} classes"


def _verb(scored: Mapping[str, float], value: float) -> str:
    return "has" if sum(score == value for score in scored.values()) == 1 else "have"


def confusions(most_confused: Sequence[Mapping[str, Any]]) -> list[str]:
    """State the most frequent error, and the reverse error if it is listed."""
    if not most_confused:
        return ["All test images are classified correctly."]
    first = most_confused[0]
    sentences = [
        f"{_most_frequent_error(most_confused)}: {plural(first['count'], 'image')}, "
        f"{percent(first['fraction'])} of the class.",
        *reverse_error(most_confused),
    ]
    return [" ".join(sentences)]


def reverse_error(most_confused: Sequence[Mapping[str, Any]]) -> list[str]:
    """If the reverse of the most frequent error is listed, state how often the reverse occurs."""
    first = most_confused[0]
    return [
        f"The reverse error affects {plural(pair['count'], 'image')}."
        for pair in most_confused[1:]
        if (pair["true"], pair["predicted"]) == (first["predicted"], first["true"])
    ]


def is_tied(most_confused: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether another error is as frequent as the first."""
    most = most_confused[0]["count"]
    return any(pair["count"] == most for pair in most_confused[1:])


def _most_frequent_error(most_confused: Sequence[Mapping[str, Any]]) -> str:
    first = most_confused[0]
    tied = is_tied(most_confused)
    subject = "One of the most frequent errors" if tied else "The most frequent error"
    return f"{subject} is {quoted(first['true'])} classified as {quoted(first['predicted'])}"


def mean_confidence(bins: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean confidence of all predictions, computed from the calibration bins."""
    filled = [item for item in bins if item["count"]]
    total = sum(item["count"] for item in filled)
    return float(sum(item["count"] * item["confidence"] for item in filled) / total)


def confidence(calibration: Mapping[str, Any], accuracy: float, interval: Interval) -> list[str]:
    """State whether the network is overconfident, underconfident, or neither."""
    mean = mean_confidence(calibration["bins"])
    low, high = interval
    error = f"The expected calibration error is {calibration['ece']:.4f}."
    if low <= mean <= high:
        return [
            f"On average, the network is neither overconfident nor underconfident: its mean "
            f"confidence of {percent(mean)} lies within the confidence interval of the accuracy. "
            f"{error}"
        ]
    word, side = ("over", "above") if mean > accuracy else ("under", "below")
    return [
        f"The network is {word}confident: its mean confidence is {percent(mean)}, "
        f"{points(abs(mean - accuracy))} {side} its accuracy. {error}"
    ]


def robustness(metrics: Mapping[str, Any] | None) -> list[str]:
    """State the accuracy on corrupted images, and its lowest and highest values."""
    if not metrics or not metrics.get("corruptions"):
        return []
    means = {name: sum(v) / len(v) for name, v in metrics["corruptions"].items() if v}
    worst = min(means, key=lambda name: means[name])
    mildest = max(means, key=lambda name: means[name])
    lower = metrics["clean_accuracy"] - metrics["mean_accuracy"]
    sentence = (
        f"On corrupted images, the mean accuracy is {percent(metrics['mean_accuracy'])}, "
        f"{points(abs(lower))} {'lower' if lower >= 0 else 'higher'} than on the same images "
        "without corruption."
    )
    if means[worst] == means[mildest]:
        return [sentence]
    return [
        f"{sentence} Accuracy is lowest for {spaced(worst)} ({percent(means[worst])}) and highest "
        f"for {spaced(mildest)} ({percent(means[mildest])})."
    ]


def spaced(name: str) -> str:
    """Format the name of a corruption: 'gaussian_noise' -> 'Gaussian noise', 'jpeg' -> 'JPEG'."""
    return name.replace("_", " ").replace("gaussian", "Gaussian").replace("jpeg", "JPEG")


def hardware(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the results of the comparisons of devices and precisions."""
    return [str(comparison["verdict"]) for comparison in comparisons]


def unrecorded(name: str, file: str | None, *, stored: bool) -> str:
    """State what is unknown about a network without a recipe.

    Args:
        name: name of the network.
        file: name of the imported file, if it is recorded.
        stored: whether the network is a run.
    """
    origin = f" from {file}" if file else ""
    imported = f"The weights were imported{origin}, so the run has no recipe and no training curves"
    exported = f"{name} contains no recipe and no training curves"
    return (
        f"{imported if stored else exported}. It is unknown whether the network was trained on the "
        "training images of this data set."
    )


def unevaluated(path: str) -> str:
    """State that an imported network has not been evaluated, and how to evaluate it."""
    return (
        "This network has not been evaluated. To evaluate it: resnet56 evaluate "
        f"{shlex.quote(path)} --data DIR"
    )


def unfinished(epochs_done: int, epochs: int, *, tested: bool) -> list[str]:
    """State what is missing from the run, if anything."""
    if epochs_done < epochs:
        done = f"{epochs_done} of {plural(epochs, 'epoch')}"
        if tested:
            return [f"This run is not finished. It was tested after {done}."]
        return [f"This run has completed {done} and has not been tested."]
    return [] if tested else ["This run is finished, but it has not been tested."]


def meeting(
    network: str,
    test: Mapping[str, Any],
    train: Mapping[str, Any] | None,
    *,
    published: float | None,
    augmented: bool | None,
    finished: bool,
) -> list[str]:
    """Summarize the run in five sentences: accuracy, baseline, mistakes, gap and next step.

    Args:
        network: name of the network, such as ResNet-56.
        test: metrics on the test images.
        train: metrics on the training images without augmentation, if they were evaluated.
        published: test accuracy in He et al. 2015 for the same network and data, if available.
        augmented: whether the training images were augmented, or None if the training is not
            recorded.
        finished: whether all epochs of the recipe are finished.
    """
    low, high = test["accuracy_interval"]
    return [
        f"{network} reaches {percent(test['accuracy'])} test accuracy on "
        f"{plural(test['n'], 'image')} (95 % confidence interval: {percent(low)} to "
        f"{percent(high)}).",
        _baseline(test, published),
        _weakness(test),
        _gap_in_brief(test, train, augmented=augmented),
        _next_step(test, train, augmented=augmented, finished=finished),
    ]


def _baseline(test: Mapping[str, Any], published: float | None) -> str:
    low, high = test["accuracy_interval"]
    baseline = (
        f"always predicting the most frequent class would reach {percent(most_frequent(test))}"
    )
    if published is None:
        return f"For comparison, {baseline}."
    side = "below" if published < low else "above" if published > high else "within"
    return (
        f"For comparison, He et al. (2015) report {percent(published)} for the same network "
        f"({side} this interval), and {baseline}."
    )


def _weakness(test: Mapping[str, Any]) -> str:
    if not test["most_confused"]:
        return (
            "The network classifies all test images correctly, so they do not reveal its "
            "weaknesses."
        )
    recalls = scores(test["per_class"], "recall")
    low = min(recalls.values())
    error = _most_frequent_error(test["most_confused"])
    images = plural(test["most_confused"][0]["count"], "image")
    return (
        f"{error} ({images}), and {_names(recalls, low)} {_verb(recalls, low)} the lowest recall "
        f"({percent(low)})."
    )


def _gap_in_brief(
    test: Mapping[str, Any], train: Mapping[str, Any] | None, *, augmented: bool | None
) -> str:
    if train is None:
        return "Training accuracy was not measured, so it is unknown whether the network overfits."
    accuracy, difference = percent(train["accuracy"]), train["accuracy"] - test["accuracy"]
    if train["accuracy"] <= test["accuracy_interval"][1]:
        return f"Training accuracy is {accuracy}, so there is no significant overfitting."
    numbers = f"Training accuracy is {accuracy}, {points(difference)} above test accuracy"
    if difference < LARGE_GAP:
        return f"{numbers}, so there is little overfitting."
    overfits = "overfits" if augmented is not None else "probably overfits"
    if train["accuracy"] >= FITTED:
        return (
            f"{numbers}, so the network {overfits}: it fits almost all training images, but it is "
            "less accurate on new images."
        )
    return f"{numbers}, so the network {overfits}, although it does not fit all training images."


def _next_step(
    test: Mapping[str, Any],
    train: Mapping[str, Any] | None,
    *,
    augmented: bool | None,
    finished: bool,
) -> str:
    if not finished:
        return "Next, finish the training run, because these numbers are from an early checkpoint."
    if against_chance(test):
        if augmented is None:
            return (
                "Next, check that the architecture, the class order and the normalization match "
                "those used in training."
            )
        return "Next, check the labels, the learning rate, and the training loss."
    wrong = mistakes(test)
    if wrong < FEW_MISTAKES:
        return (
            f"Next, test on more images: with {plural(wrong, 'mistake')}, an improvement is "
            "hard to measure."
        )
    if augmented is None:
        return "Next, compare the network with others on the same images (resnet56 compare)."
    seeds = "repeat the run with other seeds to measure how much the accuracy varies"
    if train is None:
        return f"Next, {seeds}."
    difference = train["accuracy"] - test["accuracy"]
    if difference >= LARGE_GAP and train["accuracy"] > test["accuracy_interval"][1]:
        remedy = "stronger augmentation" if augmented else "augmentation"
        return f"Next, try {remedy} or more training images, and {seeds}."
    if train["accuracy"] < FITTED:
        return f"Next, try more epochs or a larger network, and {seeds}."
    return f"Next, {seeds}."
