"""Classification metrics, computed from logits and labels.

The metrics include accuracy with a confidence interval, precision, recall and F1 per class, the
confusion matrix, top-k accuracy, and calibration. Fractions are in [0, 1]. Losses are in nats.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from resnet56.errors import UsageError
from resnet56.notebook import table
from resnet56.progress import percent
from resnet56.runs.schema import Calibration, ConfusedPair, Metrics

if TYPE_CHECKING:
    from torch import Tensor

    from resnet56.data.dataset import Split

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
BINS = 15  # number of bins of the reliability diagram, as in Guo et al. 2017


class MetricsDict(dict[str, Any]):
    """A `Metrics` dictionary with a short representation."""

    def __repr__(self) -> str:
        return f"Metrics(accuracy {percent(self['accuracy'])} on {self['n']:,} images)"

    def _repr_html_(self) -> str:
        return metrics_table({"": cast(Metrics, self)})


def metrics_table(splits: Mapping[str, Metrics], caption: str = "") -> str:
    """Return an HTML table with a row of metrics for each split."""
    rows = []
    for name, metrics in splits.items():
        low, high = metrics["accuracy_interval"]
        rows.append(
            (
                name,
                f"{metrics['n']:,}",
                percent(metrics["accuracy"]),
                f"{100 * low:.2f} to {percent(high)}",
                f"{metrics['loss']:.4f}",
                percent(metrics["calibration"]["ece"]),
            )
        )
    columns = ("", "images", "accuracy", "95 % interval", "loss", "calibration error")
    return table(rows, columns=columns, caption=caption)


def compute_metrics(logits: FloatArray, labels: IntArray, classes: tuple[str, ...]) -> Metrics:
    """Compute all metrics for a set of predictions.

    The scores of a class without images are None, and averages exclude this class.

    Args:
        logits: (N, C) finite floats, N >= 1.
        labels: (N,) integers in [0, C).
        classes: names of the C classes.

    Returns:
        A dictionary with a short representation in notebooks and at the prompt.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    predicted = logits.argmax(axis=1)
    indices = np.arange(len(classes))
    matrix = confusion_matrix(labels, predicted, labels=indices)
    # By convention, the precision of a class that is never predicted is 0.
    columns = precision_recall_fscore_support(labels, predicted, labels=indices, zero_division=0.0)
    precision, recall, f1, support = (np.asarray(column) for column in columns)
    scores = {"precision": precision, "recall": recall, "f1": f1}
    present = support > 0
    hits = int((predicted == labels).sum())
    result = MetricsDict(
        accuracy=hits / len(labels),
        accuracy_interval=list(wilson_interval(hits, len(labels))),
        top2=top_k(logits, labels, 2),
        top3=top_k(logits, labels, 3),
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        n=len(labels),
        confusion_matrix=matrix.tolist(),
        per_class={
            name: {
                **{key: float(value[i]) if present[i] else None for key, value in scores.items()},
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        macro={
            **{key: float(value[present].mean()) for key, value in scores.items()},
            "classes": int(present.sum()),
        },
        weighted={
            **{key: float(np.average(value, weights=support)) for key, value in scores.items()},
            "classes": int(present.sum()),
        },
        most_confused=most_confused(matrix, classes),
        calibration=calibration(probabilities, labels),
    )
    return cast(Metrics, result)


def split_metrics(logits: "Tensor", split: "Split", classes: tuple[str, ...]) -> Metrics:
    """Return the metrics of logits (N, C) on `split`, in the format of evaluation.json.

    Raises:
        UsageError: the split contains no images, or the logits or labels do not match the classes.
    """
    if not len(split):
        raise UsageError("cannot evaluate a split without images")
    if logits.shape[1] != len(classes):
        raise UsageError(
            f"the model has {logits.shape[1]} outputs, but {len(classes)} class names; pass one "
            "name per output"
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= len(classes):
        raise UsageError(
            f"the labels range from {low} to {high}, but the model has {len(classes)} classes; "
            "convert the data set with Dataset.for_classes"
        )
    return compute_metrics(logits.numpy(), split.labels.cpu().numpy(), classes)


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Convert logits (N, C) to log-probabilities (N, C) in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Convert logits (N, C) to probabilities (N, C) in float64."""
    result: npt.NDArray[np.float64] = np.exp(log_softmax(logits))
    return result


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval for a proportion (Wilson 1927).

    Unlike the normal approximation, this interval is also accurate near 0 and 1. `hits` can be an
    average over several models on the same n images.
    """
    proportion = hits / n
    center = (proportion + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = (
        Z95 * math.sqrt(proportion * (1 - proportion) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    )
    return max(0.0, center - half), min(1.0, center + half)


def top_k(logits: FloatArray, labels: IntArray, k: int) -> float:
    """Return the fraction of images whose label is among the k classes with the largest logits."""
    k = min(k, logits.shape[1])
    # A stable sort resolves ties in favor of the first class, as argmax does for the accuracy.
    predicted = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((predicted == labels[:, None]).any(axis=1).mean())


def most_confused(
    matrix: IntArray, classes: tuple[str, ...], limit: int = 10
) -> list[ConfusedPair]:
    """Return the most frequent errors as (true, predicted) pairs, sorted by descending count."""
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:limit]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "count": int(errors[true, predicted]),
            "fraction": float(errors[true, predicted] / matrix[true].sum()),
        }
        for true, predicted in pairs
        if errors[true, predicted] > 0
    ]


def calibration(probabilities: FloatArray, labels: IntArray) -> Calibration:
    """Measure how well the confidence matches the accuracy.

    Returns:
        ece: the expected calibration error (Guo et al. 2017) over 15 bins of equal width.
        brier: the Brier score (Brier 1950), summed over classes, from 0 to 2.
        bins: the count, confidence and accuracy of each bin. The confidence and accuracy of an
            empty bin are None.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    # Bins are (lower, upper], so the last bin includes a confidence of 1.
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(index, minlength=BINS)
    confidences = np.bincount(index, confidence, minlength=BINS)
    hits = np.bincount(index, correct, minlength=BINS)
    one_hot = np.zeros_like(probabilities)
    one_hot[np.arange(len(labels)), labels] = 1
    return {
        "ece": float(np.abs(confidences - hits).sum() / len(labels)),
        "brier": float(np.square(probabilities - one_hot).sum(axis=1).mean()),
        "bins": [
            {
                "from": i / BINS,
                "to": (i + 1) / BINS,
                "count": int(counts[i]),
                "confidence": float(confidences[i] / counts[i]) if counts[i] else None,
                "accuracy": float(hits[i] / counts[i]) if counts[i] else None,
            }
            for i in range(BINS)
        ],
    }
