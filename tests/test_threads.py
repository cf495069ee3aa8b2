"""The number of threads: selection, recording, restoring and messages."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from networks import onnx_file, random_checkpoint

from resnet56 import threads, training
from resnet56.cli import main
from resnet56.data.dataset import Dataset
from resnet56.errors import UsageError
from resnet56.progress import Output, TrainingDisplay
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.threads import Load, LoadMeter, ThreadControl, ThroughputMonitor
from resnet56.training import train


class ScriptedMeter:
    """A meter that returns the given loads, one per window."""

    def __init__(self, *others: float) -> None:
        self.values = iter(others)

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        value = next(self.values, None)
        return None if value is None else Load(seconds, value)


@pytest.fixture
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Simulate a machine with this number of cores, all used by PyTorch."""
    count = getattr(request, "param", 2)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: count)
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: count)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: count)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def thread_counts(*others: float, start: float = 0.0, **options: bool) -> list[int]:
    """Return the number of threads at the start and after each window."""
    with ThreadControl(meter=ScriptedMeter(start, *others), **options) as control:
        control.begin(0)
        counts = [control.threads]
        for step in range(len(others)):
            control.after_step(step + 1)
            counts.append(control.threads)
    return counts


@pytest.mark.parametrize(
    ("cores", "start", "others", "expected"),
    [
        (2, 0.0, [0.0, 0.1, 0.3], [2, 2, 2, 2]),  # idle, or nearly idle
        (2, 0.67, [1.0, 1.0], [1, 1, 1]),  # the fair share of one of three threads on two cores
        (2, 1.33, [1.33], [1, 1]),
        (2, 0.0, [0.67, 1.0, 0.0, 0.0], [2, 1, 1, 2, 2]),
        (2, 0.0, [0.5, 0.3], [2, 1, 1]),  # neither busy nor free, so the number does not change
        (4, 0.8, [1.0], [3, 3]),
        (16, 0.9, [1.0, 9.0], [15, 15, 7]),
        (2, 40.0, [0.0], [1, 2]),
    ],
    indirect=["cores"],
)
def test_the_number_of_threads_is_the_number_of_free_cores(
    cores: int, start: float, others: list[float], expected: list[int]
) -> None:
    assert thread_counts(*others, start=start) == expected
    assert torch.get_num_threads() == cores  # the number is restored


@pytest.mark.usefixtures("cores")
def test_an_alternating_load_does_not_change_the_number_repeatedly() -> None:
    counts = thread_counts(*[1.0, 0.0] * 30)
    changes = sum(a != b for a, b in itertools.pairwise(counts))
    assert changes < 15
    assert counts[-1] == 1


@pytest.mark.usefixtures("cores")
def test_a_fixed_number_of_threads_does_not_change() -> None:
    assert thread_counts(1.0, start=1.0, adaptive=False) == [2, 2]
    with ThreadControl(1, meter=ScriptedMeter(0.0, 0.0, 0.0)) as control:
        control.begin(0)
        assert not control.after_step(1)
        assert control.threads == 1
        assert control.state() == {"fixed": True, "changes": [[0, 1]]}


@pytest.mark.usefixtures("cores")
def test_the_setting_of_pytorch_is_the_maximum() -> None:
    torch.set_num_threads(1)  # has the same effect as OMP_NUM_THREADS=1
    assert thread_counts(0.0, 0.0) == [1, 1, 1]


@pytest.mark.parametrize("wrong", [0, -1, 3, 10**9])
@pytest.mark.usefixtures("cores")
def test_a_number_of_threads_out_of_range_raises_an_error(wrong: int) -> None:
    with pytest.raises(UsageError, match="threads must be from 1 to 2 on this machine"):
        ThreadControl(wrong)


