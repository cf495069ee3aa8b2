"""Logits and labels in, numbers out.

Accuracy with an interval, per-class precision, recall and F1, the confusion matrix, top-k, and
calibration. All shares are in [0, 1], losses in nats.
"""

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from resnet56.runs.schema import Calibration, ConfusedPair, Metrics

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
BINS = 15  # of the reliability curve, as in Guo et al. 2017


def measure(logits: Floats, labels: Integers, classes: tuple[str, ...]) -> Metrics:
    """Measure predictions.

    A class without images has no scores (None), and the means are over the other classes.

    Args:
        logits: (N, C) finite floats, N >= 1.
        labels: (N,) integers in [0, C).
        classes: the C names.

    Returns:
        A dictionary whose keys are attributes, too.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
    from sklearn.utils import Bunch

    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    predicted = logits.argmax(axis=1)
    every = np.arange(len(classes))
    matrix = confusion_matrix(labels, predicted, labels=every)
    # A class that is never predicted has no precision; it counts as 0, as is usual.
    columns = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0.0)
    precision, recall, f1, support = (np.asarray(column) for column in columns)
    scores = {"precision": precision, "recall": recall, "f1": f1}
    present = support > 0
    hits = int((predicted == labels).sum())
    result = Bunch(
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


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """(N, C) logits -> (N, C) log-probabilities, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """(N, C) logits -> (N, C) probabilities, in float64."""
    result: npt.NDArray[np.float64] = np.exp(log_softmax(logits))
    return result


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), exact enough at 0 and 1 too.

    `hits` may be a mean over several networks on the same n images.
    """
    share = hits / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def top_k(logits: Floats, labels: Integers, k: int) -> float:
    """The share of images whose class is among the k largest logits."""
    k = min(k, logits.shape[1])
    # Stable, so that of equal logits the first counts, as it does for the accuracy.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def most_confused(matrix: Integers, classes: tuple[str, ...], most: int = 10) -> list[ConfusedPair]:
    """The (true, predicted) pairs off the diagonal with the most images, most first."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, off.shape), strict=True)
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "count": int(off[true, predicted]),
            "share": float(off[true, predicted] / matrix[true].sum()),
        }
        for true, predicted in pairs
        if off[true, predicted] > 0
    ]


def calibration(probabilities: Floats, labels: Integers) -> Calibration:
    """Does the confidence mean what it says? (Guo et al. 2017; Brier 1950.)

    Returns:
        `ece`: the mean distance of confidence and accuracy over 15 equal bins of confidence,
        weighted by their images; `brier`: the mean squared distance of the probabilities from
        the one-hot truth, summed over classes (0 to 2); `bins`: count, confidence and accuracy
        of each bin, None where it is empty.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    # Bins are (lower, upper], so that a confidence of exactly 1 is in the last.
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(index, minlength=BINS)
    confidences = np.bincount(index, confidence, minlength=BINS)
    hits = np.bincount(index, correct, minlength=BINS)
    truth = np.zeros_like(probabilities)
    truth[np.arange(len(labels)), labels] = 1
    return {
        "ece": float(np.abs(confidences - hits).sum() / len(labels)),
        "brier": float(np.square(probabilities - truth).sum(axis=1).mean()),
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
