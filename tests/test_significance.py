"""Significance tests compared with values computed by hand and from definitions."""

import math

import numpy as np
import pytest

from resnet56.significance import compare_means, compare_predictions, holm, mean_interval


def t_tail(t: float, df: float) -> float:
    """Return the two-sided tail of the t-distribution by integrating its density."""
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    x = np.linspace(-abs(t), abs(t), 200_001)
    return 1 - float(np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x))


def test_welch_matches_the_formulas() -> None:
    """Means 2.5 and 4, variances 5/3 and 4: squared standard error 5/12 + 4/3 = 7/4."""
    result = compare_means([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0])
    df = 1.75**2 / ((5 / 12) ** 2 / 3 + (4 / 3) ** 2 / 2)
    assert result.difference == -1.5
    assert result.p_value == pytest.approx(t_tail(1.5 / math.sqrt(1.75), df), abs=1e-6)
    low, high = result.interval
    assert (low + high) / 2 == pytest.approx(-1.5)
    quantile = (high - low) / 2 / math.sqrt(1.75)
    assert t_tail(quantile, df) == pytest.approx(0.05, abs=1e-6)
    assert not result.pooled


def test_permutations_are_counted_exactly() -> None:
    """Of the 20 ways to split six values into two groups of three, 2 separate them fully."""
    separated = compare_means([0.93, 0.94, 0.95], [0.90, 0.91, 0.92])
    assert separated.permutation_p_value == pytest.approx(2 / 20)
    # Here, 4 of the 20 ways are as extreme, including their mirror images.
    mixed = compare_means([0.92, 0.94, 0.95], [0.90, 0.91, 0.93])
    assert mixed.permutation_p_value == pytest.approx(4 / 20)


def test_a_single_run_is_compared_with_the_variance_of_the_group() -> None:
    """Crawford and Howell 1998: t = (x - mean) / (s sqrt((n + 1) / n)), n - 1 degrees."""
    group = [0.948, 0.949, 0.950, 0.9485]
    result = compare_means(group, [0.947])
    t = (np.mean(group) - 0.947) / (np.std(group, ddof=1) * math.sqrt(5 / 4))
    assert result.pooled
    assert result.permutation_p_value is None
    assert result.p_value == pytest.approx(t_tail(float(t), 3), abs=1e-6)


def test_equal_accuracies_have_no_variance() -> None:
    assert compare_means([0.9, 0.9], [0.9, 0.9]).p_value == 1
    different = compare_means([0.9, 0.9], [0.8, 0.8])
    assert different.p_value == 0
    assert different.interval == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="three accuracies"):
        compare_means([0.9], [0.8])


def test_the_interval_of_a_mean_matches_the_t_distribution() -> None:
    """The 97.5 % quantile of t with 3 degrees of freedom is 3.182446 in tables."""
    error = math.sqrt(5 / 3) / 2
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert (low, high) == pytest.approx((2.5 - 3.182446 * error, 2.5 + 3.182446 * error))


def test_mcnemar_matches_the_binomial_sum() -> None:
    """10 and 3 discordant images: 2 (286 + 78 + 13 + 1) / 2**13."""
    first = np.array([True] * 90 + [False] * 10)
    second = np.array([True] * 80 + [False] * 17 + [True] * 3)
    result = compare_predictions(first, second)
    assert (result.only_first, result.only_second, result.images) == (10, 3, 100)
    assert result.p_value == pytest.approx(2 * (286 + 78 + 13 + 1) / 2**13)
    assert result.difference == pytest.approx(0.07)
    assert compare_predictions(second, first).p_value == result.p_value


def test_the_bootstrap_resamples_images() -> None:
    first = np.array([True] * 800 + [False] * 200)
    second = np.array([True] * 700 + [False] * 250 + [True] * 50)
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, 1000, (4000, 1000))
    means = (first[drawn].astype(float) - second[drawn]).mean(axis=1)
    low, high = compare_predictions(first, second).interval
    assert (low, high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.003)


def test_equal_predictions_do_not_differ_significantly() -> None:
    same = np.array([True, False])
    result = compare_predictions(same, same)
    assert (result.p_value, result.interval) == (1.0, (0.0, 0.0))
    with pytest.raises(ValueError, match="same images"):
        compare_predictions(same, np.array([True]))


def test_holm_matches_a_case_computed_by_hand() -> None:
    """Sorted: 4 x 0.005, 3 x 0.01, 2 x 0.03, then the larger of 0.04 and the last one."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