@pytest.mark.usefixtures("cores")
def test_resuming_keeps_the_number_or_reports_the_change() -> None:
    with ThreadControl(meter=ScriptedMeter(0.0, 1.0)) as control:
        control.begin(0)
        assert control.after_step(7) == (
            "other programs use 1.0 of 2 cores; continuing with 1 thread (override with threads)"
        )
        saved = json.loads(json.dumps(control.state()))
    assert saved == {"fixed": False, "changes": [[0, 2], [7, 1]]}
    with ThreadControl(
        meter=ScriptedMeter(0.0)
    ) as control:  # idle now, but the first window has not ended
        assert control.begin(9, saved) == ""
        assert control.threads == 1
        control.after_step(10)
        assert control.state()["changes"] == [[0, 2], [7, 1], [10, 2]]
    with ThreadControl(2, meter=ScriptedMeter()) as control:
        assert control.begin(9, saved) == (
            "the run has used 1 thread so far and continues with 2 threads; the results are equal "
            "to within rounding error, but not bitwise identical"
        )
    elsewhere = {"fixed": True, "changes": [[0, 8]]}  # on a machine with more cores
    with ThreadControl(meter=ScriptedMeter(1.0, 1.0)) as control:
        message = control.begin(9, elsewhere)
        assert "the run has used 8 threads so far and continues with 2 threads" in message
        assert not control.after_step(10)  # the number does not change
        assert control.threads == 2


def test_the_meter_excludes_this_process() -> None:
    meter = LoadMeter()
    idle, own, start = psutil.cpu_times(), time.process_time(), time.perf_counter()
    while time.perf_counter() < start + 0.6:
        pass
    alone = meter.window(0.5)
    used = (
        time.process_time()
        - own
        + sum(
            after - before
            for name, after, before in zip(idle._fields, psutil.cpu_times(), idle, strict=True)
            if name in ("idle", "iowait")
        )
    )
    cores = psutil.cpu_count() - used / (time.perf_counter() - start)
    assert meter.window(60.0) is None
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = meter.window(0.7, wait=True)
    finally:
        neighbor.kill()
        neighbor.wait()
    assert alone is not None
    assert beside is not None
    assert 0.5 < alone.seconds < 30
    assert beside.seconds >= 0.7
    # Other programs may run on this machine, so the test can only check what is excluded.
    assert alone.others <= cores + 0.2  # excludes idle cores and this process
    assert beside.others > 0.1


class RecordedDisplay(TrainingDisplay):
    """Records the messages."""

    def __init__(self) -> None:
        super().__init__(Output())
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


class StepMeter:
    """A meter that is called once per step. Another program runs from step `busy` to `free`."""

    def __init__(self, busy: int, free: int) -> None:
        self.calls = -1  # the first call is before the first step
        self.busy, self.free = busy, free

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        self.calls += 1
        return Load(seconds, 1.0 if self.busy <= self.calls < self.free else 0.0)


