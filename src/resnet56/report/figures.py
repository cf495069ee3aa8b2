"""Matplotlib figures of run results, for notebooks and scripts.

The report contains the same plots. The figures do not use pyplot, so they need no backend, and
pyplot keeps no references to them. A notebook displays a figure if it is the last expression in a
cell. `figure.savefig` saves a figure.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from resnet56.errors import RunError, UsageError, escape
from resnet56.report import plots
from resnet56.report.plots import LabeledImage, Line
from resnet56.report.read import read_samples
from resnet56.report.words import percent
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import CustomPart, EpochMetrics, Evaluation, Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RunPath = str | os.PathLike[str]
SplitName = Literal["test", "train", "validation"]

# Splits in metrics.jsonl: key prefix, name and line style.
_SPLITS = (("train", "training", "--"), ("val", "validation", "-"), ("test", "test", "-."))


def plot_confusion_matrix(
    results: RunPath | Evaluation | Metrics,
    *,
    split: SplitName = "test",
    normalize: bool = False,
) -> "Figure":
    """Plot a confusion matrix, with true classes as rows and predicted classes as columns.

    Cells are shaded by the square root of their share of the true class, which makes rare errors
    visible. With more than 20 classes, the labels are class indices, and the cells contain no
    numbers.

    Args:
        results: a run directory, the result of `train`, or the result of `evaluate`.
        split: the split to plot, if `results` is a run directory or the result of `train`.
        normalize: if True, show percentages of the true class instead of numbers of images.

    Raises:
        RunError: the run is missing, damaged or not evaluated.
        UsageError: the split was not evaluated.
    """
    metrics = _metrics(results, split)
    matrix, classes = metrics["confusion_matrix"], list(metrics["per_class"])
    return plots.confusion("confusion", matrix, classes, normalize=normalize).figure()


def plot_calibration(
    results: RunPath | Evaluation | Metrics, *, split: SplitName = "test"
) -> "Figure":
    """Plot accuracy against confidence (a reliability diagram, Guo et al. 2017).

    Below the curve, a histogram shows the number of images per confidence bin. The predictions are
    overconfident where the curve is below the diagonal.

    Args:
        results: a run directory, the result of `train`, or the result of `evaluate`.
        split: the split to plot, if `results` is a run directory or the result of `train`.

    Raises:
        RunError: the run is missing, damaged or not evaluated.
        UsageError: the split was not evaluated.
    """
    bins = _metrics(results, split)["calibration"]["bins"]
    return plots.reliability("reliability", bins, "").figure()


def plot_curves(*runs: RunPath) -> "Figure":
    """Plot loss and accuracy over epochs.

    The training curves show averages over the augmented images of each epoch. A run with a
    validation set also has validation curves, and a run with `test_every_epoch` also has test
    curves. If there are several runs, each has its own color.

    Args:
        runs: directories of finished or unfinished runs.

    Raises:
        RunError: a run is damaged or has no finished epoch.
        UsageError: `runs` is empty.
    """
    if not runs:
        raise UsageError("plot_curves requires at least one run directory")
    losses: list[Line] = []
    accuracies: list[Line] = []
    custom: list[dict[str, CustomPart]] = []
    for number, run in enumerate(map(Path, runs)):
        directory = RunDirectory(run)
        rows = directory.read_metrics()
        if not rows:
            raise RunError(f"{escape(str(run))} has no finished epoch; train it first")
        environment = directory.read_environment()
        custom.append(environment.get("custom", {}) if environment else {})
        for i, (prefix, split, style) in enumerate(_SPLITS):
            label = f"{run.resolve().name}, {split}" if len(runs) > 1 else split
            color = number if len(runs) > 1 else i
            for lines, quantity in ((losses, "loss"), (accuracies, "accuracy")):
                if line := _line(label, rows, f"{prefix}_{quantity}", color, style):
                    lines.append(line)
    panels = [(plots.loss_label(custom), False, losses), ("accuracy, %", True, accuracies)]
    return plots.curve_panels(panels).figure()


def _line(label: str, rows: list[EpochMetrics], key: str, color: int, style: str) -> Line | None:
    """Return the curve of a quantity, or None if no row contains it."""
    measured = [(row["epoch"], cast(float, row[key])) for row in rows if key in row]  # type: ignore[literal-required]
    if not measured:
        return None
    epochs, values = zip(*measured, strict=True)
    return Line(label, epochs, values, color, style)


def plot_mistakes(
    run: RunPath,
    *,
    true: str | None = None,
    predicted: str | None = None,
    count: int = 16,
    columns: int = 8,
) -> "Figure":
    """Plot misclassified test images, in descending order of confidence.

    The label of an image shows its true class, its predicted class, and the confidence in percent.
    The images come from samples.npz, which is written when the run is evaluated.

    Args:
        run: a run directory.
        true: show only images of this class.
        predicted: show only images that are classified as this class.
        count: maximum number of images.
        columns: images per row.

    Raises:
        RunError: the run is missing, damaged or not evaluated.
        UsageError: a class is unknown, or `count` or `columns` is not positive.
    """
    if count < 1 or columns < 1:
        raise UsageError("count and columns must be at least 1")
    directory = RunDirectory(Path(run))
    checkpoint = directory.load()
    classes = checkpoint.config.classes
    for name in (true, predicted):
        if name is not None and name not in classes:
            raise UsageError(
                f"{name!r} is not a class of {escape(str(run))}; choose from: {', '.join(classes)}"
            )
    evaluation = directory.read_evaluation(checkpoint.progress.step)
    samples = read_samples(directory, len(classes)) if evaluation else None
    if samples is None:
        raise _not_evaluated(directory)
    chosen = np.full(len(samples.mistakes), True)
    for labels, name in ((samples.mistake_true, true), (samples.mistake_predicted, predicted)):
        if name is not None:
            chosen &= labels == classes.index(name)
    images = [
        LabeledImage(
            samples.mistakes[i],
            f"{classes[samples.mistake_true[i]]}\n\N{RIGHTWARDS ARROW} "
            f"{classes[samples.mistake_predicted[i]]}\n"
            f"{percent(float(samples.mistake_confidence[i]))}",
        )
        for i in np.flatnonzero(chosen)[:count]
    ]
    return plots.gallery(images, columns, "No such mistakes.").figure()


def _metrics(results: RunPath | Evaluation | Metrics, split: SplitName) -> Metrics:
    """Return the metrics for a split from `results`."""
    if isinstance(results, str | os.PathLike):
        run = RunDirectory(Path(results))
        evaluation = run.read_evaluation(run.load().progress.step)
        if evaluation is None:
            raise _not_evaluated(run)
    elif "confusion_matrix" in results:
        return cast(Metrics, results)
    else:
        evaluation = results
    if split not in evaluation:
        names = ", ".join(name for name in ("test", "train", "validation") if name in evaluation)
        raise UsageError(f"there are no metrics for the split {split!r}; choose from: {names}")
    return evaluation[split]


def _not_evaluated(run: RunDirectory) -> RunError:
    path = escape(str(run.path))
    return RunError(f"{path} has not been evaluated; evaluate it first: resnet56 evaluate {path}")
