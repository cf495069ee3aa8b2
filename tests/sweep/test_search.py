"""Sweeps in one process: the choice of trials, their training data, and interruptions."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from resnet56.data.dataset import Dataset
from resnet56.errors import TrainingError
from resnet56.progress import LineOutput
from resnet56.recipe import Recipe, from_fields
from resnet56.report import write_report
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.sweep import worker
from resnet56.sweep.search import sweep
from resnet56.sweep.space import Choices, Range
from resnet56.training import Interrupted

pytest.importorskip("optuna")


class Withheld:
    """A test split that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the sweep used {name} of the test images")

    def __len__(self) -> int:
        raise AssertionError("the sweep counted the test images")


def test_a_grid_tries_each_combination_once(
    tiny: Dataset, recipe: Recipe, trained: list[Recipe], tmp_path: Path
) -> None:
    space = {"lr": Choices((0.1, 0.2, 0.3)), "sizes": Choices(((), (16,)))}
    result = sweep(recipe, space, tiny, tmp_path / "s", grid=True, prune=False)
    combinations = [(one.lr, one.sizes) for one in trained]
    assert sorted(combinations) == sorted((lr, s) for lr in (0.1, 0.2, 0.3) for s in ((), (16,)))
    assert len(result["trials"]) == 6
    best = next(trial for trial in result["trials"] if trial["number"] == result["best"])
    assert best["settings"]["lr"] == 0.2
    sweep(recipe, space, tiny, tmp_path / "s", grid=True, prune=False)
    assert len(trained) == 6


def test_later_suggestions_are_better_than_random_ones(
    tiny: Dataset, recipe: Recipe, trained: list[Recipe], tmp_path: Path
) -> None:
    space = {"lr": Range(0.01, 1.0), "momentum": Range(0.0, 0.9)}
    sweep(recipe, space, tiny, tmp_path / "s", trials=30, prune=False)
    distances = [abs(one.lr - 0.2) for one in trained]
    # The first ten values are random. If all 30 were random, half of them would be farther from 0.2
    # than the median.
    middle = sorted(distances[:10])[5]
    assert sum(distance < middle for distance in distances[15:]) >= 12


def test_bad_trials_are_pruned_and_the_value_is_that_of_the_last_epoch(
    tiny: Dataset, recipe: Recipe, trained: list[Recipe], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(recipe, epochs=8)
    space = {"lr": Choices((0.2, 0.3, 0.4, 0.5, 0.6))}
    trials = sweep(recipe, space, tiny, tmp_path / "s", grid=True)["trials"]
    best = next(trial for trial in trials if trial["settings"]["lr"] == 0.2)
    assert best["state"] == "complete"
    assert best["value"] == pytest.approx(0.9 - 0.01 * 0.4)
    assert best["epochs"] == pytest.approx([best["value"] * epoch / 8 for epoch in range(1, 9)])
    rates = [trial["settings"]["lr"] for trial in trials]
    worst = [trial for i, trial in enumerate(trials) if i and rates[i] == max(rates[: i + 1])]
    assert worst
    assert all(trial["state"] == "pruned" and len(trial["epochs"]) == 2 for trial in worst)


def test_a_divergent_trial_is_pruned(
    tiny: Dataset, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(recipe: Recipe, *_: Any, callbacks: Any, **options: Any) -> None:
        if recipe.lr > 0.5:
            raise TrainingError("the loss is not finite")
        callbacks[0]({"epoch": recipe.epochs, "val_accuracy": 0.5})

    monkeypatch.setattr(worker, "train", train)
    result = sweep(recipe, {"lr": Choices((0.1, 0.9))}, tiny, tmp_path / "s", grid=True)
    states = {trial["settings"]["lr"]: trial["state"] for trial in result["trials"]}
    assert states == {0.1: "complete", 0.9: "pruned"}


def test_trials_are_runs_that_use_no_test_images(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    withheld = dataclasses.replace(tiny, test=Withheld())  # type: ignore[arg-type]
    out = tmp_path / "s"
    result = sweep(
        recipe, {"lr": Choices((0.01, 0.05))}, withheld, out, grid=True, prune=False,
        seeds=(0, 1), device="cpu", output=LineOutput(sys.stdout), base=("small", recipe),
    )  # fmt: skip
    for trial in result["trials"]:
        accuracies = []
        for seed in (0, 1):
            run = RunDirectory(out / f"trial-{trial['number']:04d}-seed{seed}")
            fields = json.loads(run.recipe_file.read_text())
            assert from_fields(fields, "recipe") == dataclasses.replace(
                recipe, seed=seed, **trial["settings"]
            )
            rows = run.read_metrics()
            assert len(rows) == recipe.epochs
            assert not run.evaluation_file.exists()
            accuracies.append(rows[-1]["val_accuracy"])
        assert trial["accuracies"] == accuracies
        assert trial["value"] == pytest.approx(sum(accuracies) / 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["trial 0", "trial 1"]

    page = write_report([out]).read_text(encoding="utf-8")
    assert "The test images were not used" in page
    assert result["command"] in page
    assert "95 % interval" in page
    assert write_report([out], format="md").read_text(encoding="utf-8").startswith("# 2 trials")


def test_an_interrupted_trial_continues_from_its_checkpoint(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C interrupts epoch 2 of the second trial. The result does not change."""
    options: dict[str, Any] = {"grid": True, "prune": False, "device": "cpu"}
    space = {"lr": Choices((0.01, 0.05))}
    expected = sweep(recipe, space, tiny, tmp_path / "a" / "s", **options)

    original, steps = Trainer.step, 0

    def step(self: Trainer, *arguments: Any) -> None:
        nonlocal steps
        original(self, *arguments)
        steps += 1
        if steps == 4 * 3 + 6:  # 35 images in batches of 8: 4 steps per epoch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", step)
    out = tmp_path / "b" / "s"
    with pytest.raises(Interrupted):
        sweep(recipe, space, tiny, out, **options)
    interrupted = json.loads((out / "sweep.json").read_text())
    assert sorted(trial["state"] for trial in interrupted["trials"]) == ["complete", "unfinished"]
    result = sweep(recipe, space, tiny, out, **options)
    assert steps == 2 * 4 * 3
    assert result == expected
    assert sorted(path.name for path in out.glob("trial-*")) == ["trial-0000", "trial-0001"]
