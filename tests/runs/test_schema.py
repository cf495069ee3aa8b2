"""The schema of the files of a run: valid files load, and invalid files raise RunError."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixtures import CIFAR, make_run, samples

from resnet56.data.class_names import CIFAR100
from resnet56.errors import RunError
from resnet56.report.read import read_run
from resnet56.runs import pretrained, schema
from resnet56.runs.checkpoint import ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import Metrics, check

ROOT = Path(__file__).parents[2]
RESULTS = sorted(path.parent for path in (ROOT / "results").rglob("environment.json"))
TRIALS = [path for path in RESULTS if path.parent.name == "search90"]  # without test images
DIGITS = tuple("0123456789")


@pytest.mark.parametrize("path", sorted({*RESULTS} - {*TRIALS}), ids=lambda path: path.name)
def test_published_results_match_the_schema(path: Path) -> None:
    run = RunDirectory(path)
    assert run.read_environment()
    evaluation = run.read_evaluation(run.read_metrics()[-1]["step"])
    assert evaluation is not None
    classes = {"digits": DIGITS, "cifar100": CIFAR100}.get(path.parent.name, CIFAR)
    schema.check_evaluation(evaluation, run.evaluation_file, classes)
    assert bool(run.read_comparisons(evaluation["step"])) == run.parity_file.exists()


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.name)
def test_published_trials_select_the_ema_by_validation_accuracy(path: Path) -> None:
    run = RunDirectory(path)
    assert run.read_environment()
    rows = run.read_metrics()
    assert len(rows) == json.loads(run.recipe_file.read_text("utf-8"))["epochs"]
    assert not any("test_accuracy" in row for row in rows)
    emas = json.loads((path / "ema.json").read_text("utf-8"))
    best = max(emas["ema_candidates"], key=lambda ema: ema["val_accuracy"])
    assert emas["ema_decay"] == best["decay"]
    assert rows[-1]["val_accuracy"] == best["val_accuracy"]


@pytest.mark.parametrize("name", pretrained.names())
def test_model_card_metrics_match_the_schema(name: str) -> None:
    test = check(pretrained.card(name)["evaluation"]["test"], Metrics, name)
    schema.check_metrics(test, name, CIFAR100 if name.endswith("cifar100") else CIFAR)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("test",), [], "test is a list of length 0; expected an object"),
        (("step",), None, "step is null; expected an integer"),
        (("step",), -1, "step is -1; expected an integer >= 0"),
        (("step",), 10**300, "step is 1000000.* expected an integer <= "),
        (("step",), 2.5, "step is 2.5; expected an integer"),
        (("test", "accuracy"), "high", 'test.accuracy is "high"; expected a number'),
        (("test", "accuracy"), True, "test.accuracy is true; expected a number"),
        (("test", "accuracy"), 1.5, "test.accuracy is 1.5; expected a number <= 1$"),
        (("test", "accuracy_interval"), [0.5], "a list of length 1; expected .* length >= 2"),
        (("test", "confusion_matrix", 3, 4), -2, r"test.confusion_matrix\[3\]\[4\] is -2"),
        (("test", "per_class", "dog", "f1"), "x", 'test.per_class.dog.f1 is "x"; .* or null$'),
        (("test", "per_class", "dog", "f1"), None, "per_class.dog has images but no scores"),
        (("test", "calibration", "bins", 14, "count"), {}, r"bins\[14\].count is an object"),
        (("robustness", "corruptions", "jpeg", 2), 7, r"robustness.corruptions.jpeg\[2\] is 7"),
        (("robustness", "corruptions", "jpeg"), [], "jpeg does not have 5 values"),
        (("speed", "batch_1"), "fast", 'speed.batch_1 is "fast"; expected an object'),
    ],
)
def test_errors_name_the_field_its_value_and_what_is_expected(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    run = RunDirectory(make_run(tmp_path / "run", images=100, extras=True))
    evaluation = json.loads(run.evaluation_file.read_text())
    step = evaluation["step"]
    parent = evaluation
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    run.evaluation_file.write_text(json.dumps(evaluation))
    with pytest.raises(RunError, match=rf"evaluation\.json.* is damaged: .*{message}") as caught:
        run.read_evaluation(step)
    assert "\n" not in str(caught.value)


def test_unknown_fields_are_preserved(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", images=100)
    run = RunDirectory(path)
    environment = {**(run.read_environment() or {}), "later": [1, {"x": None}]}
    run.write_environment(environment)
    assert run.read_environment() == environment


def test_all_files_of_a_run_round_trip(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", images=100, extras=True)
    facts = read_run(path)
    assert facts.evaluation
    assert facts.samples
    assert len(facts.comparisons) == 1
    run = RunDirectory(path)
    run.write_evaluation(facts.evaluation)
    run.write_samples(samples(CIFAR))
    assert read_run(path).evaluation == facts.evaluation


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("originals", np.zeros((6, 3, 32, 32), np.float32), "has dtype float32; expected uint8"),
        ("originals", np.zeros((6, 3, 32, 32), np.int64), "has dtype int64; expected uint8"),
        ("originals", np.zeros((6, 3, 32), np.uint8), "shape .* expected"),
        ("original_labels", np.zeros(5, np.int64), r"shape \(5,\); expected \(6,\)"),
        ("original_labels", np.zeros(6), "has dtype float64; expected integer"),
        ("original_labels", np.full(6, 10), "out-of-range labels"),
        ("mistake_index", np.full(24, -1), "out of range"),
        ("mistake_confidence", np.full(24, np.nan), "not finite"),
        ("mistake_confidence", np.full(24, 1.5), "out of range"),
        ("mistake_confidence", np.full(24, "x"), "expected float"),
        ("augmented", None, "augmented is missing"),
    ],
)
def test_the_dtype_shape_and_range_of_arrays_are_checked(
    tmp_path: Path, name: str, array: Any, message: str
) -> None:
    path = make_run(tmp_path / "run", images=100)
    arrays = samples(CIFAR) | {name: array}
    np.savez(path / "samples.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(RunError, match=rf"samples\.npz is damaged: .*{message}"):
        read_run(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("arch", 3, "arch is 3; expected a string"),
        ("classes", [], "classes is a list of length 0"),
        ("classes", ["a", "a"], "two classes have the same name"),
        ("classes", ["a", ["b"]], r"classes\[1\] is a list of length 1; expected a string"),
        ("mean", "text", 'mean is "text"; expected a list'),
        ("mean", [0.1, 0.2], "mean is a list of length 2; expected a list of length 3"),
        ("mean", [0.1, 0.2, 1e300], r"mean\[2\] is 1e\+300; expected a number <= 1000"),
        ("std", [0.1, 0.2, 0], r"std\[2\] is 0; expected a number >= 1e-09"),
    ],
)
def test_a_model_config_is_checked(field: str, value: Any, message: str) -> None:
    facts = {"arch": "resnet8", "classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert check(facts, ModelConfig, "f") == ModelConfig("resnet8", ("a",), (0, 0, 0), (1, 1, 1))
    with pytest.raises(RunError, match=message):
        check(facts | {field: value}, ModelConfig, "f")
