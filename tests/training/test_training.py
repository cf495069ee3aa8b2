"""Training: the files of a run, and resuming after an interruption."""

import dataclasses
import json
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from processes import start
from requires_kernels import skip_without_kernel
from resuming import assert_same_run, run_until, without_times
from training_processes import torchrun, train_as_rank, train_until_killed

from resnet56 import cadence
from resnet56.data import augment, batches
from resnet56.data.dataset import Dataset
from resnet56.errors import RunError, TrainingError, UsageError
from resnet56.evaluation import evaluate_run
from resnet56.inference import predict_logits, restore
from resnet56.progress import TrainingDisplay, stream_output
from resnet56.recipe import Recipe, read
from resnet56.report.read import read_run
from resnet56.runs.directory import RunDirectory
from resnet56.step import Trainer
from resnet56.training import Interrupted, train

STEPS = 6  # per epoch: 50 images, batch size 8
DEADLOCK = 300  # seconds; without a limit, processes could wait for each other forever


@pytest.fixture(scope="session")
def uninterrupted(tiny: Dataset, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an uninterrupted run with an EMA."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(dataclasses.replace(small, ema_decay=(0.9,)), tiny, str(out), device="cpu")
    return out


def test_a_run_reduces_the_loss_and_writes_its_files(uninterrupted: Path, tiny: Dataset) -> None:
    files = {path.name for path in uninterrupted.iterdir()}
    assert files == {
        "recipe.json", "environment.json", "metrics.jsonl", "checkpoint", "evaluation.json",
        "predictions.npz", "samples.npz",
    }  # fmt: skip
    rows = RunDirectory(uninterrupted).read_metrics()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [6, 12, 18]
    assert set(rows[0]) == {
        "epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "seconds",
        "peak_memory_mb", "threads",
    }  # fmt: skip
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    evaluation = json.loads((uninterrupted / "evaluation.json").read_text())
    assert evaluation["test"]["n"] == 24
    assert evaluation["train"]["n"] == 50
    assert evaluation["weights"] == "ema"
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["data"] == {"origin": tiny.origin, "source": tiny.source, "flip": True}


def test_accuracies_match_the_saved_weights(uninterrupted: Path, tiny: Dataset) -> None:
    """Compute the metrics from the logits of unaugmented images."""
    evaluation = json.loads((uninterrupted / "evaluation.json").read_text())
    checkpoint = RunDirectory(uninterrupted).load()
    model = restore(checkpoint, torch.device("cpu"))
    pixels = tiny.train.images.double() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    assert checkpoint.config.mean == pytest.approx(mean.tolist(), abs=1e-12)
    assert checkpoint.config.std == pytest.approx(std.tolist(), abs=1e-12)
    for name, split in (("test", tiny.test), ("train", tiny.train)):
        inputs = ((split.images / 255 - mean[:, None, None]) / std[:, None, None]).float()
        with torch.no_grad():
            logits = model(inputs)
        correct = (logits.argmax(1) == split.labels).sum().item()
        assert evaluation[name]["accuracy"] == correct / len(split)
        loss = torch.nn.functional.cross_entropy(logits, split.labels).item()
        assert evaluation[name]["loss"] == pytest.approx(loss, abs=1e-5)


def test_a_run_depends_only_on_its_seed(
    uninterrupted: Path, tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    again = dataclasses.replace(small, ema_decay=(0.9,))
    train(again, tiny, tmp_path / "again", device="cpu")
    assert_same_run(uninterrupted, tmp_path / "again")
    train(dataclasses.replace(again, seed=1), tiny, tmp_path / "other", device="cpu")
    rows = [
        RunDirectory(path).read_metrics()[0]["train_loss"]
        for path in (uninterrupted, tmp_path / "other")
    ]
    assert rows[0] != rows[1]


def test_ctrl_c_stops_a_run_with_one_step_per_epoch(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(small, batch_size=50)
    run_until(tmp_path / "run", 2, recipe, tiny)
    assert RunDirectory(tmp_path / "run").load().progress.epoch == 2


@pytest.mark.parametrize("steps", [[1], [STEPS - 1], [STEPS], [STEPS + 3, 2 * STEPS + 1]])
def test_a_run_resumed_after_ctrl_c_equals_an_uninterrupted_run(
    uninterrupted: Path, tiny: Dataset, small: Recipe, tmp_path: Path, steps: list[int]
) -> None:
    recipe, out = dataclasses.replace(small, ema_decay=(0.9,)), tmp_path / "run"
    for index, step in enumerate(steps):
        run_until(out, step, recipe, tiny, resume=index > 0)
        assert not (out / "evaluation.json").exists()
    train(recipe, tiny, out, device="cpu", resume=True)
    assert_same_run(uninterrupted, out)
    assert len(json.loads((out / "environment.json").read_text())["resumed"]) == len(steps)


def test_native_execution_resumes_bitwise_identically(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(small, precision="bf16", execution="native", sizes=(16,))
    try:
        train(recipe, tiny, tmp_path / "uninterrupted", device="cpu")
    except UsageError as reason:
        skip_without_kernel(reason)
    run_until(tmp_path / "run", 8, recipe, tiny)
    train(recipe, tiny, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        (1, "in a step"),
        (STEPS + 4, "while saving"),
        (2 * STEPS, "between the log and the checkpoint"),
    ],
)
def test_a_run_resumed_after_a_kill_equals_an_uninterrupted_run(
    uninterrupted: Path, tiny: Dataset, small: Recipe, tmp_path: Path, step: int, moment: str
) -> None:
    recipe, out = dataclasses.replace(small, ema_decay=(0.9,)), tmp_path / "run"
    stderr = tmp_path / "stderr"
    process = start(train_until_killed, step, moment, recipe, tiny, out, stderr=stderr)
    process.join()
    assert process.exitcode != 0
    assert stderr.read_bytes() == b""
    train(recipe, tiny, out, device="cpu", resume=True)
    assert_same_run(uninterrupted, out)


def test_a_checkpoint_is_written_within_a_long_epoch(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = RunDirectory.save
    monkeypatch.setattr(cadence, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(
        RunDirectory, "save", lambda self, c: (saved.append(c.progress.step), save(self, c))
    )
    train(dataclasses.replace(small, epochs=1), tiny, tmp_path / "run", device="cpu")
    assert saved == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot open directories")
def test_a_run_that_another_process_trains_is_not_changed(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_until(out, 8, small, tiny)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with (
        RunDirectory(out).locked(),
        pytest.raises(RunError, match="another process is training in"),
    ):
        train(small, tiny, out, device="cpu", resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_records_the_new_location_of_the_data(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    run_until(tmp_path / "run", 8, small, tiny)
    moved = dataclasses.replace(tiny, origin="elsewhere")
    train(small, moved, tmp_path / "run", device="cpu", resume=True)
    assert RunDirectory(tmp_path / "run").data_origin() == "elsewhere"


def test_ctrl_c_during_evaluation_prints_how_to_evaluate(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("resnet56.training.evaluate_run", interrupt)
        with pytest.raises(Interrupted, match="is trained; evaluate it with resume=True"):
            train(small, tiny, out, device="cpu")
    assert train(small, tiny, out, device="cpu", resume=True)["epoch"] == 3


def test_resuming_a_finished_run_only_evaluates_it(
    uninterrupted: Path, tiny: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    recipe = read(uninterrupted / "recipe.json")
    with TrainingDisplay(stream_output(sys.stdout)) as display:
        metrics = train(recipe, tiny, uninterrupted, device="cpu", resume=True, progress=display)
    [message, *_] = capsys.readouterr().out.splitlines()
    assert message == "all epochs are complete; the model is not trained further"
    assert metrics["epoch"] == 3
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_recipe_or_data_set_raises_an_error(
    uninterrupted: Path, tiny: Dataset, small: Recipe
) -> None:
    before = (uninterrupted / "checkpoint" / "checkpoint.json").read_bytes()
    with pytest.raises(
        RunError, match=r"different recipe \(lr 0\.05 -> 0\.1, ema_decay \[0\.9\] -> \[\]\)"
    ):
        train(dataclasses.replace(small, lr=0.1), tiny, uninterrupted, resume=True)
    with pytest.raises(RunError, match="different recipe .*arch resnet8 -> resnet14"):
        train(dataclasses.replace(small, arch="resnet14"), tiny, uninterrupted, resume=True)
    mirrored = dataclasses.replace(tiny, train=tiny.test)
    with pytest.raises(RunError, match="was not trained on"):
        train(read(uninterrupted / "recipe.json"), mirrored, uninterrupted, resume=True)
    with pytest.raises(RunError, match="already contains a run"):
        train(small, tiny, uninterrupted)
    assert (uninterrupted / "checkpoint" / "checkpoint.json").read_bytes() == before


def test_a_run_continues_in_eager_mode_without_a_compiler(
    tiny: Dataset,
    small: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_until(tmp_path / "run", 7, small, tiny)
    original = json.loads((tmp_path / "run" / "environment.json").read_text())
    if original["execution"] != "fused":
        pytest.skip(original["execution_reason"])
    monkeypatch.setenv("CC", "no-such-compiler")
    with TrainingDisplay(stream_output(sys.stdout)) as display:
        train(small, tiny, tmp_path / "run", device="cpu", resume=True, progress=display)
    printed = capsys.readouterr().out
    assert "resuming with fp32 eager instead of fp32 fused" in printed
    assert "training is slower than necessary: " in printed
    reason = "the C compiler 'no-such-compiler' was not found"
    assert f"{reason}; install gcc, or set CC to a C compiler" in printed
    [resumed] = json.loads((tmp_path / "run" / "environment.json").read_text())["resumed"]
    assert resumed["execution"] == "eager"
    assert "was not found" in resumed["execution_reason"]


def test_resuming_a_missing_run_raises_an_error(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="no run found at"):
        train(small, tiny, tmp_path / "none", resume=True)


@pytest.mark.parametrize("val_size", [0, 6])
def test_a_non_finite_running_variance_does_not_replace_the_checkpoint(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val_size: int
) -> None:
    """Losses and parameters are finite, as with a learning rate that is far too high."""
    original_step = Trainer.step

    def failing_step(self: Trainer, images: torch.Tensor, *rest: Any) -> None:
        original_step(self, images, *rest)
        if rest[-1] == 8:
            self.model.bn1.running_var[3] = torch.nan

    recipe = dataclasses.replace(small, val_size=val_size)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing_step)
        message = r"diverged at step \d+: .*not finite.*; the last good checkpoint is in"
        with pytest.raises(TrainingError, match=message):
            train(recipe, tiny, out, device="cpu")
    assert RunDirectory(out).load(training=True).progress.epoch == 1
    resumed = train(recipe, tiny, out, device="cpu", resume=True)
    uninterrupted = train(recipe, tiny, tmp_path / "uninterrupted", device="cpu")
    assert resumed["test"] == uninterrupted["test"]


def test_a_full_disk_before_the_first_checkpoint_does_not_suggest_resuming(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise RunError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("resnet56.runs.checkpoint.write_bytes", full)
    with pytest.raises(RunError, match="start training again"):
        train(small, tiny, tmp_path / "run", device="cpu")


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 9, the third step of epoch 2, is infinite."""
    original_step = Trainer.step

    def failing_step(self: Trainer, images: torch.Tensor, *rest: Any) -> None:
        original_step(self, images * (float("inf") if rest[-1] + 1 == 9 else 1), *rest)

    monkeypatch.setattr(Trainer, "step", failing_step)
    with pytest.raises(TrainingError, match="not finite in epoch 2, step 9, at learning rate 0.0"):
        train(small, tiny, tmp_path / "run", device="cpu")
    run = RunDirectory(tmp_path / "run")
    checkpoint = run.load(training=True)
    assert checkpoint.progress.epoch == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    assert len(run.read_metrics()) == 1


def test_validation_images_are_evaluated_each_epoch_and_not_trained_on(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(small, epochs=2, val_size=11)
    metrics = train(recipe, tiny, tmp_path / "run", device="cpu")
    assert (metrics["validation"]["n"], metrics["train"]["n"]) == (11, 39)
    rows = RunDirectory(tmp_path / "run").read_metrics()
    assert rows[-1]["val_accuracy"] == metrics["validation"]["accuracy"]
    assert rows[-1]["val_loss"] == pytest.approx(metrics["validation"]["loss"], abs=1e-6)
    with pytest.raises(UsageError):
        train(dataclasses.replace(small, val_size=50), tiny, tmp_path / "all", device="cpu")
    assert not (tmp_path / "all").exists()


def test_a_run_can_be_evaluated_later(tiny: Dataset, small: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(small, epochs=1, val_size=11)
    expected = train(recipe, tiny, tmp_path / "evaluated", device="cpu")
    run = RunDirectory(tmp_path / "run")
    assert train(recipe, tiny, run.path, device="cpu", evaluate=False) == {}
    assert not run.evaluation_file.exists()
    [row] = run.read_metrics()
    assert row["val_accuracy"] == expected["validation"]["accuracy"]
    assert evaluate_run(run, tiny, device=torch.device("cpu"), val_size=11) == expected
    with pytest.raises(UsageError, match="test_every_epoch=True uses the test images"):
        train(recipe, tiny, run.path, device="cpu", evaluate=False, test_every_epoch=True)


def test_recording_the_test_accuracy_of_each_epoch_does_not_change_training(
    uninterrupted: Path, tiny: Dataset, tmp_path: Path
) -> None:
    recipe = read(uninterrupted / "recipe.json")
    metrics = train(recipe, tiny, tmp_path / "run", device="cpu", test_every_epoch=True)
    run, plain = RunDirectory(tmp_path / "run"), RunDirectory(uninterrupted)
    rows = run.read_metrics()
    assert [0 <= row["test_accuracy"] <= 1 for row in rows] == [True] * 3
    assert rows[-1]["test_accuracy"] == metrics["test"]["accuracy"]
    assert rows[-1]["test_loss"] == pytest.approx(metrics["test"]["loss"], abs=1e-6)
    others = [{k: v for k, v in row.items() if not k.startswith("test_")} for row in rows]
    assert without_times(others) == without_times(plain.read_metrics())
    first, second = run.load().model, plain.load().model
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("allow_flip", [True, False])
def test_images_are_flipped_only_if_the_data_set_allows_it(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_flip: bool
) -> None:
    drawn: list[bool] = []

    def spy(*arguments: Any) -> augment.AugmentationParams:
        drawn.append(bool(sample_params(*arguments).flips.any()))
        return sample_params(*arguments)

    sample_params = augment.sample_params
    monkeypatch.setattr(batches, "sample_params", spy)
    dataset = dataclasses.replace(tiny, allow_flip=allow_flip)
    train(dataclasses.replace(small, epochs=1), dataset, tmp_path / "run", device="cpu")
    assert drawn == [allow_flip]
    assert read_run(tmp_path / "run").flips == allow_flip


def test_the_ema_with_the_best_validation_accuracy_is_selected(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    decays = (0.2, 0.9, 0.9999)  # with the last decay, statistics are re-estimated
    several = dataclasses.replace(small, lr=0.02, ema_decay=decays, val_size=11)
    train(several, tiny, tmp_path / "uninterrupted", device="cpu")
    run_until(tmp_path / "run", STEPS + 1, several, tiny)
    metrics = train(several, tiny, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")

    selected = RunDirectory(tmp_path / "run").load()
    best = metrics["ema_decay"]
    assert selected.metadata["ema_decay"] == best
    candidates = metrics["ema_candidates"]
    assert [(one["decay"], one["reestimated"]) for one in candidates] == [
        (0.2, False), (0.9, False), (0.9999, True),
    ]  # fmt: skip
    top = max(one["val_accuracy"] for one in candidates)
    assert metrics["validation"]["accuracy"] == top
    assert RunDirectory(tmp_path / "run").read_metrics()[-1]["val_accuracy"] == top
    for one in candidates:
        single = dataclasses.replace(several, ema_decay=(one["decay"],))
        out = tmp_path / str(one["decay"])
        alone = train(single, tiny, out, device="cpu")
        assert alone["ema_decay"] == one["decay"]
        assert one["val_accuracy"] == alone["validation"]["accuracy"]
        assert one["val_loss"] == pytest.approx(alone["validation"]["loss"], abs=1e-6)
        if one["decay"] == best:
            second = RunDirectory(out).load().model
            assert all(torch.equal(second[name], selected.model[name]) for name in second)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "ricap"])
def test_training_with_mixed_images_resumes_bitwise_identically(
    tiny: Dataset, small: Recipe, tmp_path: Path, mix: Any
) -> None:
    recipe = dataclasses.replace(small, mix=mix, mix_probability=0.7, plain_tail=1)
    train(recipe, tiny, tmp_path / "uninterrupted", device="cpu")
    run_until(tmp_path / "run", STEPS + 2, recipe, tiny)
    train(recipe, tiny, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")
    rows = RunDirectory(tmp_path / "run").read_metrics()
    # Predictions count fractionally in mixed epochs, but not in the plain tail.
    correct = [48 * row["train_accuracy"] for row in rows]
    assert any(abs(count - round(count)) > 1e-6 for count in correct[:-1])
    assert correct[-1] == pytest.approx(round(correct[-1]), abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_resumes(
    tiny: Dataset, small: Recipe, tmp_path: Path, precision: Any
) -> None:
    recipe = dataclasses.replace(small, epochs=2, sizes=(16,), precision=precision)
    train(recipe, tiny, tmp_path / "uninterrupted", device="cpu")
    run_until(tmp_path / "run", STEPS + 2, recipe, tiny)
    train(recipe, tiny, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "run")


def test_each_epoch_prints_one_line_without_a_terminal(
    tiny: Dataset, small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingDisplay(stream_output(sys.stdout)) as display:
        train(small, tiny, tmp_path / "run", device="cpu", progress=display)
    hint, *lines = capsys.readouterr().out.splitlines()
    assert "only 18 steps, which is rarely enough for random weights" in hint
    assert [line.split("  ")[0] for line in lines[:3]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    row = RunDirectory(tmp_path / "run").read_metrics()[2]
    assert f"loss {row['train_loss']:.4f}" in lines[2]
    assert max(map(len, lines)) <= 80


def test_training_reports_that_the_plain_tail_covers_all_epochs(
    tiny: Dataset, small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tail, epochs, cutout in ((1, 1, 8), (1, 2, 8), (1, 1, 0)):
        recipe = dataclasses.replace(small, epochs=epochs, plain_tail=tail, cutout=cutout)
        out = tmp_path / f"{epochs}-{cutout}"
        with TrainingDisplay(stream_output(sys.stdout)) as display:
            train(recipe, tiny, out, device="cpu", evaluate=False, progress=display)
        shown = capsys.readouterr().out
        reported = "plain_tail=1 disables mixing, Cutout and TrivialAugment in all epochs" in shown
        assert reported == (epochs == 1 and cutout == 8)


def test_missing_tensorboard_raises_an_error_before_the_run_is_created(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'resnet56\[tensorboard\]'"):
        train(small, tiny, tmp_path / "run", device="cpu", tensorboard=True)
    assert not (tmp_path / "run").exists()


def launch_with_torchrun(job: dict[str, Any], directory: Path) -> None:
    """Start the ranks as `torchrun` does, but fork them instead of importing PyTorch again."""
    (directory / "job").write_bytes(pickle.dumps(job))
    script = [training_processes.__file__, str(directory / "job")]
    options = ["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=forkserver"]
    stderr = directory / "stderr-torchrun"
    launcher = start(torchrun, [*options, *script], stderr=stderr, daemon=False)
    launcher.join(DEADLOCK)
    launcher.kill()
    launcher.join()
    assert launcher.exitcode == 0, stderr.read_text()


def launch(job: dict[str, Any], directory: Path) -> None:
    """Start the ranks without torchrun, whose processes would each import PyTorch."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        start(train_as_rank, job, world | {"RANK": rank}, stderr=directory / f"stderr-{rank}")
        for rank in "01"
    ]
    waiting = {process.sentinel: process for process in ranks}
    while waiting:
        ended = wait(waiting, DEADLOCK)
        failed = [waiting.pop(sentinel).exitcode for sentinel in ended] != [0] * len(ended)
        if failed or not ended:
            break
    for process in ranks:
        process.kill()
        process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [0, 0], [(directory / f"stderr-{rank}").read_text() for rank in "01"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes_match_one_process_and_resume(
    tiny: Dataset, small: Recipe, tmp_path: Path
) -> None:
    """Two ranks on gloo have the same global batches and synchronized batch norm."""

    def train_in_two_processes(
        launch: Callable[[dict[str, Any], Path], None],
        out: Path,
        saves: list[int],
        stop: int | None = None,
        *,
        resume: bool = False,
    ) -> None:
        """Train in two processes that must both save after the steps in `saves`."""
        job = {"recipe": recipe, "dataset": tiny, "out": out, "resume": resume}
        launch(job | {"saves": saves, "stop": stop}, tmp_path)

    # The learning rate is low, because each step amplifies rounding differences.
    # Some batches are mixed with partners from the other process.
    recipe = dataclasses.replace(small, epochs=2, lr=0.001, mix="cutmix", mix_probability=0.5)
    train(recipe, tiny, tmp_path / "one", device="cpu")
    train_in_two_processes(launch_with_torchrun, tmp_path / "two", [0, 2, 4, 6, 8, 10, 12])
    one, two = (RunDirectory(tmp_path / name) for name in ("one", "two"))
    rows = [without_times(run.read_metrics()) for run in (one, two)]
    assert len(rows[1]) == 2
    for first, second in zip(*rows, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    first, second = one.load().model, two.load().model
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)
    train_in_two_processes(launch, tmp_path / "stopped", [0, 2, 4, 6, 8, 10], stop=9)
    train_in_two_processes(launch, tmp_path / "stopped", [12], resume=True)
    assert_same_run(tmp_path / "two", tmp_path / "stopped")


def test_logits_do_not_depend_on_the_batch_size(uninterrupted: Path, tiny: Dataset) -> None:
    checkpoint = RunDirectory(uninterrupted).load()
    model = restore(checkpoint, torch.device("cpu"))
    config = checkpoint.config
    results = [
        predict_logits(model, tiny.test.images, config.mean, config.std, batch=batch)
        for batch in (1, 7, 64)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
