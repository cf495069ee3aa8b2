"""What a run's numbers say, as sentences: pure functions from numbers to plain text.

Every sentence holds for the numbers it was given and for no more; where the numbers decide
nothing, that is what it says. The thresholds are named here, so that they can be argued with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from resnet56.recipe import Recipe
from resnet56.report.words import count, listed, loss, percent, plural, points, quoted

LARGE_GAP = 0.02  # share; from here on a gap that exceeds the interval is called large
MEMORISED = 0.99  # training accuracy from which there is next to nothing left to learn
STILL_FALLING = 0.05  # relative drop of the loss over the last epochs that counts as a trend
TAIL = 10  # the trend looks at the last tenth of the epochs, and at the tenth before

Interval = tuple[float, float]


def result(test: Mapping[str, Any]) -> str:
    """The test accuracy and how sure it is."""
    low, high = test["accuracy_interval"]
    right = sum(row[i] for i, row in enumerate(test["confusion_matrix"]))
    return (
        f"{count(right)} of {count(test['n'])} test images are classified correctly: "
        f"{percent(test['accuracy'])}. With this many images the 95 % interval reaches from "
        f"{percent(low)} to {percent(high)}, {points(high - low)} wide."
    )


def against_chance(accuracy_interval: Interval, classes: int) -> list[str]:
    """A warning if the result could be guessing among equally frequent classes."""
    low, high = accuracy_interval
    chance = 1 / classes
    if low > chance:
        return []
    relation = "includes" if high >= chance else "lies below"
    return [
        f"The interval {relation} {percent(chance)}, what guessing among {classes} equally "
        "frequent classes would give: this network shows no sign of having learnt the task."
    ]


def gap(train: float, test: float, test_interval: Interval, *, augmented: bool) -> list[str]:
    """Training accuracy (without augmentation) against test accuracy: over-fitting or not."""
    difference = train - test
    low, high = test_interval
    numbers = f"training accuracy is {percent(train)} and test accuracy {percent(test)}"
    if difference < 0:
        return [
            f"No sign of over-fitting: {numbers}, {points(-difference)} higher on images the "
            "network has never seen."
        ]
    if low <= train <= high:
        return [
            f"No over-fitting that could be told from chance: {numbers}, and the gap of "
            f"{points(difference)} is smaller than the test accuracy's interval allows to resolve."
        ]
    helped = "augmentation did not prevent it" if augmented else "it trained without augmentation"
    if difference < LARGE_GAP:
        return [f"Hardly any over-fitting: {numbers}, a gap of {points(difference)}."]
    if train >= MEMORISED:
        return [
            f"Over-fitting: {numbers}. The network has all but memorised its training images, and "
            f"{points(difference)} of that do not carry over to new ones; {helped}."
        ]
    return [
        f"Some over-fitting: {numbers}, a gap of {points(difference)}; {helped}. With training "
        f"accuracy at {percent(train)} the network has not memorised its images either."
    ]


def trend(rows: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[str]:
    """Whether the last epochs were still an improvement."""
    if len(rows) < 2:
        return ["One epoch makes no trend."] if rows else []
    if rows[-1]["epoch"] < recipe.epochs:
        first, last = rows[0], rows[-1]
        return [
            f"So far the training loss has gone from {loss(first['train_loss'])} in epoch "
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
            "; part of that is the learning rate's own fall to zero, so only a longer run can "
            "tell whether more epochs would help"
            if falls_to_zero
            else ": more epochs may well help, the run looks under-trained"
        )
        sentences.append(f"The training loss was still falling at the end, {numbers}{cause}.")
    elif then > 0 and (now - then) / then > STILL_FALLING:
        sentences.append(f"The training loss was rising at the end, {numbers}.")
    else:
        sentences.append(f"The training loss had levelled off, {numbers}.")
    return sentences + best_epoch(rows)


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """When the held-out images were recognised best, if any were held out."""
    held = [row for row in rows if "holdout_accuracy" in row]
    if not held:
        return []
    best = max(held, key=lambda row: float(row["holdout_accuracy"]))
    last = held[-1]
    if best["holdout_accuracy"] <= last["holdout_accuracy"]:
        return [
            f"Held-out accuracy was highest at the end: {percent(last['holdout_accuracy'])} after "
            f"epoch {last['epoch']}."
        ]
    return [
        f"Held-out accuracy was highest after epoch {best['epoch']}, "
        f"{percent(best['holdout_accuracy'])}, and {percent(last['holdout_accuracy'])} after the "
        "last one."
    ]


def best_and_worst(per_class: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The classes with the highest and the lowest F1, among those that have images."""
    scored = {name: row["f1"] for name, row in per_class.items() if row["support"] > 0}
    if len(scored) < 2:
        return []
    high, low = max(scored.values()), min(scored.values())
    if high == low:
        return [f"All {len(scored)} classes are recognised equally well, with an F1 of {high:.4f}."]
    best, worst = (_names(scored, value) for value in (high, low))
    return [
        f"By F1, {best} {_verb(scored, high)} recognised best ({high:.4f}) and {worst} worst "
        f"({low:.4f})."
    ]


