"""Interrupt training, and compare the files of two runs."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet56.data.dataset import Dataset
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import Interrupted, train


def run_until(out: Path, step: int, recipe: Recipe, tiny: Dataset, **options: Any) -> None:
    """Train, and interrupt with Ctrl-C during step `step`."""
    original_step = Trainer.step

    def step_and_stop(self: Trainer, *arguments: Any) -> None:
        original_step(self, *arguments)
        if arguments[-1] + 1 == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_stop)
        with pytest.raises(Interrupted) as caught:
            train(recipe, tiny, out, device="cpu", **options)
    assert caught.value.exit_code == 130


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    measured = ("seconds", "images_per_second", "peak_memory_mb")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that weights, momentum, logs and metrics are identical, except for times."""
    a, b = (RunDirectory(path).load(training=True) for path in (one, other))
    for part in ("model", "training"):
        first, second = getattr(a, part), getattr(b, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [without_times(RunDirectory(path).read_metrics()) for path in (one, other)]
    assert rows[0] == rows[1]
    metrics = [json.loads((path / "evaluation.json").read_text()) for path in (one, other)]
    assert metrics[0] == metrics[1]
