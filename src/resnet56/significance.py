"""Test whether two accuracies differ significantly.

Two sources of randomness require different tests. Training with a different seed results in a
different accuracy, so `compare_means` compares accuracies over several seeds. Testing on different
images also results in a different accuracy, so `compare_predictions` compares two models image by
image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.05  # a difference is significant if its p-value is below this level
CONFIDENCE = 1 - LEVEL
RESAMPLES = 10_000  # number of bootstrap samples
MAX_PERMUTATIONS = 10_000  # if there are more permutations, the test uses a random sample

Interval = tuple[float, float]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Means:
    """Comparison of the mean accuracies of two groups of runs.

    Attributes:
        difference: mean of the first group minus mean of the second group, as a fraction.
        interval: 95 % confidence interval of the difference.
        p_value: two-sided p-value of the t-test.
        permutation_p_value: two-sided p-value of the permutation test, or None if a group has only
            one run. The smallest possible value depends on the number of runs.
        pooled: whether the t-test assumes that both groups have the same variance. This assumption
            is necessary if a group has only one run.
    """

    difference: float
    interval: Interval
    p_value: float
    permutation_p_value: float | None
    pooled: bool


@dataclass(frozen=True)
class Paired:
    """Comparison of the predictions of two models on the same images.

    Attributes:
        difference: accuracy of the first model minus accuracy of the second model, as a fraction.
        interval: 95 % bootstrap interval of the difference.
        p_value: two-sided p-value of McNemar's exact test.
        only_first: number of images that only the first model classifies correctly.
        only_second: number of images that only the second model classifies correctly.
        images: number of images.
    """

    difference: float
    interval: Interval
    p_value: float
    only_first: int
    only_second: int
    images: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % confidence interval of a mean, based on the t-distribution.

    Args:
        values: at least two accuracies.
    """
    from scipy import stats

    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    width = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean - width, mean + width


def compare_means(first: Sequence[float], second: Sequence[float]) -> Means:
    """Compare the mean accuracies of two groups of runs with different seeds.

    The p-value is that of Welch's t-test. If a group has only one run, its variance is undefined,
    and the p-value is that of Student's t-test with the variance of the other group.

    Args:
        first, second: accuracies of the two groups, at least three in total.

    Raises:
        ValueError: there are fewer than three accuracies, or a group is empty.
    """
    from scipy import stats

    if min(len(first), len(second)) < 1 or len(first) + len(second) < 3:
        raise ValueError(
            "the comparison of means requires two groups with at least three accuracies in total"
        )
    difference = float(np.mean(first) - np.mean(second))
    pooled = min(len(first), len(second)) == 1
    if np.ptp(first) == np.ptp(second) == 0:  # without variance, the t-statistic is undefined
        p_value, interval = float(difference == 0), (difference, difference)
    else:
        result = stats.ttest_ind(first, second, equal_var=pooled)
        bounds = result.confidence_interval(CONFIDENCE)
        p_value, interval = float(result.pvalue), (float(bounds.low), float(bounds.high))
    return Means(
        difference=difference,
        interval=interval,
        p_value=p_value,
        permutation_p_value=None if pooled else _permutation_test(first, second),
        pooled=pooled,
    )


def _permutation_test(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy import stats

    def difference(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], axis: int) -> object:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    result = stats.permutation_test(
        (first, second), difference, n_resamples=MAX_PERMUTATIONS, vectorized=True, rng=0
    )
    return float(result.pvalue)


def compare_predictions(first: BoolArray, second: BoolArray) -> Paired:
    """Compare two models on the same images.

    Args:
        first, second: bool arrays (N,), True for images that the model classifies correctly.

    Raises:
        ValueError: the arrays are empty or have different shapes.
    """
    from scipy import stats

    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError("the comparison of predictions requires two arrays for the same images")
    images = len(first)
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    discordant = only_first + only_second
    # If the models are equally accurate, a discordant image favors each model with probability 1/2.
    # This is the exact binomial form of McNemar's test (McNemar 1947).
    p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    # Each image has one of three outcomes. Resampling images with replacement is equivalent to
    # drawing the counts of these outcomes from a multinomial distribution.
    shares = np.array([only_first, only_second, images - discordant]) / images
    drawn = np.random.default_rng(0).multinomial(images, shares, RESAMPLES)
    differences = (drawn[:, 0] - drawn[:, 1]) / images
    low, high = np.quantile(differences, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Paired(
        difference=(only_first - only_second) / images,
        interval=(float(low), float(high)),
        p_value=p_value,
        only_first=only_first,
        only_second=only_second,
        images=images,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of comparisons (Holm 1979), and return them in the same order.

    The probability of at least one false positive is then at most the significance level.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