def _names(scored: Mapping[str, float], value: float, most: int = 3) -> str:
    names = [quoted(name) for name, score in scored.items() if score == value]
    return listed(names) if len(names) <= most else f"{len(names)} classes"


def _verb(scored: Mapping[str, float], value: float) -> str:
    return "is" if sum(score == value for score in scored.values()) == 1 else "are"


def confusions(most_confused: Sequence[Mapping[str, Any]]) -> list[str]:
    """The pair of classes that is mixed up most often, and its reverse if that is listed."""
    if not most_confused:
        return ["Not one test image was classified wrongly, so no classes are confused."]
    first = most_confused[0]
    true, predicted = quoted(first["true"]), quoted(first["predicted"])
    sentence = (
        f"The most frequent mistake is to take {true} for {predicted}: "
        f"{plural(first['count'], 'image')}, {percent(first['share'])} of that class"
    )
    for pair in most_confused[1:]:
        if (pair["true"], pair["predicted"]) == (first["predicted"], first["true"]):
            return [f"{sentence}; the other way round it is {plural(pair['count'], 'image')}."]
    return [sentence + "."]


def mean_confidence(bins: Sequence[Mapping[str, Any]]) -> float:
    """The mean confidence of all predictions, from the calibration bins."""
    filled = [one for one in bins if one["count"]]
    total = sum(one["count"] for one in filled)
    return float(sum(one["count"] * one["confidence"] for one in filled) / total)


def confidence(calibration: Mapping[str, Any], accuracy: float, interval: Interval) -> list[str]:
    """Over- or under-confident, or neither as far as the images can tell."""
    mean = mean_confidence(calibration["bins"])
    low, high = interval
    numbers = f"mean confidence is {percent(mean)} and accuracy {percent(accuracy)}"
    error = f"the expected calibration error is {calibration['ece']:.4f}"
    if low <= mean <= high:
        return [
            f"On average the network is neither over- nor under-confident as far as these images "
            f"tell: {numbers}; {error}."
        ]
    word = "over" if mean > accuracy else "under"
    return [
        f"The network is {word}-confident by {points(abs(mean - accuracy))}: {numbers}; {error}."
    ]


def robustness(figures: Mapping[str, Any] | None) -> list[str]:
    """How much corrupted images cost, and which corruption costs most."""
    if not figures or not figures.get("corruptions"):
        return []
    means = {name: sum(v) / len(v) for name, v in figures["corruptions"].items() if v}
    worst = min(means, key=lambda name: means[name])
    mildest = max(means, key=lambda name: means[name])
    sentence = (
        f"On corrupted images accuracy is {percent(figures['mean_accuracy'])} on average, "
        f"{points(figures['clean_accuracy'] - figures['mean_accuracy'])} below that on the same "
        "images clean"
    )
    if len(means) < 2:
        return [f"{sentence}."]
    return [
        f"{sentence}; {quoted(spaced(worst))} costs most (mean {percent(means[worst])}) and "
        f"{quoted(spaced(mildest))} least ({percent(means[mildest])})."
    ]


def spaced(name: str) -> str:
    """'motion_blur' -> 'motion blur'."""
    return name.replace("_", " ")


def hardware(parity: Mapping[str, Any] | None) -> list[str]:
    """What the measured comparisons of devices and precisions say; nothing without them."""
    return [str(one["verdict"]) for one in (parity or {}).get("comparisons", [])]


def unfinished(epochs_done: int, epochs: int, *, tested: bool) -> list[str]:
    """What is missing, if anything is."""
    if epochs_done < epochs:
        after = f"after {epochs_done} of {plural(epochs, 'epoch')}"
        if tested:
            return [f"This training has not run to its end; the test was made {after}."]
        return [f"This training stands {after}, and has not been tested there."]
    return [] if tested else ["This training is finished, but has not been tested yet."]
