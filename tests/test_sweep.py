"""Sweeps: the choice of trials, their training data, and interruptions."""

import dataclasses
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start

from resnet56 import cli
from resnet56.cli.sweep import parse_space
from resnet56.data.dataset import Dataset
from resnet56.errors import RunError, TrainingError, UsageError
from resnet56.progress import LineOutput
from resnet56.recipe import RECIPES, Recipe, from_fields
from resnet56.report import write_report
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import Interrupted

sweeps = pytest.importorskip("resnet56.sweep")
pytest.importorskip("optuna")

Choices, Range, sweep = sweeps.Choices, sweeps.Range, sweeps.sweep

Accuracy = Callable[[Recipe, int], float]  # takes a recipe and an epoch


@pytest.fixture
def recipe(small: Recipe) -> Recipe:
    return dataclasses.replace(small, val_size=15)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Replace training with a function of the recipe, and return the list of trained recipes."""
    recipes: list[Recipe] = []

    def train(recipe: Recipe, dataset: Dataset, out: Path, **options: Any) -> None:
        recipes.append(recipe)
        for epoch in range(1, recipe.epochs + 1):
            # The best learning rate is 0.2. Momentum matters less.
            accuracy = 0.9 - abs(recipe.lr - 0.2) - 0.01 * abs(recipe.momentum - 0.5)
            options["callbacks"][0](
                {"epoch": epoch, "val_accuracy": accuracy * epoch / recipe.epochs}
            )

    monkeypatch.setattr(sweeps, "train", train)
    return recipes


class Withheld:
    """A test split that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the sweep used {name} of the test images")

    def __len__(self) -> int:
        raise AssertionError("the sweep counted the test images")


