"""Metrics compared with hand-computed cases, SciPy, PyTorch and loops."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats

from resnet56.metrics import calibration, compute_metrics, log_softmax, most_confused, top_k
from resnet56.metrics import wilson_interval as wilson


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))


def noise(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random logits that are higher for the label on average, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1
    return logits, labels


def deciding(predicted: list[int], classes: int) -> np.ndarray:
    return 5 * np.eye(classes, dtype=np.float32)[predicted]


# Three classes: rows are true classes, and columns are predicted classes.
#
#         A  B  C
#     A   3  2  0
#     B   1  2  0
#     C   0  1  1
TRUE = [0] * 5 + [1] * 3 + [2] * 2
PREDICTED = [*[0, 0, 0, 1, 1], *[0, 1, 1], *[1, 2]]


def test_three_classes_match_hand_computed_metrics() -> None:
    result = compute_metrics(deciding(PREDICTED, 3), np.array(TRUE), ("A", "B", "C"))
    assert result["n"] == 10
    assert result["accuracy"] == pytest.approx(6 / 10)
    assert result["confusion_matrix"] == [[3, 2, 0], [1, 2, 0], [0, 1, 1]]
    expected = {
        "A": {"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3, "support": 5},
        "B": {"precision": 2 / 5, "recall": 2 / 3, "f1": 1 / 2, "support": 3},
        "C": {"precision": 1, "recall": 1 / 2, "f1": 2 / 3, "support": 2},
    }
    assert list(result["per_class"]) == ["A", "B", "C"]
    for name, row in expected.items():
        assert result["per_class"][name] == pytest.approx(row)
    macro = {"precision": 43 / 60, "recall": 53 / 90, "f1": 11 / 18, "classes": 3}
    weighted = {"precision": 0.695, "recall": 0.6, "f1": 37 / 60, "classes": 3}
    assert result["macro"] == pytest.approx(macro)
    assert result["weighted"] == pytest.approx(weighted)
    assert result["most_confused"] == [
        {"true": "A", "predicted": "B", "count": 2, "fraction": pytest.approx(2 / 5)},
        {"true": "B", "predicted": "A", "count": 1, "fraction": pytest.approx(1 / 3)},
        {"true": "C", "predicted": "B", "count": 1, "fraction": pytest.approx(1 / 2)},
    ]


def test_a_class_that_is_never_predicted_has_precision_0() -> None:
    result = compute_metrics(deciding([0, 0, 1], 3), np.array([0, 2, 1]), names(3))
    assert result["per_class"]["class 2"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert result["macro"]["precision"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_a_class_without_images_has_no_scores_and_is_excluded_from_means() -> None:
    """This is also true if the class is predicted. Means include only the other classes."""
    result = compute_metrics(deciding([0, 1, 2, 1], 3), np.array([0, 1, 0, 0]), names(3))
    assert result["per_class"]["class 2"] == {
        "precision": None, "recall": None, "f1": None, "support": 0,
    }  # fmt: skip
    assert result["macro"] == pytest.approx(
        {
            "precision": (1 + 1 / 2) / 2,
            "recall": (1 / 3 + 1) / 2,
            "f1": (1 / 2 + 2 / 3) / 2,
            "classes": 2,
        }
    )
    assert result["weighted"]["classes"] == 2
    assert result["weighted"]["recall"] == pytest.approx(result["accuracy"])
    assert result["confusion_matrix"][2] == [0, 0, 0]
    result = compute_metrics(deciding([0, 1, 1], 3), np.array([0, 1, 0]), names(3))
    assert result["weighted"]["recall"] == pytest.approx(2 / 3)
    assert result["confusion_matrix"][2] == [0, 0, 0]


def test_metrics_of_one_image_are_valid() -> None:
    result = compute_metrics(deciding([1], 2), np.array([1]), names(2))
    assert (result["n"], result["accuracy"], result["most_confused"]) == (1, 1.0, [])


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 9), (9303, 10_000)])
def test_the_interval_matches_scipy(hits: int, n: int) -> None:
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    low, high = wilson(hits, n)
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_top_k_counts_labels_with_fewer_than_k_larger_logits(classes: int) -> None:
    logits, labels = noise(300, classes)
    result = compute_metrics(logits, labels, names(classes))
    for k, measured in ((1, result["accuracy"]), (2, result["top2"]), (3, result["top3"])):
        hits = sum(
            sum(other > row[label] for other in row) < k
            for row, label in zip(logits, labels, strict=True)
        )
        assert measured == pytest.approx(hits / 300)
        assert top_k(logits, labels, k) == measured


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_a_top_1_hit_with_tied_logits_is_also_in_top_2_and_top_3(classes: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        logits = rng.integers(0, 2, (50, classes)).astype(np.float32)
        result = compute_metrics(logits, logits.argmax(axis=1), names(classes))
        assert (result["accuracy"], result["top2"], result["top3"]) == (1, 1, 1)


@pytest.mark.parametrize("scale", [1, 100, 1e4])
def test_log_softmax_matches_scipy(scale: float) -> None:
    logits = scale * noise(50, 10)[0]
    result = log_softmax(logits)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, special.log_softmax(logits.astype(np.float64), axis=1))


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_loss_matches_pytorch_in_double_precision(classes: int) -> None:
    logits, labels = noise(200, classes)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    )
    assert compute_metrics(logits, labels, names(classes))["loss"] == pytest.approx(
        float(expected), rel=1e-12
    )


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(scale: float) -> None:
    logits, labels = scale * deciding(PREDICTED, 3) / 5, np.array(TRUE)
    result = compute_metrics(logits, labels, names(3))
    json.dumps(dict(result), allow_nan=False)
    # With a positive scale, six of ten are correct. Otherwise, each prediction is off by 1e4 or is
    # a tie of two classes.
    if scale > 0:
        assert result["loss"] == pytest.approx(1e4 * 4 / 10)
    else:
        assert result["loss"] == pytest.approx((6 * 1e4 + 10 * np.log(2)) / 10)


@pytest.mark.parametrize("classes", [2, 100])
def test_metrics_for_any_number_of_classes_are_valid_json(classes: int) -> None:
    logits, labels = noise(400, classes)
    result = json.loads(json.dumps(dict(compute_metrics(logits, labels, names(classes)))))
    matrix = np.zeros((classes, classes), dtype=int)
    for true, predicted in zip(labels, logits.argmax(axis=1), strict=True):
        matrix[true, predicted] += 1
    assert result["confusion_matrix"] == matrix.tolist()
    assert sum(row["support"] for row in result["per_class"].values()) == 400
    assert len(result["most_confused"]) == (2 if classes == 2 else 10)


def test_confused_pairs_are_sorted_by_count_and_then_by_class() -> None:
    matrix = np.array([[50, 3, 0, 1], [3, 60, 0, 0], [0, 7, 0, 0], [0, 0, 0, 9]])
    kept = matrix.copy()
    pairs = most_confused(matrix, ("A", "B", "C", "D"), limit=3)
    assert [(p["true"], p["predicted"], p["count"], p["fraction"]) for p in pairs] == [
        ("C", "B", 7, 1.0),
        ("A", "B", 3, pytest.approx(3 / 54)),
        ("B", "A", 3, pytest.approx(3 / 63)),
    ]
    # Pairs without mistakes are omitted.
    assert len(most_confused(matrix, ("A", "B", "C", "D"))) == 4
    assert np.array_equal(matrix, kept)


# Calibration


def certain(confidences: list[float], right: list[bool]) -> dict[str, Any]:
    """Return the calibration of two classes if the first is predicted with these confidences."""
    probabilities = np.array([[p, 1 - p] for p in confidences])
    return calibration(probabilities, np.array([0 if hit else 1 for hit in right]))


def test_a_calibrated_classifier_has_no_calibration_error() -> None:
    confidences = [0.6] * 5 + [0.8] * 5 + [0.9] * 10 + [1.0] * 3
    right = [True] * 3 + [False] * 2 + [True] * 4 + [False] + [True] * 9 + [False] + [True] * 3
    assert certain(confidences, right)["ece"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("hits", [0, 3, 7, 10])
def test_the_ece_of_a_constant_confidence_is_its_distance_from_the_accuracy(hits: int) -> None:
    result = certain([0.7] * 10, [True] * hits + [False] * (10 - hits))
    assert result["ece"] == pytest.approx(abs(0.7 - hits / 10))


@pytest.mark.parametrize("classes", [2, 10])
def test_the_bins_and_the_ece_match_a_plain_loop(classes: int) -> None:
    logits, labels = noise(500, classes)
    probabilities = special.softmax(2 * logits.astype(np.float64), axis=1)
    result = calibration(probabilities, labels)
    error = 0.0
    assert len(result["bins"]) == 15
    for index, row in enumerate(result["bins"]):
        inside = [
            (p.max(), p.argmax() == label)
            for p, label in zip(probabilities, labels, strict=True)
            if index / 15 < p.max() <= (index + 1) / 15
        ]
        assert (row["from"], row["to"]) == pytest.approx((index / 15, (index + 1) / 15))
        assert row["count"] == len(inside)
        if not inside:
            assert (row["confidence"], row["accuracy"]) == (None, None)
            continue
        confidence, accuracy = np.mean(inside, axis=0)
        assert (row["confidence"], row["accuracy"]) == pytest.approx((confidence, accuracy))
        error += len(inside) / 500 * abs(confidence - accuracy)
    assert result["ece"] == pytest.approx(error)
    assert sum(row["count"] for row in result["bins"]) == 500


def test_full_confidence_is_in_the_last_bin() -> None:
    bins = certain([1.0, 1.0, 0.51], [True, False, True])["bins"]
    assert bins[-1] == {"from": 14 / 15, "to": 1, "count": 2, "confidence": 1, "accuracy": 0.5}
    assert bins[7]["count"] == 1  # 7/15 < 0.51 <= 8/15


def test_a_confidence_at_the_edge_of_two_bins_is_in_the_lower_one() -> None:
    bins = certain([0.6], [True])["bins"]  # 0.6 is 9/15
    assert [row["count"] for row in bins] == [0] * 8 + [1] + [0] * 6


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_brier_score_of_uniform_probabilities_matches_the_formula(classes: int) -> None:
    uniform = np.full((4, classes), 1 / classes)
    assert calibration(uniform, np.array([0, 1, 0, 1]))["brier"] == pytest.approx(1 - 1 / classes)


def test_the_brier_score_ranges_from_0_to_2() -> None:
    assert certain([1.0], [True])["brier"] == 0
    assert certain([1.0], [False])["brier"] == 2
    assert certain([0.8, 0.8], [True, False])["brier"] == pytest.approx((0.08 + 1.28) / 2)
