"""Figures show the values in the files and do not use pyplot."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixtures import BEST, CIFAR, make_run, samples

import resnet56
from resnet56.errors import RunError, UsageError
from resnet56.files import read_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = replace(BEST, val_size=500, epochs=12)
    return make_run(tmp_path_factory.mktemp("figures") / "run", recipe, extras=True)


def cells(figure: Any) -> list[str]:
    [axes] = figure.axes
    return [text.get_text() for text in axes.texts]


def test_the_confusion_matrix_accepts_a_path_an_evaluation_or_metrics(run: Path) -> None:
    evaluation = read_json(run / "evaluation.json")
    matrix = evaluation["test"]["confusion_matrix"]
    expected = [str(count) for row in matrix for count in row]
    for results in (run, str(run), evaluation, evaluation["test"]):
        figure = resnet56.plot_confusion_matrix(results)
        assert cells(figure) == expected
        [axes] = figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == list(CIFAR)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    train = evaluation["train"]["confusion_matrix"]
    figure = resnet56.plot_confusion_matrix(run, split="train")
    assert cells(figure) == [str(count) for row in train for count in row]
    shares = [100 * count / sum(row) for row in matrix for count in row]
    figure = resnet56.plot_confusion_matrix(run, normalize=True)
    assert [float(cell) for cell in cells(figure)] == pytest.approx(shares, abs=0.05)


def test_the_calibration_plot_shows_the_values_of_the_evaluation(run: Path) -> None:
    bins = read_json(run / "evaluation.json")["validation"]["calibration"]["bins"]
    upper, lower = resnet56.plot_calibration(run, split="validation").axes
    _, curve = upper.get_lines()  # the first line is the diagonal
    filled = [item for item in bins if item["count"]]
    assert list(curve.get_xdata()) == [100 * item["confidence"] for item in filled]
    assert list(curve.get_ydata()) == [100 * item["accuracy"] for item in filled]
    assert [bar.get_height() for bar in lower.patches] == [item["count"] for item in filled]


def test_the_curves_show_the_recorded_metrics(run: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss, accuracy = resnet56.plot_curves(run).axes
    for axes, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for line, split in zip(axes.get_lines(), ("train", "val"), strict=True):
            assert list(line.get_xdata()) == [row["epoch"] for row in rows]
            expected = [scale * row[f"{split}_{quantity}"] for row in rows]
            assert list(line.get_ydata()) == pytest.approx(expected)
    plain = make_run(tmp_path / "plain", replace(BEST, epochs=2), tested=False)
    figure = resnet56.plot_curves(run, plain)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["run, training", "run, validation", "plain, training"]
    first, validation, second = figure.axes[0].get_lines()
    assert first.get_color() == validation.get_color() != second.get_color()
    assert figure.axes[0].get_ylabel() == "cross-entropy, nats"
    environment = read_json(plain / "environment.json")
    environment["custom"] = {"loss": {"name": "focal_loss", "sha256": "0" * 64}}
    (plain / "environment.json").write_text(json.dumps(environment))
    assert resnet56.plot_curves(run, plain).axes[0].get_ylabel() == "loss"


def test_the_plotted_mistakes_match_the_stored_mistakes(run: Path) -> None:
    kept = samples(CIFAR)
    figure = resnet56.plot_mistakes(run, count=10)
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) == 10
    for axes, image, true, predicted in zip(
        shown,
        kept["mistakes"],
        kept["mistake_true"],
        kept["mistake_predicted"],
        strict=False,
    ):
        assert np.array_equal(axes.get_images()[0].get_array(), image.transpose(1, 2, 0))
        lines = axes.get_xlabel().splitlines()
        assert lines[:2] == [CIFAR[true], f"→ {CIFAR[predicted]}"]
    label = int(kept["mistake_true"][0])
    figure = resnet56.plot_mistakes(run, true=CIFAR[label], count=100)
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) == sum(kept["mistake_true"] == label)
    figure = resnet56.plot_mistakes(run, true=CIFAR[label], predicted=CIFAR[label])
    assert "No such mistakes." in [text.get_text() for text in figure.axes[0].texts]


def test_inputs_that_cannot_be_plotted_cause_one_line_errors(run: Path, tmp_path: Path) -> None:
    untested = make_run(tmp_path / "untested", BEST, done=0, tested=False)
    tested = make_run(tmp_path / "tested", BEST, images=100)
    with pytest.raises(RunError, match="untested has not been evaluated; evaluate it first"):
        resnet56.plot_confusion_matrix(untested)
    with pytest.raises(RunError, match="untested has not been evaluated"):
        resnet56.plot_mistakes(untested)
    with pytest.raises(UsageError, match="split 'validation'; choose from: test, train"):
        resnet56.plot_calibration(tested, split="validation")
    with pytest.raises(RunError, match="no finished epoch"):
        resnet56.plot_curves(untested)
    with pytest.raises(UsageError, match="at least one run"):
        resnet56.plot_curves()
    with pytest.raises(UsageError, match="'lion' is not a class of .*: airplane, "):
        resnet56.plot_mistakes(run, true="lion")
    with pytest.raises(UsageError, match="count and columns must be at least 1"):
        resnet56.plot_mistakes(run, count=0)


def test_figures_do_not_require_pyplot_and_are_displayed_in_notebooks(run: Path) -> None:
    code = (
        "import sys, resnet56, matplotlib;"
        "before = matplotlib.rcParams['font.size'];"
        "figure = resnet56.plot_confusion_matrix(sys.argv[1]);"
        "assert figure._repr_png_().startswith(b'\\x89PNG');"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert matplotlib.rcParams['font.size'] == before"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(run)], check=True)
