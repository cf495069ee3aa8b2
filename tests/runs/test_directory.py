"""The run directory: files are written atomically, and damage is detected."""

import errno
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from resnet56.errors import Error, NotFiniteError, RunError
from resnet56.files import read_json, to_json, unused_path, write_json, write_text
from resnet56.metrics import compute_metrics
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, Progress
from resnet56.runs.directory import RunDirectory

ROW = {
    "epoch": 1, "step": 7, "lr": 0.1, "train_loss": 0.5, "train_accuracy": 0.5,
    "images_per_second": 9.0, "seconds": 2,
}  # fmt: skip
COMPARISON = {
    "a": "a", "b": "b", "images": 4, "accuracy_a": 0.5, "accuracy_b": 0.25, "changed": 1,
    "median_difference": 0.1, "largest_difference": 0.2, "verdict": "One image of four changes.",
}  # fmt: skip
NETWORK = ModelConfig("resnet8", ("a", "b"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def checkpoint(step: int = 7) -> Checkpoint:
    return Checkpoint(
        NETWORK,
        model={"w": torch.arange(6.0).reshape(2, 3) / 7, "n": torch.tensor(step)},
        training={"momentum.w": torch.full((2, 3), 1 / 3)},
        progress=Progress(epoch=1, step=step, epoch_step=3, loss_sum=1 / 3, correct=5, images=24),
        metadata={"precision": "fp32"},
    )


def test_a_checkpoint_round_trips_exactly(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    saved = checkpoint()
    run.save(saved)
    loaded = run.load(training=True)
    assert loaded.config == saved.config
    assert loaded.progress == saved.progress
    assert loaded.metadata == saved.metadata
    for part in ("model", "training"):
        for name, tensor in getattr(saved, part).items():
            assert torch.equal(getattr(loaded, part)[name], tensor)


def test_channels_last_weights_keep_their_values(tmp_path: Path) -> None:
    weights = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    run = RunDirectory(tmp_path)
    run.save(Checkpoint(NETWORK, model={"w": weights}))
    assert torch.equal(run.load().model["w"], weights)


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.save(checkpoint(step=7))
    run.save(checkpoint(step=8))
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == [
        "checkpoint.json",
        "model-00000008.safetensors",
        "training-00000008.safetensors",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("part", "name"), [("model", "w"), ("training", "momentum.w")])
def test_a_non_finite_checkpoint_does_not_replace_a_finite_one(
    tmp_path: Path, part: str, name: str, value: float
) -> None:
    run = RunDirectory(tmp_path)
    run.save(checkpoint(step=7))
    bad = checkpoint(step=8)
    getattr(bad, part)[name][0, 1] = value
    with pytest.raises(NotFiniteError, match=f"not finite in {name}"):
        run.save(bad)
    assert run.load(training=True).progress.step == 7
    assert len(list((tmp_path / "checkpoint").iterdir())) == 3


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is replaced twice, between reading checkpoint.json and its tensors."""
    run = RunDirectory(tmp_path)
    run.save(checkpoint(step=7))
    steps, read_bytes = [8, 9], Path.read_bytes

    def replacing(path: Path) -> bytes:
        if steps and path.suffix == ".safetensors":
            run.save(checkpoint(step=steps.pop(0)))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", replacing)
    loaded = run.load(training=True)
    assert loaded.progress.step == 9
    assert loaded.model["n"] == 9


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_crash_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    """The disk is full after zero, one or two tensor files are written."""
    run = RunDirectory(tmp_path)
    run.save(checkpoint(step=7))
    written = 0
    replace = Path.replace

    def full_disk(self: Path, target: Path) -> Path:
        nonlocal written
        written += 1
        if written > survivors:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(RunError, match=r"No space left on device.*unchanged") as caught:
        run.save(checkpoint(step=8))
    assert "\n" not in str(caught.value)
    assert run.load(training=True).progress.step == 7
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("part", ["model", "training"])
def test_one_flipped_bit_is_detected(tmp_path: Path, part: str) -> None:
    run = RunDirectory(tmp_path)
    run.save(checkpoint())
    file = next((tmp_path / "checkpoint").glob(f"{part}-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=f"{file.name} is damaged"):
        run.load(training=True)


def test_the_error_about_a_missing_tensor_file_names_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.save(checkpoint())
    (tmp_path / "checkpoint" / "model-00000007.safetensors").unlink()
    with pytest.raises(RunError, match=r"cannot read .*model-00000007\.safetensors"):
        run.load()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", '{"format": 1, "config": {"arch": 3}}', '{"format": "x"}']
)
def test_a_damaged_checkpoint_json_causes_a_one_line_error(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.save(checkpoint())
    run.checkpoint_file.write_text(text)
    with pytest.raises(RunError, match="damaged") as caught:
        run.load()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cannot_refer_to_a_file_outside_its_directory(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.save(checkpoint())
    head = read_json(run.checkpoint_file)
    head["files"]["model"]["name"] = "../../outside.safetensors"
    run.checkpoint_file.write_text(json.dumps(head))
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match=r"files\.model\.name"):
        run.load()


def test_the_error_about_a_newer_format_suggests_an_update(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.save(checkpoint())
    head = read_json(run.checkpoint_file) | {"format": 99}
    run.checkpoint_file.write_text(json.dumps(head))
    with pytest.raises(RunError, match="format 99, but this version.*update resnet56"):
        run.load()


def test_a_missing_run_and_a_missing_checkpoint_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run found at"):
        RunDirectory(tmp_path / "none").load()
    with pytest.raises(RunError, match="has no checkpoint"):
        RunDirectory(tmp_path).load()


def test_a_run_is_created_only_in_a_new_or_empty_directory(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "a" / "b").create()
    assert (tmp_path / "a" / "b").is_dir()
    RunDirectory(tmp_path / "a" / "b").create()

    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match="file as a run directory"):
        RunDirectory(file).create()
    with pytest.raises(RunError, match="file"):
        RunDirectory(file / "run").create()

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"contains files such as thesis\.tex"):
        RunDirectory(other).create()
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]

    run = RunDirectory(tmp_path / "run")
    run.save(checkpoint())
    with pytest.raises(RunError, match="already contains a run.*resume=True"):
        run.create()
    assert run.load().progress.step == 7


def test_an_incomplete_last_line_of_metrics_is_ignored(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_metrics() == []
    rows = [ROW | {"epoch": i, "train_loss": 1 / i} for i in (1, 2, 3)]
    for row in rows:
        run.append_metrics(row)
    assert run.read_metrics() == rows
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole[:-9])
    assert run.read_metrics() == rows[:2]
    run.rewind_metrics(epochs=1)
    assert run.metrics_file.read_bytes() == whole[: whole.index(b"\n") + 1]


def test_a_damaged_line_in_the_middle_raises_an_error(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    row = json.dumps(ROW)
    run.metrics_file.write_text(f"{row}\nnonsense\n{row}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is damaged"):
        run.read_metrics()


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"epoch": "1"}'])
def test_an_invalid_line_of_metrics_raises_an_error(tmp_path: Path, line: str) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_file.write_text(f'{line}\n{{"epoch": 3}}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:1 is damaged"):
        run.rewind_metrics(2)


def test_a_comparison_replaces_an_earlier_one_of_the_same_pair(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for pair, changed in (("ab", 1), ("ac", 2), ("ab", 3)):
        run.add_comparison(COMPARISON | {"a": pair[0], "b": pair[1], "changed": changed}, step=5)
    kept = read_json(run.parity_file)["comparisons"]
    assert [(one["b"], one["changed"]) for one in kept] == [("c", 2), ("b", 3)]
    run.add_comparison(COMPARISON | {"a": "a", "b": "d"}, step=6)  # from a later step of training
    assert [one["b"] for one in read_json(run.parity_file)["comparisons"]] == ["d"]
    run.parity_file.write_text('{"comparisons": [5]}')
    with pytest.raises(RunError, match="damaged"):
        run.add_comparison(COMPARISON, step=6)


def test_an_evaluation_of_earlier_weights_is_not_returned(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_evaluation(7) is None
    metrics = compute_metrics(np.eye(2), np.arange(2), ("a", "b"))
    facts = {"epoch": 1, "step": 7, "device": "cpu", "precision": "fp32"}
    evaluation = {"test": metrics, **facts, "weights": "final", "data": "made up"}
    run.write_evaluation(evaluation)
    assert run.read_evaluation(7) == evaluation
    assert run.read_evaluation(8) is None


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot open directories")
def test_only_one_process_can_train_in_a_run(tmp_path: Path) -> None:
    run, other = RunDirectory(tmp_path), RunDirectory(tmp_path)
    with (
        run.locked(),
        pytest.raises(RunError, match="another process is training in"),
        other.locked(),
    ):
        pass
    with other.locked():
        pass
    with RunDirectory(tmp_path / "nowhere").locked():
        pass


@pytest.mark.parametrize("name", [".", "/", "directory"])
def test_a_directory_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    path = tmp_path / name if name == "directory" else Path(name)
    with pytest.raises(RunError, match=f"cannot write {path}: it is a directory"):
        write_json(path, {})


def test_names_that_are_not_utf_8_are_escaped_in_text(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "caf\udce9")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == r"caf\udce9"


def test_non_finite_metrics_are_rejected(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(RunError, match="train_loss is not a finite number"):
        run.append_metrics(ROW | {"train_loss": float("nan")})
    assert not run.metrics_file.exists()


def test_json_round_trips_with_one_line_per_matrix_row(tmp_path: Path) -> None:
    content = {
        "a": {"b": [[1, 2], [3, 4]], "c": []},
        "d": None,
        "e": "ü",
        "f": [{"g": 1.5}],
        "h": {},
    }
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "[1, 2],\n" in text


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"new": object()})
    assert read_json(tmp_path / "x.json") == {"old": 1}


@pytest.mark.skipif(os.name == "nt", reason="links and pipes work differently on Windows")
def test_the_target_of_a_link_is_replaced_and_a_pipe_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, file, pipe = tmp_path / "link.json", tmp_path / "there" / "x.json", tmp_path / "pipe"
    link.symlink_to(file)
    write_json(link, {})
    assert (link.is_symlink(), read_json(file)) == (True, {})
    os.mkfifo(pipe)
    with pytest.raises(RunError, match=r"cannot write .*pipe: it is a device or a pipe"):
        write_json(pipe, {})
    assert pipe.is_fifo()
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_with_the_name_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the temporary file is known in advance."""
    outside, file = tmp_path / "outside", tmp_path / "shared" / "x.json"
    outside.write_text("mine")
    file.parent.mkdir()
    monkeypatch.setattr(secrets, "token_hex", lambda count: "known")
    (file.parent / ".known.tmp").symlink_to(outside)
    with pytest.raises(RunError, match="cannot write"):
        write_json(file, {})
    assert outside.read_text() == "mine"
    assert not file.exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
def test_files_have_the_default_permissions_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "1" + 5000 * "0"])
def test_non_finite_and_huge_numbers_in_json_raise_errors(tmp_path: Path, value: str) -> None:
    (tmp_path / "x.json").write_text(f'{{"a": {value}}}')
    with pytest.raises(RunError, match=r"x\.json is damaged") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_not_written_as_json(tmp_path: Path, value: float) -> None:
    with pytest.raises(RunError, match="cannot write .*not a finite number"):
        write_json(tmp_path / "x.json", {"a": {"b": [1, value]}})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Error, match="not a finite number"):
        to_json([value])


def test_a_write_error_contains_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("resnet56.files.create_temporary", refuse)
    with pytest.raises(RunError, match=r"cannot write .*x\.json: Permission denied"):
        write_json(tmp_path / "x.json", {})


def test_progress_contains_the_sums_of_an_interrupted_epoch() -> None:
    assert set(asdict(Progress())) == {
        "epoch", "step", "epoch_step", "loss_sum", "correct", "images", "seconds",
    }  # fmt: skip


def test_unused_path_numbers_existing_names(tmp_path: Path) -> None:
    base = tmp_path / "quick-digits"
    assert unused_path(base) == base
    base.mkdir()
    assert unused_path(base) == tmp_path / "quick-digits-2"
    (tmp_path / "quick-digits-2").mkdir()
    assert unused_path(base) == tmp_path / "quick-digits-3"
