"""Charts of a run, and its confusion matrix as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resnet56.report import plots, story, words
from resnet56.report.plots import Chart, Line
from resnet56.report.read import RunFacts


@dataclass(frozen=True)
class Cell:
    """A cell of the confusion matrix: its count and its shade."""

    count: int
    shade: str  # "z" for a count of zero, "d1" to "d5" on the diagonal, "e1" to "e5" elsewhere
    label: str  # empty for a count of zero


def training_charts(facts: RunFacts) -> list[Chart]:
    """Plot loss, accuracy, learning rate and throughput over the finished epochs, if any."""
    rows = facts.rows
    if not rows:
        return []
    last = rows[-1]
    ends = f"after epoch {last['epoch']}"
    losses = [_line("training", rows, "train_loss")]
    accuracies = [_line("training", rows, "train_accuracy")]
    loss_alt = f"Training loss {words.loss(rows[0]['train_loss'])} in epoch {rows[0]['epoch']}, "
    loss_alt += f"{words.loss(last['train_loss'])} in epoch {last['epoch']}."
    accuracy_alt = f"Training accuracy {words.percent(last['train_accuracy'])} {ends}."
    if validated := facts.validated:
        losses.append(_line("validation", validated, "val_loss"))
        accuracies.append(_line("validation", validated, "val_accuracy"))
        accuracy_alt += f" Validation: {words.percent(validated[-1]['val_accuracy'])}."
    if facts.test and facts.evaluation:
        epoch = [float(facts.evaluation.get("epoch", last["epoch"]))]
        losses.append(Line("test", epoch, [facts.test["loss"]]))
        accuracies.append(Line("test", epoch, [facts.test["accuracy"]]))
        accuracy_alt += f" Test: {words.percent(facts.test['accuracy'])}."
    rates = [_line("learning rate", rows, "lr")]
    speeds = [_line("throughput", rows, "images_per_second")]
    return [
        plots.curves("loss", "Loss", loss_alt, losses, plots.loss_label([facts.custom])),
        plots.curves("accuracy", "Accuracy", accuracy_alt, accuracies, "accuracy, %", percent=True),
        plots.curves(
            "learning-rate",
            "Learning rate at the end of each epoch",
            f"Learning rate {last['lr']:.3g} {ends}.",
            rates,
            "learning rate",
        ),
        plots.curves(
            "speed",
            "Throughput",
            f"{last['images_per_second']:.0f} images/s in epoch {last['epoch']}.",
            speeds,
            "training images/s",
        ),
    ]


def _line(label: str, rows: Sequence[Mapping[str, Any]], key: str) -> Line:
    return Line(label, [row["epoch"] for row in rows], [row[key] for row in rows])


def reliability(facts: RunFacts) -> Chart | None:
    """Plot accuracy against confidence on the test images."""
    if not facts.test:
        return None
    calibration = facts.test["calibration"]
    alt = (
        f"Accuracy against confidence in {len(calibration['bins'])} bins; expected calibration "
        f"error {calibration['ece']:.4f}, Brier score {calibration['brier']:.4f}."
    )
    return plots.reliability("reliability", calibration["bins"], alt)


def robustness(facts: RunFacts) -> Chart | None:
    """Plot the accuracy under each corruption, if it was measured."""
    metrics = facts.robustness
    measured = metrics["corruptions"] if metrics else {}
    corruptions = {story.spaced(name): values for name, values in measured.items() if values}
    if metrics is None or not corruptions:
        return None
    alt = f"Mean accuracy over all corruptions: {words.percent(metrics['mean_accuracy'])}."
    return plots.robustness("robustness", corruptions, alt)


def shade(share: float, *, diagonal: bool) -> str:
    """Return the shade of a cell that contains `share` of the images of the true class."""
    steps = (0.5, 0.75, 0.9, 0.95) if diagonal else (0.005, 0.01, 0.02, 0.05)
    return ("d" if diagonal else "e") + str(1 + sum(share >= step for step in steps))


def confusion_table(facts: RunFacts) -> list[list[Cell]] | None:
    """Return the cells of the confusion matrix, indexed by true class and predicted class."""
    if not facts.test:
        return None
    table = []
    for i, row in enumerate(facts.test["confusion_matrix"]):
        total = max(sum(row), 1)
        cells = []
        for j, number in enumerate(row):
            label = (
                f"true {facts.classes[i]}, predicted {facts.classes[j]}: {words.count(number)} "
                f"({words.percent(number / total)})"
            )
            step = shade(number / total, diagonal=i == j) if number else "z"
            cells.append(Cell(number, step, label if number else ""))
        table.append(cells)
    return table


def confusion_chart(facts: RunFacts) -> Chart | None:
    """Plot the confusion matrix, for Markdown reports and for data sets with many classes."""
    if not facts.test:
        return None
    return plots.confusion("confusion", facts.test["confusion_matrix"], facts.classes)