def test_values_are_parsed_by_the_type_of_their_field() -> None:
    texts = (
        "lr=0.05..0.4:log", "batch-size=8..64", "epochs=2,3", "nesterov=true,false",
        "schedule=step,one-cycle", "drop_epochs=10 20,15,",
    )  # fmt: skip
    assert parse_space(texts) == {
        "lr": Range(0.05, 0.4, log=True),
        "batch_size": Range(8, 64),
        "epochs": Choices((2, 3)),
        "nesterov": Choices((True, False)),
        "schedule": Choices(("step", "one-cycle")),
        "drop_epochs": Choices(((10.0, 20.0), (15.0,), ())),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "expected FIELD=LOW..HIGH"),
        ("weight-decy=1,2", "did you mean weight_decay?"),
        ("lr=0.1..x", "expected a finite number, not 'x'"),
        ("lr=0.1..0.2:exp", "expected :log"),
        ("lr=0.4..0.1", "lr: the range 0.4..0.1 is empty"),
        ("lr=0..0.1:log", "must begin above 0"),
        ("lr=-1,0.1", "lr must be above 0"),
        ("epochs=1.5,2", "expected an integer"),
        ("nesterov=yes", "expected true or false"),
        ("schedule=linear", "is not one of step, cosine, one-cycle"),
        ("schedule=step..cosine", "is not one of"),
        ("lr=0.1,0.1", "listed twice"),
        ("arch=resnet57,resnet56", "depth 57"),
        ("seed=1,2", "seed cannot vary in a sweep; use --seeds"),
    ],
)
def test_an_invalid_value_causes_a_one_line_error(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "quick", "--val-size", "200", "--out", str(tmp_path / "s"), "--vary", text]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", "lr=0.1..0.2"], "set --val-size 5000"),
        (["--val-size", "200"], "use --vary"),
        (["--val-size", "200", "--vary", "lr=0.1..0.2", "--grid"], "needs a list of values for lr"),
        (["--val-size", "200", "--vary", "lr=0.1,0.2", "--grid", "--trials", "3"], "omit --trials"),
        (
            ["--val-size", "200", "--vary", "nesterov=true,false", "--vary", "momentum=0,0.9"],
            "the combination nesterov true, momentum 0 is invalid",
        ),
        (["--val-size", "200", "--vary", "lr=0.1,0.2", "--seeds", "1", "1"], "must be different"),
        (["--val-size", "200", "--vary", "lr=0.1,0.2", "--trials", "0"], "at least 1"),
        (
            ["--val-size", "200", "--vary", "lr=0.1,0.2", "--storage", "nonsense"],
            "must be a URL such as postgresql://",
        ),
    ],
)
def test_an_invalid_option_causes_a_one_line_error(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", "quick", "--out", str(tmp_path / "s"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_storage_that_does_not_answer_causes_a_one_line_error(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    with socket.socket() as unused:  # the port is bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://user:secret@127.0.0.1:{unused.getsockname()[1]}/name"
        with pytest.raises(RunError, match="does not respond") as caught:
            sweep(recipe, {"lr": Choices((0.1,))}, tiny, tmp_path / "s", storage=url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_a_trial_is_not_trained_if_another_worker_makes_it_unnecessary() -> None:
    """Two workers can start a trial at the same time, when only one is missing."""
    import optuna

    worker = object.__new__(sweeps._Worker)
    worker.study, worker.total, worker.unique = optuna.create_study(), 2, False
    trials = [worker.study.ask() for _ in range(3)]
    assert [worker._is_surplus(trial) for trial in trials] == [False, False, True]

    worker.study, worker.total, worker.unique = optuna.create_study(), 3, True  # as in a grid
    surplus = []
    for value in (1, 2, 1):
        worker.study.enqueue_trial({"cutout": value})
        trial = worker.study.ask()
        trial.suggest_categorical("cutout", [1, 2])
        surplus.append(worker._is_surplus(trial))
    assert surplus == [False, False, True]


def test_later_suggestions_are_better_than_random_ones(
    tiny: Dataset, recipe: Recipe, trained: list[Recipe], tmp_path: Path
) -> None:
    space = {"lr": Range(0.01, 1.0), "momentum": Range(0.0, 0.9)}
    sweep(recipe, space, tiny, tmp_path / "s", trials=30, prune=False)
    distances = [abs(one.lr - 0.2) for one in trained]
    # The first ten values are random. If all 30 were, half would be farther than their median.
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

    monkeypatch.setattr(sweeps, "train", train)
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


def test_a_sweep_with_other_settings_is_rejected(
    tiny: Dataset, recipe: Recipe, trained: list[Recipe], tmp_path: Path
) -> None:
    space, out = {"lr": Choices((0.1, 0.2))}, tmp_path / "s"
    sweep(recipe, space, tiny, out, grid=True)
    other = dataclasses.replace(recipe, momentum=0.5)
    smaller = dataclasses.replace(tiny, train=dataclasses.replace(
        tiny.train, images=tiny.train.images[:48], labels=tiny.train.labels[:48]))  # fmt: skip
    calls: dict[str, tuple[Recipe, Any, Dataset, dict[str, Any]]] = {
        "another recipe (momentum 0.9 -> 0.5)": (other, space, tiny, {}),
        "other values to vary": (recipe, {"lr": Choices((0.1, 0.3))}, tiny, {}),
        "other data": (recipe, space, smaller, {}),
        "other seeds (0)": (recipe, space, tiny, {"seeds": (0, 1)}),
    }
    for message, (changed, values, data, options) in calls.items():
        for remove in (False, True):  # the directory, and then the database
            if remove:
                (out / "sweep.json").rename(tmp_path / "sweep.json")
            with pytest.raises(UsageError) as caught:
                sweep(changed, values, data, out, grid=True, **options)
            assert message in str(caught.value)
            if remove:
                (tmp_path / "sweep.json").rename(out / "sweep.json")
    assert len(trained) == 2


def test_a_directory_with_other_files_is_rejected(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="contains files such as thesis.tex"):
        sweep(recipe, {"lr": Choices((0.1,))}, tiny, tmp_path)


def test_the_command_of_the_best_trial_trains_without_validation_images() -> None:
    winner = dataclasses.replace(
        RECIPES["fast"], val_size=5000, lr=0.25, sizes=(16, 16), nesterov=False, seed=3
    )
    command = sweeps.train_command(("fast", RECIPES["fast"]), winner, "my data")
    assert command == (
        "resnet56 train fast --data 'my data' --lr 0.25 --no-nesterov --sizes 16 16 --seed 3"
    )


# Several processes


def work(dataset: Dataset, out: Path, storage: str, machine: str, last_step: int) -> None:
    """Run a worker that pretends to run on a machine and hangs after a step."""
    original_step = Trainer.step

    def step(self: Trainer, *arguments: Any) -> None:
        if arguments[-1] == last_step:
            time.sleep(600)
        original_step(self, *arguments)

    platform.node = lambda: machine
    Trainer.step = step
    recipe = Recipe(
        arch="resnet8", epochs=3, batch_size=8, lr=0.05, schedule="cosine", precision="fp32",
        execution="eager", val_size=15,
    )  # fmt: skip
    sweep(
        recipe, {"lr": Choices((1e-6, 0.05)), "momentum": Choices((0.8, 0.9))}, dataset, out,
        grid=True, prune=False, storage=storage, device="cpu", threads=1, heartbeat=1,
        output=LineOutput(sys.stderr),
    )  # fmt: skip


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server on a local socket, and yield the URL of a database."""
    directories = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    tools = str(directories[-1]) if directories else os.path.dirname(shutil.which("initdb") or "")  # noqa: PTH120
    if not tools:
        pytest.skip("PostgreSQL is not installed (initdb)")
    root = os.geteuid() == 0
    if root and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and runuser is missing")
    # The path of a socket must be short.
    directory = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    prefix = ["runuser", "-u", "postgres", "--"] if root else []
    if root:
        shutil.chown(directory, "postgres")

    def tool(name: str, *arguments: str) -> None:
        subprocess.run([*prefix, f"{tools}/{name}", *arguments], check=True, capture_output=True,
                       cwd=directory)  # fmt: skip

    data = str(directory / "data")
    tool("initdb", "-D", data, "-U", "sweep", "-A", "trust", "-N")
    server = f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=off"
    tool("pg_ctl", "-D", data, "-l", str(directory / "log"), "-w", "-o", server, "start")
    try:
        yield f"postgresql://sweep@/postgres?host={directory}"
    finally:
        tool("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(directory)


@pytest.mark.parametrize("shared", [True, False], ids=["shared directory", "two machines"])
def test_another_worker_finishes_the_trial_of_a_killed_one(
    postgresql: str, tiny: Dataset, tmp_path: Path, shared: bool
) -> None:
    """Two workers share a PostgreSQL database, and one is killed during its first trial."""
    first = tmp_path / "one" / f"sweep-{shared}"
    second = first if shared else tmp_path / "two" / first.name
    outputs = tmp_path / "killed", tmp_path / "other"
    killed = start(work, tiny, first, postgresql, "one", 6, stderr=outputs[0])  # hangs in epoch 2
    deadline = time.monotonic() + 120
    while not list(first.glob("trial-*/metrics.jsonl")):  # its first epoch is finished
        assert killed.is_alive(), outputs[0].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    machine = "one" if shared else "two"
    other = start(work, tiny, second, postgresql, machine, -1, stderr=outputs[1])
    while not list(second.glob("trial-0001/metrics.jsonl")):
        assert other.is_alive(), outputs[1].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()  # SIGKILL
    killed.join()
    other.join(120)
    assert other.exitcode == 0, outputs[1].read_text()
    result = json.loads((second / "sweep.json").read_text())
    assert [trial["state"] for trial in result["trials"]] == ["complete"] * 4
    settings = {(t["settings"]["lr"], t["settings"]["momentum"]) for t in result["trials"]}
    assert settings == {(lr, momentum) for lr in (1e-6, 0.05) for momentum in (0.8, 0.9)}
    best = max(result["trials"], key=lambda trial: trial["value"])
    assert result["best"] == best["number"]
    assert best["settings"]["lr"] == 0.05
    if shared:  # the killed run was continued
        record = json.loads((first / "trial-0000" / "environment.json").read_text())
        assert len(record["resumed"]) == 1
