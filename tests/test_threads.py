"""The number of threads: what decides it, that it is kept, and that the user is told."""

import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resnet56 import threads, training
from resnet56.cli import main
from resnet56.data.dataset import Dataset
from resnet56.errors import UsageError
from resnet56.progress import TrainingProgress
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.threads import Load, LoadMeter, ThreadControl, ThroughputMonitor
from resnet56.training import train


class Script:
    """A meter that is told what other programs do: one value for each window."""

    def __init__(self, *others: float) -> None:
        self.values = iter(others)

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        value = next(self.values, None)
        return None if value is None else Load(seconds, value)


@pytest.fixture
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A machine of so many cores, with PyTorch on all of them."""
    count = getattr(request, "param", 2)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: count)
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: count)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: count)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def followed(*others: float, start: float = 0.0, **options: bool) -> list[int]:
    """The threads at the start and after each window."""
    with ThreadControl(meter=Script(start, *others), **options) as control:
        control.begin(0)
        counts = [control.threads]
        for step in range(len(others)):
            control.after_step(step + 1)
            counts.append(control.threads)
    return counts


@pytest.mark.parametrize(
    ("cores", "start", "others", "expected"),
    [
        (2, 0.0, [0.0, 0.1, 0.3], [2, 2, 2, 2]),  # idle, or as good as idle
        (2, 0.67, [1.0, 1.0], [1, 1, 1]),  # a fair share of two cores for three threads
        (2, 1.33, [1.33], [1, 1]),
        (2, 0.0, [0.67, 1.0, 0.0, 0.0], [2, 1, 1, 2, 2]),
        (2, 0.0, [0.5, 0.3], [2, 1, 1]),  # neither busy nor free: as it is
        (4, 0.8, [1.0], [3, 3]),
        (16, 0.9, [1.0, 9.0], [15, 15, 7]),
        (2, 40.0, [0.0], [1, 2]),
    ],
    indirect=["cores"],
)
def test_as_many_threads_as_others_leave_cores_free(
    cores: int, start: float, others: list[float], expected: list[int]
) -> None:
    assert followed(*others, start=start) == expected
    assert torch.get_num_threads() == cores  # as before


@pytest.mark.usefixtures("cores")
def test_a_neighbor_that_comes_and_goes_is_waited_out() -> None:
    counts = followed(*[1.0, 0.0] * 30)
    changes = sum(a != b for a, b in itertools.pairwise(counts))
    assert changes < 15
    assert counts[-1] == 1


@pytest.mark.usefixtures("cores")
def test_a_number_that_is_given_or_shared_by_processes_stays() -> None:
    assert followed(1.0, start=1.0, adaptive=False) == [2, 2]
    with ThreadControl(1, meter=Script(0.0, 0.0, 0.0)) as control:
        control.begin(0)
        assert not control.after_step(1)
        assert control.threads == 1
        assert control.state() == {"fixed": True, "changes": [[0, 1]]}


@pytest.mark.usefixtures("cores")
def test_what_pytorch_was_told_before_is_the_most() -> None:
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    assert followed(0.0, 0.0) == [1, 1, 1]


@pytest.mark.parametrize("wrong", [0, -1, 3, 10**9])
@pytest.mark.usefixtures("cores")
def test_numbers_that_the_machine_has_not_are_refused(wrong: int) -> None:
    with pytest.raises(UsageError, match="--threads must be from 1 to 2 on this machine"):
        ThreadControl(wrong)


@pytest.mark.usefixtures("cores")
def test_resuming_keeps_the_number_and_says_where_it_cannot() -> None:
    with ThreadControl(meter=Script(0.0, 1.0)) as control:
        control.begin(0)
        assert control.after_step(7) == (
            "other programs use 1.0 of 2 cores: continuing on 1 thread (--threads N sets another "
            "number)"
        )
        saved = json.loads(json.dumps(control.state()))
    assert saved == {"fixed": False, "changes": [[0, 2], [7, 1]]}
    with ThreadControl(meter=Script(0.0)) as control:  # idle now: not before the first window
        assert control.begin(9, saved) == ""
        assert control.threads == 1
        control.after_step(10)
        assert control.state()["changes"] == [[0, 2], [7, 1], [10, 2]]
    with ThreadControl(2, meter=Script()) as control:
        assert control.begin(9, saved) == (
            "so far it ran on 1 thread, it continues on 2 threads: the same within rounding, not "
            "to the bit"
        )
    elsewhere = {"fixed": True, "changes": [[0, 8]]}  # fewer cores here
    with ThreadControl(meter=Script(1.0, 1.0)) as control:
        assert "so far it ran on 8 threads, it continues on 2 threads" in control.begin(
            9, elsewhere
        )
        assert not control.after_step(10)  # a fixed number stays one
        assert control.threads == 2


def test_the_meter_counts_others_and_not_this_process() -> None:
    meter = LoadMeter()
    stop = time.perf_counter() + 0.6
    while time.perf_counter() < stop:
        pass
    alone = meter.window(0.5)
    assert meter.window(60.0) is None
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = meter.window(1.5, wait=True)
    finally:
        neighbor.kill()
        neighbor.wait()
    assert alone is not None
    assert beside is not None
    assert 0.5 < alone.seconds < 30
    assert beside.seconds >= 1.5
    # On a machine that others use as well, all that is certain is that this one is not counted.
    assert alone.others <= multiprocessing.cpu_count() - 0.2
    assert beside.others > 0.1


class Followed(TrainingProgress):
    """Keeps the lines, and interrupts at a step."""

    def __init__(self, until: int | None = None) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.until = until

    def say(self, line: str) -> None:
        self.lines.append(line)


class Steps:
    """A meter by steps: every call is one step's. Others come at `busy` and go at `free`."""

    def __init__(self, busy: int, free: int) -> None:
        self.calls = -1  # the first is made before the first step
        self.busy, self.free = busy, free

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        self.calls += 1
        return Load(seconds, 1.0 if self.busy <= self.calls < self.free else 0.0)