@pytest.mark.usefixtures("cores")
def test_a_run_with_a_change_of_threads_resumes_bitwise_identically(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed right after the change. The checkpoint must contain the change."""
    recipe = Recipe(**{**small.to_json(), "execution": "eager", "batch_size": 25, "epochs": 2})

    def same_weights(first: str, second: str) -> bool:
        a, b = (RunDirectory(tmp_path / name).load().model for name in (first, second))
        return all(torch.equal(a[name], b[name]) for name in a)

    # There are two steps per epoch, so the change is in the middle of the first epoch.
    monkeypatch.setattr(threads, "LoadMeter", lambda: StepMeter(busy=1, free=3))
    progress = RecordedDisplay()
    train(recipe, tiny, tmp_path / "straight", device="cpu", progress=progress)
    assert sum("continuing with 1 thread" in line for line in progress.lines) == 1
    head = RunDirectory(tmp_path / "straight").load()
    assert head.metadata["threads"] == {"fixed": False, "changes": [[0, 2], [1, 1], [3, 2]]}
    rows = RunDirectory(tmp_path / "straight").read_metrics()
    assert [row["threads"] for row in rows] == [1, 2]

    class Killed(BaseException):
        pass

    saves = 0
    original_save = RunDirectory.save

    def save_and_die(run: RunDirectory, checkpoint: object) -> None:
        nonlocal saves
        original_save(run, checkpoint)
        saves += 1
        if saves == 2:  # the first save is before any step
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", save_and_die)
        with pytest.raises(Killed):
            train(recipe, tiny, tmp_path / "killed", device="cpu")
    saved = RunDirectory(tmp_path / "killed").load()
    assert (saved.progress.step, saved.metadata["threads"]["changes"]) == (1, [[0, 2], [1, 1]])
    monkeypatch.setattr(threads, "LoadMeter", lambda: StepMeter(busy=-9, free=1))
    train(recipe, tiny, tmp_path / "killed", device="cpu", resume=True)
    assert RunDirectory(tmp_path / "killed").load().metadata == head.metadata
    assert same_weights("straight", "killed")
    # The number of threads changes the weights. Otherwise, the test would be meaningless.
    train(recipe, tiny, tmp_path / "one", device="cpu", threads=1)
    assert not same_weights("straight", "one")


@pytest.mark.usefixtures("cores")
def test_throughput_below_half_the_median_is_reported_once() -> None:
    def lines(rates: list[float], others: float = 1.0, device: str = "cpu") -> list[str]:
        control = ThreadControl(2, meter=ScriptedMeter(*[others] * 99))
        control.begin(0)
        control.after_step(1)
        monitor = ThroughputMonitor(control, device)
        images, seconds, messages = 0, 0.0, []
        for rate in rates:
            images, seconds = images + int(5 * rate), seconds + 5.0
            messages.append(monitor.update(images, seconds))
        return [line for line in messages if line]

    steady = [240.0] * 8
    assert lines(steady + [130.0] * 5) == []
    (line,) = lines(steady + [40.0] * 3)
    assert line == (
        "40 images/s, less than half of this run's median of 240: other programs use 1.0 of 2 "
        "cores; using 2 threads (override with threads)"
    )
    assert len(lines([*steady, 40.0, 60.0, 240.0, 40.0])) == 2
    assert "no other program" in lines([*steady, 40.0], others=0.0)[0]
    assert "using the device" in lines([*steady, 40.0], others=0.0, device="cuda")[0]


@pytest.mark.usefixtures("cores")
def test_image_size_and_thread_changes_are_not_slowdowns() -> None:
    control = ThreadControl(meter=ScriptedMeter(0.0, 1.0))
    control.begin(0)
    monitor = ThroughputMonitor(control, "cpu")
    for second in range(5, 45, 5):
        assert not monitor.update(600 * second, second, cost=0.36)
    assert not monitor.update(216 * 5, 5.0, cost=1.0)  # the next epoch, of larger images
    assert not monitor.update(216 * 9, 9.0, cost=1.0)
    control.after_step(8)
    # This window includes steps with the old number of threads.
    assert not monitor.update(216 * 9 + 60, 14.0, cost=1.0)
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
    RunDirectory(tmp_path / "run").save(random_checkpoint())
    run = str(tmp_path / "run")
    requested: list[int] = []
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", requested.append)
    predict = ["predict", str(tmp_path / "one.png"), "--threads", "3", "--run"]
    assert main([*predict, run]) == 0
    assert requested == [3]
    (tmp_path / "net.onnx").write_bytes(onnx_file())
    original_session = onnxruntime.InferenceSession

    def session(content: bytes, options: onnxruntime.SessionOptions, **more: object) -> object:
        requested.append(options.intra_op_num_threads)
        return original_session(content, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert main([*predict, str(tmp_path / "net.onnx")]) == 0
    assert requested == [3, 3]
    capsys.readouterr()


@pytest.mark.usefixtures("cores")
def test_training_and_evaluation_use_the_number_and_restore_it(
    tiny: Dataset, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    evaluate = training.evaluate_run
    monkeypatch.setattr(
        training,
        "evaluate_run",
        lambda *args, **options: seen.append(torch.get_num_threads()) or evaluate(*args, **options),
    )
    train(small, tiny, tmp_path / "run", device="cpu", threads=1)
    assert (seen, torch.get_num_threads()) == ([1], 2)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == 1


def test_the_command_sees_every_core() -> None:
    """The environment that the command sets for its libraries must not hide cores."""
    count = "from resnet56.threads import usable_cores; print(usable_cores())"
    command = f"from resnet56.cli import main; main(['--version']); {count}"
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("JOBLIB")}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for code in (count, command)
    ]
    assert outputs[0] == outputs[1]
    if hasattr(os, "sched_getaffinity"):
        assert int(outputs[0]) <= len(os.sched_getaffinity(0))
