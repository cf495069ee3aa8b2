"""Choose the number of CPU threads according to the load from other programs.

A training step contains hundreds of barriers, at which every thread waits for the slowest thread. A
thread that shares its core with another program runs only part of the time, and all other threads
wait for it. For example, if another program keeps one of two cores busy, two threads are slower
than one. Training on the CPU uses one thread per free core, and adjusts the number of threads to
the load.

The number of threads determines the order of the additions in some sums, and therefore the last
bits of the weights. A run records each change to the number of threads and the step at which the
change takes effect. A resumed run uses the recorded numbers of threads.
"""

import math
import os
import statistics
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import psutil

from resnet56.errors import UsageError, option

WINDOW = 5.0  # length of a measurement window in seconds; a decision follows each window
FIRST_WINDOW = 0.3  # length of the first window in seconds; CPU times have a resolution of 10 ms
BUSY = 0.4  # a core counts as busy if its load from other programs exceeds this value
FREE = 0.25  # a busy core counts as free again if its load falls to this value
BACKOFF_WINDOWS = 12  # if cores become busy again within this number of windows, the wait doubles
MAX_WAIT = 12  # maximum number of windows to wait before using free cores

SLOW = 0.5  # warn if throughput falls below this fraction of the run's median
RECOVERED = 0.75  # warn again only after throughput has exceeded this fraction of the median
MIN_WINDOWS = 6  # minimum number of windows for the median


class Load(NamedTuple):
    """The load from other programs in a time window."""

    seconds: float
    others: float  # average number of cores that other programs used


class Meter(Protocol):
    """The interface of `LoadMeter`."""

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        """Return the average load since the last window ended. See `LoadMeter.window`."""
        ...


class LoadMeter:
    """Measures how much other programs use the cores that this process may use.

    The time that a hypervisor allocates to other virtual machines (steal time) counts as load from
    other programs.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        # Processes have no affinity mask on macOS.
        has_affinity = hasattr(self._process, "cpu_affinity")
        self._allowed = set(self._process.cpu_affinity()) if has_affinity else None
        self._last = self._read()

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        """Return the average load since the last window ended.

        If the last window ended less than `seconds` ago, return None. If `wait` is True, wait for
        the rest of this time instead.
        """
        missing = seconds - (time.perf_counter() - self._last[0])
        if missing > 0:
            if not wait:
                return None
            time.sleep(missing)
        now = self._read()
        elapsed, busy, own = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        return Load(elapsed, max(0.0, busy - own) / elapsed)

    def _read(self) -> tuple[float, float, float]:
        """Return the wall-clock time, and the CPU times of all processes and of this process.

        All times are in seconds.
        """
        busy = 0.0
        for number, times in enumerate(psutil.cpu_times(percpu=True)):
            if self._allowed is None or number in self._allowed:
                fields = times._asdict()
                # `user` includes `guest`, and `nice` includes `guest_nice`.
                excluded = ("idle", "iowait", "guest", "guest_nice")
                busy += sum(seconds for name, seconds in fields.items() if name not in excluded)
        return time.perf_counter(), busy, sum(self._process.cpu_times()[:4])


class ThreadControl:
    """Controls the number of threads of a training run.

    Use this class as a context manager. It restores PyTorch's number of threads on exit.

    Args:
        requested: a fixed number of threads. By default, the number is chosen automatically.
        adaptive: whether to adjust the number to the load. Use False for training on a GPU, or if
            several processes share the cores.
        meter: measures the load from other programs.

    Raises:
        UsageError: `requested` is below 1 or above the number of processors.
    """

    def __init__(
        self, requested: int | None = None, *, adaptive: bool = True, meter: Meter | None = None
    ) -> None:
        if requested is not None:
            check_threads(requested)
        self.requested = requested
        self.adaptive = adaptive and requested is None
        self.others = 0.0  # number of cores that other programs used in the last window
        self.changes: list[list[int]] = []  # [first step, number of threads] of each change
        import torch  # ONNX inference imports this module, but not PyTorch

        self._torch = torch
        self._before = torch.get_num_threads()
        usable = usable_cores()
        self._max_threads = min(self._before, usable)
        # Count a core with two hyperthreads once.
        self.cores = min(usable, psutil.cpu_count(logical=False) or usable)
        self._meter = meter or LoadMeter()
        self._wait_windows = 1  # number of windows for which cores must stay free before use
        self._free_windows = 0
        self._windows_since_up = BACKOFF_WINDOWS

    def __enter__(self) -> "ThreadControl":
        """Restore the number of threads that `begin` or `after_step` last set, if any."""
        if self.changes:
            self._torch.set_num_threads(self.changes[-1][1])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the previous number of threads."""
        self._torch.set_num_threads(self._before)

    @property
    def threads(self) -> int:
        """The current number of threads."""
        return self._torch.get_num_threads()

    def begin(self, step: int, recorded: Mapping[str, Any] | None = None) -> str:
        """Set the number of threads for `step` and later steps.

        Args:
            step: the first step to run.
            recorded: the result of `state` in the run to resume.

        Returns:
            A message for the user, or an empty string.
        """
        message, chosen = "", self._max_threads
        if recorded is not None:
            self.changes = [list(change) for change in recorded["changes"]]
            chosen = min(self.changes[-1][1], self._max_threads)
            self.adaptive = self.adaptive and not recorded["fixed"]
        elif self.adaptive and self._max_threads > 1:
            load = self._meter.window(FIRST_WINDOW, wait=True)
            assert load is not None
            self.others = load.others
            chosen = self._free_threads(load.others, BUSY)
            if chosen < self._max_threads:
                message = f"{self.describe_load()}; training with {_count(chosen)} ({_override()})"
        if self.requested is not None:
            chosen = self.requested
        if recorded is not None and chosen != self.changes[-1][1]:
            message = (
                f"the run has used {_count(self.changes[-1][1])} so far and continues with "
                f"{_count(chosen)}; the results are equal to within rounding error, but not "
                "bitwise identical"
            )
        self._set(chosen, step)
        return message

    def after_step(self, step: int) -> str:
        """Adjust the number of threads for `step` and later steps.

        Returns:
            A message for the user if the number changed, or an empty string. After a change, the
            caller must save a checkpoint, so that a resumed run changes the number at the same
            step.
        """
        load = self._meter.window(WINDOW)
        if load is None:
            return ""
        self.others = load.others
        self._windows_since_up += 1
        if not self.adaptive:
            return ""
        now = self.threads
        fewer, more = self._free_threads(load.others, BUSY), self._free_threads(load.others, FREE)
        self._free_windows = self._free_windows + 1 if more > now else 0
        if fewer < now:
            recent = self._windows_since_up <= BACKOFF_WINDOWS
            self._wait_windows = min(2 * self._wait_windows, MAX_WAIT) if recent else 1
            self._set(fewer, step)
            return f"{self.describe_load()}; continuing with {_count(fewer)} ({_override()})"
        if self._free_windows >= self._wait_windows:
            self._free_windows = self._windows_since_up = 0
            self._set(more, step)
            return f"{more} cores are free again; continuing with {_count(more)}"
        return ""

    def state(self) -> dict[str, Any]:
        """Return the state needed to resume training, as JSON values."""
        return {"fixed": not self.adaptive, "changes": self.changes}

    def _free_threads(self, others: float, tolerance: float) -> int:
        """Return how many threads can run on free cores if other programs use `others` cores."""
        return max(1, min(math.floor(self.cores - others + tolerance), self._max_threads))

    def _set(self, threads: int, step: int) -> None:
        self._torch.set_num_threads(threads)
        if not self.changes or self.changes[-1][1] != threads:
            self.changes.append([step, threads])

    def describe_load(self) -> str:
        """Describe the load from other programs."""
        return f"other programs use {self.others:.1f} of {self.cores} cores"