@pytest.mark.usefixtures("cores")
def test_a_run_whose_threads_changed_is_resumed_to_the_same_bits(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at once after the change, of which a checkpoint must know."""
    recipe = Recipe(**{**small.to_json(), "execution": "eager", "batch_size": 25, "epochs": 2})

    def same_weights(one: str, other: str) -> bool:
        a, b = (RunDirectory(tmp_path / name).load().model for name in (one, other))
        return all(torch.equal(a[name], b[name]) for name in a)

    # Two steps an epoch: the change comes in the middle of the first one.
    monkeypatch.setattr(threads, "LoadMeter", lambda: Steps(busy=1, free=3))
    progress = Followed()
    train(recipe, tiny, tmp_path / "straight", device="cpu", progress=progress)
    assert sum("continuing on 1 thread" in line for line in progress.lines) == 1
    head = RunDirectory(tmp_path / "straight").load()
    assert head.notes["threads"] == {"fixed": False, "changes": [[0, 2], [1, 1], [3, 2]]}
    rows = RunDirectory(tmp_path / "straight").read_metrics()
    assert [row["threads"] for row in rows] == [1, 2]

    class Killed(BaseException):
        pass

    saves = 0
    right = RunDirectory.save

    def save_and_die(run: RunDirectory, checkpoint: object) -> None:
        nonlocal saves
        right(run, checkpoint)
        saves += 1
        if saves == 2:  # the first is made before any step
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", save_and_die)
        with pytest.raises(Killed):
            train(recipe, tiny, tmp_path / "killed", device="cpu")
    saved = RunDirectory(tmp_path / "killed").load()
    assert (saved.position.step, saved.notes["threads"]["changes"]) == (1, [[0, 2], [1, 1]])
    monkeypatch.setattr(threads, "LoadMeter", lambda: Steps(busy=-9, free=1))
    train(recipe, tiny, tmp_path / "killed", device="cpu", resume=True)
    assert RunDirectory(tmp_path / "killed").load().notes == head.notes
    assert same_weights("straight", "killed")
    # And threads do change bits, or the test would say nothing.
    train(recipe, tiny, tmp_path / "one", device="cpu", threads=1)
    assert not same_weights("straight", "one")


@pytest.mark.usefixtures("cores")
def test_half_the_median_throughput_is_worth_one_line() -> None:
    def lines(rates: list[float], others: float = 1.0, device: str = "cpu") -> list[str]:
        control = ThreadControl(2, meter=Script(*[others] * 99))
        control.begin(0)
        control.after_step(1)
        monitor = ThroughputMonitor(control, device)
        images, seconds, said = 0, 0.0, []
        for rate in rates:
            images, seconds = images + int(5 * rate), seconds + 5.0
            said.append(monitor.update(images, seconds))
        return [line for line in said if line]

    steady = [240.0] * 8
    assert lines(steady + [130.0] * 5) == []
    (line,) = lines(steady + [40.0] * 3)
    assert line == (
        "40 images/s, less than half of this run's median of 240: other programs use 1.0 of 2 "
        "cores; 2 threads now, --threads N sets another number"
    )
    assert len(lines([*steady, 40.0, 60.0, 240.0, 40.0])) == 2
    assert "no other program" in lines([*steady, 40.0], others=0.0)[0]
    assert "using the device" in lines([*steady, 40.0], others=0.0, device="cuda")[0]


@pytest.mark.usefixtures("cores")
def test_smaller_images_and_a_change_of_threads_are_no_fall() -> None:
    control = ThreadControl(meter=Script(0.0, 1.0))
    control.begin(0)
    monitor = ThroughputMonitor(control, "cpu")
    for second in range(5, 45, 5):
        assert not monitor.update(600 * second, second, cost=0.36)
    assert not monitor.update(216 * 5, 5.0, cost=1.0)  # the next epoch, of larger images
    assert not monitor.update(216 * 9, 9.0, cost=1.0)
    control.after_step(8)
    assert not monitor.update(216 * 9 + 60, 14.0, cost=1.0)  # partly on the old number
    assert monitor.update(216 * 9 + 120, 19.0, cost=1.0)


@pytest.mark.parametrize("command", ["train quick", "evaluate resnet56", "bench", "serve"])
def test_the_flag_is_checked_in_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--threads", "0"]) == 2
    assert capsys.readouterr().err.startswith("resnet56: --threads must be from 1 to ")


def test_the_flag_reaches_pytorch_and_onnx_runtime(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    asked: list[int] = []
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert main(["predict", str(tmp_path / "one.png"), "--threads", "3"]) == 0
    assert asked == [3]
    assert main(["export", "resnet56", "--out", str(tmp_path / "net.onnx")]) == 0
    right = onnxruntime.InferenceSession

    def session(content: bytes, options: onnxruntime.SessionOptions, **more: object) -> object:
        asked.append(options.intra_op_num_threads)
        return right(content, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    arguments = ["predict", str(tmp_path / "one.png"), "--run", str(tmp_path / "net.onnx")]
    assert main([*arguments, "--threads", "3"]) == 0
    assert asked == [3, 3]
    capsys.readouterr()


@pytest.mark.usefixtures("cores")
def test_training_and_its_evaluation_run_on_the_number_and_set_it_back(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        training, "evaluate_run", lambda *_, **__: seen.append(torch.get_num_threads()) or {}
    )
    train(small, tiny, tmp_path / "run", device="cpu", threads=1)
    assert (seen, torch.get_num_threads()) == ([1], 2)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == 1
