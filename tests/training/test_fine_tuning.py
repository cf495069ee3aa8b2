"""Starting from trained weights, freezing layers, and other optimizers."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_same_run, run_until

from resnet56.data.dataset import Dataset
from resnet56.errors import RunError, UsageError
from resnet56.recipe import Recipe
from resnet56.report.page import normalization
from resnet56.report.read import read_run
from resnet56.runs.directory import RunDirectory
from resnet56.training import train


@pytest.fixture(scope="module")
def trained(tiny: Dataset, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a network on `tiny`. Other runs start from its weights."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(dataclasses.replace(small, epochs=1), tiny, out, device="cpu")
    return out


@pytest.fixture(scope="module")
def other_classes(tiny: Dataset) -> Dataset:
    """Return `tiny` with other class names and darker images."""
    train = dataclasses.replace(tiny.train, images=tiny.train.images // 2)
    return dataclasses.replace(tiny, classes=("a", "b", "c"), train=train)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(RunDirectory(run).load().model)


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw", "lr": 1e-3},
        {"optimizer": "adamw", "lr": 1e-3, "ema_decay": (0.9,)},
        {"weights": "RUN", "freeze": ("conv1", "bn1", "stage1")},
        {"weights": "RUN", "freeze": ("body",), "ema_decay": (0.2, 0.9999), "val_size": 11},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: Dataset, small: Recipe, trained: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """Resuming does not require the source of the initial weights."""
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    if "weights" in fields:
        fields = fields | {"weights": str(source)}
    recipe = dataclasses.replace(small, **fields)
    train(recipe, tiny, tmp_path / "uninterrupted", device="cpu")
    run_until(tmp_path / "run", 8, recipe, tiny)
    shutil.rmtree(source)
    train(recipe, tiny, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")


def test_training_starts_from_the_weights(
    tiny: Dataset, small: Recipe, trained: Path, tmp_path: Path
) -> None:
    """With a tiny learning rate and without momentum, the weights hardly change."""
    recipe = dataclasses.replace(
        small, epochs=1, lr=1e-9, weight_decay=0.0, weights=str(trained), seed=5
    )
    train(recipe, tiny, tmp_path / "run", device="cpu")
    after = weights_of(tmp_path / "run")
    for name, before in weights_of(trained).items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after[name], before, rtol=0, atol=1e-6)
    run = RunDirectory(tmp_path / "run")
    recorded = run.load().metadata["initial_weights"]
    assert json.loads(run.environment_file.read_text())["initial_weights"] == recorded
    assert (recorded["weights"], recorded["arch"]) == (str(trained), "resnet8")
    assert recorded["new_classifier"] is False


def test_the_classifier_is_new_if_the_classes_differ(
    tiny: Dataset, other_classes: Dataset, small: Recipe, trained: Path, tmp_path: Path
) -> None:
    """The other layers are frozen, and the normalization of the images does not change."""
    recipe = dataclasses.replace(small, epochs=1, weights=str(trained), freeze=("body",), seed=5)
    train(recipe, other_classes, tmp_path / "run", device="cpu")
    before, after = weights_of(trained), weights_of(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert after["fc.weight"].abs().max() < 0.5 * before["fc.weight"].abs().max()
    checkpoint = RunDirectory(tmp_path / "run").load()
    assert checkpoint.config.mean == RunDirectory(trained).load().config.mean
    assert checkpoint.config.classes == ("a", "b", "c")
    assert checkpoint.metadata["initial_weights"]["new_classifier"] is True


def test_frozen_layers_keep_their_batch_norm_statistics(
    tiny: Dataset, small: Recipe, trained: Path, tmp_path: Path
) -> None:
    """With an EMA decay of 0.9999, training re-estimates the statistics of the other layers."""
    recipe = dataclasses.replace(
        small, epochs=1, weights=str(trained), freeze=("stage1", "stage2.0"), ema_decay=(0.9999,)
    )
    train(recipe, tiny, tmp_path / "run", device="cpu")
    before, after = weights_of(trained), weights_of(tmp_path / "run")
    frozen = ("stage1.", "stage2.0.")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith(frozen)}


def test_the_report_names_the_weights_that_define_the_normalization(
    tiny: Dataset, small: Recipe, trained: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(small, epochs=1, weights=str(trained))
    train(recipe, tiny, tmp_path / "run", device="cpu")
    assert normalization(read_run(trained)) == "of the training images"
    assert normalization(read_run(tmp_path / "run")) == f"of {trained}, the initial weights"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"weights": "none"}, RunError, "none is neither a run nor a pretrained model"),
        ({"arch": "resnet14"}, UsageError, 'belong to resnet8, but .* set arch="resnet8"'),
        ({"freeze": ("stage9",)}, UsageError, "no layer 'stage9'; choose conv1, bn1, stage1"),
        ({"freeze": ("body", "fc")}, UsageError, "leaves no layer to train"),
        ({"freeze": ("body",), "weights": ""}, UsageError, "freeze requires weights"),
    ],
    ids=str,
)
def test_invalid_initial_weights_raise_an_error_and_leave_no_files(
    tiny: Dataset, small: Recipe, trained: Path, tmp_path: Path,
    fields: dict[str, Any], error: type[Exception], message: str,
) -> None:  # fmt: skip
    recipe = dataclasses.replace(small, **({"weights": str(trained)} | fields))
    with pytest.raises(error, match=message) as caught:
        train(recipe, tiny, tmp_path / "run", device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_resuming_with_more_epochs_suggests_starting_from_the_weights(
    tiny: Dataset, small: Recipe, trained: Path
) -> None:
    with pytest.raises(RunError, match=r"epochs 1 -> 3.* to train longer, .*weights=\".*run\""):
        train(small, tiny, trained, device="cpu", resume=True)


def test_native_execution_is_not_used_with_frozen_layers(
    tiny: Dataset, small: Recipe, trained: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(small, epochs=1, weights=str(trained), freeze=("conv1",))
    recipe = dataclasses.replace(recipe, precision="bf16", execution="native")
    with pytest.raises(UsageError, match="native execution is not available: it does not support"):
        train(recipe, tiny, tmp_path / "run", device="cpu")