class ThroughputMonitor:
    """Detects when the throughput is less than half of the run's median.

    Args:
        control: provides the load from other programs.
        device: type of the device, such as "cpu" or "cuda". The messages mention the likely causes
            of low throughput on this type of device.
    """

    def __init__(self, control: ThreadControl, device: str) -> None:
        self._control = control
        self._device = device
        self._rates: list[float] = []
        self._warned = False
        self._changes = len(control.changes)
        self._last = (0, 0.0)  # arguments of the last update
        self._images = self._cost = self._seconds = 0.0

    def update(self, images: int, seconds: float, cost: float = 1.0) -> str:
        """Record progress. Return a message for the user, or an empty string.

        Args:
            images: number of images that training has processed in this epoch so far.
            seconds: time spent training on these images.
            cost: cost per image in this epoch, relative to other epochs.
        """
        if images < self._last[0]:  # a new epoch has started
            self._last = (0, 0.0)
        self._images += images - self._last[0]
        self._cost += cost * (images - self._last[0])
        self._seconds += seconds - self._last[1]
        self._last = (images, seconds)
        # Discard a window in which the number of threads changed.
        if self._changes != len(self._control.changes):
            self._changes = len(self._control.changes)
            self._images = self._cost = self._seconds = 0.0
        if self._seconds < WINDOW:
            return ""
        rate, throughput = self._cost / self._seconds, self._images / self._seconds
        self._rates.append(rate)
        self._images = self._cost = self._seconds = 0.0
        median = statistics.median(self._rates)
        if rate > RECOVERED * median:
            self._warned = False
        if len(self._rates) < MIN_WINDOWS or rate > SLOW * median or self._warned:
            return ""
        self._warned = True
        return (
            f"{throughput:.0f} images/s, less than half of this run's median of "
            f"{median / rate * throughput:.0f}: {self._reason()}"
        )

    def _reason(self) -> str:
        control = self._control
        if self._device != "cpu":
            return (
                "another program may be using the device, or thermal or power limits may be "
                "throttling it"
            )
        if control.others > BUSY:
            return f"{control.describe_load()}; using {_count(control.threads)} ({_override()})"
        return (
            "no other program uses these cores; thermal, power or container limits may be "
            f"throttling the processor; using {_count(control.threads)} ({_override()})"
        )


def _override() -> str:
    return f"override with {option('threads')}"


def usable_cores() -> int:
    """Return the number of processors that the affinity mask and the container quota allow."""
    # Do not use `joblib.cpu_count`. It returns 1, because the command line sets
    # JOBLIB_MULTIPROCESSING=0.
    from joblib.externals.loky import cpu_count

    return int(cpu_count())


def check_threads(threads: int) -> None:
    """Raise UsageError unless `threads` is from 1 to the number of processors."""
    processors = os.cpu_count() or 1
    if not 1 <= threads <= processors:
        raise UsageError(
            f"{option('threads')} must be from 1 to {processors} on this machine, not {threads}"
        )


def set_threads(requested: int | None) -> None:
    """Set PyTorch's number of threads.

    Args:
        requested: number of threads. None selects the number of cores that are free now.

    Raises:
        UsageError: `requested` is below 1 or above the number of processors.
    """
    import torch

    if requested is None:
        control = ThreadControl()
        control.begin(0)
    else:
        check_threads(requested)
        torch.set_num_threads(requested)


def _count(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"
