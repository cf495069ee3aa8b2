"""Errors about damaged files of a run have one line.

Hypothesis changes fields, tensors and bytes in the files of a real run. The commands then read the
run in this process.
"""

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet56.data.dataset import Dataset
from resnet56.errors import Error, RunError
from resnet56.predict import load
from resnet56.recipe import Recipe
from resnet56.report import write_report
from resnet56.report.plots import Chart
from resnet56.runs import sources
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import PREDICTIONS, SAMPLES, ArrayType, load_arrays
from resnet56.training import train

CPU = torch.device("cpu")
RECIPE = Recipe(arch="resnet8", epochs=2, batch_size=8, precision="fp32", execution="eager")
JSON_FILES = (
    "checkpoint/checkpoint.json", "recipe.json", "environment.json", "evaluation.json",
    "parity.json", "metrics.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> Path:
    """Create a run with all files."""
    path = tmp_path_factory.mktemp("good") / "run"
    train(RECIPE, tiny, path, device="cpu")
    run = RunDirectory(path)
    evaluation = run.read_evaluation(run.load().progress.step)
    assert evaluation is not None
    batch = {"ms_per_image": 1.0, "images_per_second": 1000.0}
    evaluation["speed"] = {"batch_1": batch, "batch_256": dict(batch), "peak_memory_mb": 5.0}
    evaluation["robustness"] = {
        "images": 24, "severities": [1, 2], "clean_accuracy": 0.5, "mean_accuracy": 0.5,
        "corruptions": {"jpeg": [0.5, 0.25]},
    }  # fmt: skip
    run.write_evaluation(evaluation)
    run.add_comparison(
        {
            "a": "cpu fp32", "b": "cpu bf16", "images": 24, "accuracy_a": 0.5, "accuracy_b": 0.5,
            "changed": 0, "median_difference": 0.0, "largest_difference": 0.0, "verdict": "Same.",
        },
        evaluation["step"],
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True, scope="module")
def _undrawn() -> Iterator[None]:
    """Create charts but do not draw them, because drawing takes most of the time of a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chart, "svg", lambda chart: "")
        yield


def _everything(path: Path, weights: bool) -> Iterator[Callable[[], object]]:
    """Yield the operations of commands on a run, except slow computations."""
    run = RunDirectory(path)
    yield lambda: write_report([path], path / "report.html")
    yield lambda: run.load(training=True)
    yield lambda: (run.read_metrics(), run.rewind_metrics(1))
    yield lambda: run.data_origin()
    if weights:
        yield lambda: load(path, "cpu").run(np.zeros((1, 3, 32, 32), np.uint8))
        yield lambda: sources.import_model(path)


def require_one_line(path: Path, *, weights: bool = False) -> int:
    """Run all operations, check that each error is a one-line `Error`, and return their number."""
    refused = 0
    for command in _everything(path, weights):
        try:
            command()
        except Error as error:
            refused += 1
            text = str(error)
            assert text
            assert "\n" not in text
            assert len(text) < 1000
    return refused


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _paths(value, (*path, key))
    elif isinstance(content, list):
        for index in {0, len(content) // 2, len(content) - 1} & set(range(len(content))):
            yield from _paths(content[index], (*path, index))


MISSING = object()
deep: Any = 0
for _ in range(400):
    deep = [deep]
OTHERS = st.sampled_from(
    [
        MISSING, None, True, 0, -1, 1.5, 1e300, -1e300, 10**19, 10**400, "", "text", "\ud800",
        "\x1b[2J\n", "x" * 5000, [], {}, [[]], [None], {"a": 1}, deep, float("nan"), float("inf"),
        "resnet9998", "../../etc/passwd", "a\x00b", [1, 1, 1], [0.5, 0.5], ["a", "a", "a"],
    ]
)  # fmt: skip


def _changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return {} if value is MISSING else value
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at[key]
    if value is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return content


def _fresh(good: Path, work: Path) -> Path:
    path = work / "run"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    return path


FAST = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=25
)


def test_the_undamaged_run_is_accepted(good: Path, work: Path) -> None:
    assert require_one_line(_fresh(good, work), weights=True) == 0


@pytest.mark.parametrize("name", JSON_FILES)
@FAST
@given(data=st.data())
def test_changed_fields_raise_only_one_line_errors(
    good: Path, work: Path, name: str, data: st.DataObject
) -> None:
    path = _fresh(good, work)
    file = path / name
    lines = file.read_text().splitlines() if name.endswith("l") else [file.read_text()]
    content = json.loads(lines[0])
    field = data.draw(st.sampled_from(list(_paths(content))))
    changed = json.dumps(_changed(content, field, data.draw(OTHERS)))
    file.write_text("\n".join([changed, *lines[1:]]) + "\n")
    require_one_line(path, weights=name.startswith("checkpoint"))


@pytest.mark.parametrize("name", [*JSON_FILES, "samples.npz"])
@settings(FAST, max_examples=8)
@given(data=st.data())
def test_damaged_bytes_raise_only_one_line_errors(
    good: Path, work: Path, name: str, data: st.DataObject
) -> None:
    path = _fresh(good, work)
    content = bytearray((path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (path / name).write_bytes(content)
    require_one_line(path)


@settings(FAST, max_examples=12)
@given(data=st.data())
def test_changed_weights_raise_only_one_line_errors(
    good: Path, work: Path, data: st.DataObject
) -> None:
    """The checksum is updated. The result is a finite prediction or a one-line error, never NaN."""
    path = _fresh(good, work)
    head_file = path / "checkpoint" / "checkpoint.json"
    head = json.loads(head_file.read_text())
    part = data.draw(st.sampled_from(["model", "training"]))
    file = head_file.parent / head["files"][part]["name"]
    tensors = safetensors.torch.load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    change = data.draw(
        st.sampled_from(["missing", "renamed", "shape", "type", "nan", "inf", "huge", "negative"])
    )
    if change == "renamed":
        tensors[f"{name}.other"] = tensor
    elif change == "shape":
        tensors[name] = tensor.repeat(2, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor[None]
    elif change == "type":
        tensors[name] = tensor.to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.half])))
    elif change in ("nan", "inf", "huge", "negative"):
        value = {"nan": float("nan"), "inf": float("inf"), "huge": 1e38, "negative": -1e3}[change]
        integer = not tensor.is_floating_point()
        tensors[name] = torch.full_like(tensor, 1 if integer else value)
    content = safetensors.torch.save(tensors)
    file.write_bytes(content)
    head["files"][part]["sha256"] = hashlib.sha256(content).hexdigest()
    head_file.write_text(json.dumps(head))
    refused = require_one_line(path, weights=True)
    if change in ("nan", "inf") and part == "model" and tensor.is_floating_point():
        assert refused >= 2
    with contextlib.suppress(Error):
        logits = load(path, "cpu").run(np.zeros((1, 3, 32, 32), np.uint8)).logits
        assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "types"), [("samples.npz", SAMPLES), ("predictions.npz", PREDICTIONS)]
)
def test_arrays_of_other_types_are_valid_or_rejected(
    good: Path, tmp_path: Path, name: str, types: dict[str, ArrayType]
) -> None:
    arrays = load_arrays(good / name, types)
    file = tmp_path / name
    for key, array in arrays.items():
        for other in (
            np.array(3), array.astype(str), array.astype(np.float64) * np.nan,
            array.astype(np.int64) - 10**9, array[..., None], np.array([{}]),
            array[:1].repeat(3, axis=0),
        ):  # fmt: skip
            np.savez(file, **{**arrays, key: other})
            with contextlib.suppress(RunError):
                for found in load_arrays(file, types).values():
                    assert found.dtype.kind in "uif"
                    assert np.isfinite(found).all()
