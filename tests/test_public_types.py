"""The types in the Python API. `mypy --strict` also checks this file."""

from pathlib import Path
from typing import assert_type

import resnet56
from resnet56 import Dataset, EpochMetrics, Evaluation, Metrics, Recipe


def test_results_have_typed_fields(tiny: Dataset, small: Recipe, tmp_path: Path) -> None:
    rows: list[EpochMetrics] = []
    result = resnet56.train(
        small, tiny, str(tmp_path / "run"), device="cpu", callbacks=[rows.append]
    )
    assert_type(result, Evaluation)
    assert_type(result["test"]["accuracy"], float)
    assert_type(rows[0]["train_loss"], float)
    assert [row["epoch"] for row in rows] == [1, 2, 3]

    predictor = resnet56.load(tmp_path / "run", device="cpu")
    metrics = resnet56.evaluate(
        predictor.model, tiny.test, predictor.classes, predictor.mean, predictor.std
    )
    assert_type(metrics, Metrics)
    assert_type(metrics["confusion_matrix"], list[list[int]])
    assert metrics == result["test"]
    assert_type(predictor.evaluate(tiny.test), Metrics)

    [prediction] = predictor.predict(tiny.test.images[0])
    assert_type(prediction.probability, float)
