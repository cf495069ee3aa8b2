"""How many CPU threads a network runs on, beside whatever else the machine does.

A training step meets hundreds of barriers at which every thread waits for the slowest. A thread
that shares its core with another program is scheduled only part of the time, and all the others
wait for it: two threads beside one busy program are slower than one thread alone. So a training
on the CPU uses as many threads as other programs leave cores free, and reconsiders as it goes.

The number of threads decides the order of some sums, and so the last bits of the weights. Every
change is therefore recorded with the step from which it holds, and resuming keeps it.
"""

import math
import os
import statistics
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import psutil

from resnet56.errors import UsageError

WINDOW = 5.0  # seconds between two decisions
FIRST_WINDOW = 0.3  # seconds to measure before the first one: processor times come in 10 ms
BUSY = 0.4  # of a core in use by others: it no longer counts as free
FREE = 0.25  # of a core in use by others: it counts as free again
SOON = 12  # windows: cores that are taken again within them were not really free
WAIT_AT_MOST = 12  # windows that cores must be free before they are used again

SLOW = 0.5  # of the run's median throughput: worth a line
RECOVERED = 0.75  # of the run's median throughput: worth another line the next time
ENOUGH = 6  # windows that make a median


class Load(NamedTuple):
    """What other programs did in a stretch of time."""

    seconds: float
    others: float  # cores that they kept busy, on average


class Meter(Protocol):
    """Measures the other programs' use of the cores that this process may run on."""

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        """The load since the last window, once that is `seconds` ago; None before."""
        ...


class LoadMeter:
    """Measures the other programs' use of the cores that this process may run on.

    Time that a hypervisor gives to other machines (steal) counts as other programs'.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        # The processors of this process's affinity mask; macOS knows none.
        known = hasattr(self._process, "cpu_affinity")
        self._allowed = set(self._process.cpu_affinity()) if known else None
        self._last = self._read()

    def window(self, seconds: float, *, wait: bool = False) -> Load | None:
        """The load since the last window, once that is `seconds` ago; None before, or it waits."""
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
        """The time, all programs' use of the allowed processors, and this one's, in seconds."""
        busy = 0.0
        for number, times in enumerate(psutil.cpu_times(percpu=True)):
            if self._allowed is None or number in self._allowed:
                spent = times._asdict()
                # A guest's time is in the user's already.
                resting = ("idle", "iowait", "guest", "guest_nice")
                busy += sum(seconds for name, seconds in spent.items() if name not in resting)
        return time.perf_counter(), busy, sum(self._process.cpu_times()[:4])


class ThreadControl:
    """The number of threads of one training, from its first step to its last.

    Use it as a context manager: when it ends, PyTorch has as many threads as before.

    Args:
        requested: a fixed number of threads; None leaves it to the control.
        adaptive: whether the number follows the other programs' load. It should not on a GPU, nor
            where several processes share the cores.
        meter: measures the load.

    Raises:
        UsageError: more threads are requested than there are processors, or fewer than one.
    """

    def __init__(
        self, requested: int | None = None, *, adaptive: bool = True, meter: Meter | None = None
    ) -> None:
        if requested is not None:
            check_threads(requested)
        self.requested = requested
        self.adaptive = adaptive and requested is None
        self.others = 0.0  # cores that other programs used in the last window
        self.changes: list[list[int]] = []  # [first step, threads], in order
        import torch  # here, not above: an ONNX file runs without PyTorch

        self._torch = torch
        self._before = torch.get_num_threads()
        usable = usable_cores()
        self._most = min(self._before, usable)
        # Two hyperthreads make one core.
        self.cores = min(usable, psutil.cpu_count(logical=False) or usable)
        self._meter = meter or LoadMeter()
        self._patience = 1  # windows that cores must be free before they are used again
        self._free_windows = 0
        self._windows_since_up = SOON

    def __enter__(self) -> "ThreadControl":
        """Set the last number again, if `begin` has chosen one."""
        if self.changes:
            self._torch.set_num_threads(self.changes[-1][1])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Set the number of threads back."""
        self._torch.set_num_threads(self._before)

    @property
    def threads(self) -> int:
        """The present number."""
        return self._torch.get_num_threads()

    def begin(self, step: int, recorded: Mapping[str, Any] | None = None) -> str:
        """Set the number of threads from `step` on.

        Args:
            step: the first step to run.
            recorded: what `state` returned when the run to resume was saved.

        Returns:
            A line for the user, or nothing.
        """
        line, chosen = "", self._most
        if recorded is not None:
            self.changes = [list(change) for change in recorded["changes"]]
            chosen = min(self.changes[-1][1], self._most)
            self.adaptive = self.adaptive and not recorded["fixed"]
        elif self.adaptive and self._most > 1:
            load = self._meter.window(FIRST_WINDOW, wait=True)
            assert load is not None
            self.others = load.others
            chosen = self._at_most(load.others, BUSY)
            if chosen < self._most:
                line = f"{self._who()}: training on {_count(chosen)} (--threads N sets another)"
        if self.requested is not None:
            chosen = self.requested
        if recorded is not None and chosen != self.changes[-1][1]:
            line = (
                f"so far it ran on {_count(self.changes[-1][1])}, it continues on "
                f"{_count(chosen)}: the same within rounding, not to the bit"
            )
        self._set(chosen, step)
        return line

    def after_step(self, step: int) -> str:
        """Reconsider the number of threads for the steps from `step` on.

        Returns:
            A line for the user if the number changed, or nothing. The caller then saves a
            checkpoint, so that a run that is killed and resumed has the same number from the
            same step.
        """
        load = self._meter.window(WINDOW)
        if load is None:
            return ""
        self.others = load.others
        self._windows_since_up += 1
        if not self.adaptive:
            return ""
        now = self.threads
        fewer, more = self._at_most(load.others, BUSY), self._at_most(load.others, FREE)
        self._free_windows = self._free_windows + 1 if more > now else 0
        if fewer < now:
            soon = self._windows_since_up <= SOON
            self._patience = min(2 * self._patience, WAIT_AT_MOST) if soon else 1
            self._set(fewer, step)
            return f"{self._who()}: continuing on {_count(fewer)} (--threads N sets another number)"
        if self._free_windows >= self._patience:
            self._free_windows = self._windows_since_up = 0
            self._set(more, step)
            return f"{more} cores are free again: continuing on {_count(more)}"
        return ""

    def state(self) -> dict[str, Any]:
        """What resuming needs, as JSON has it."""
        return {"fixed": not self.adaptive, "changes": self.changes}

    def _at_most(self, others: float, tolerance: float) -> int:
        """Threads that fit beside `others` busy cores."""
        return max(1, min(math.floor(self.cores - others + tolerance), self._most))

    def _set(self, threads: int, step: int) -> None:
        self._torch.set_num_threads(threads)
        if not self.changes or self.changes[-1][1] != threads:
            self.changes.append([step, threads])

    def _who(self) -> str:
        return f"other programs use {self.others:.1f} of {self.cores} cores"


class ThroughputMonitor:
    """Notices when a training falls below half of its own median throughput.

    Args:
        control: knows what other programs do.
        device: "cpu", "cuda", ...: for the likely reason.
    """

    def __init__(self, control: ThreadControl, device: str) -> None:
        self._control = control
        self._device = device
        self._rates: list[float] = []
        self._told = False
        self._changes = len(control.changes)
        self._at = (0, 0.0)  # images and seconds of the epoch at the last reading
        self._images = self._work = self._seconds = 0.0

    def update(self, images: int, seconds: float, cost: float = 1.0) -> str:
        """Take a reading; returns a line for the user, or nothing.

        Args:
            images: of the present epoch, so far.
            seconds: that they took.
            cost: of an image in this epoch, relative to the other epochs'.
        """
        if images < self._at[0]:  # another epoch
            self._at = (0, 0.0)
        self._images += images - self._at[0]
        self._work += cost * (images - self._at[0])
        self._seconds += seconds - self._at[1]
        self._at = (images, seconds)
        if self._changes != len(self._control.changes):  # a window of two numbers of threads
            self._changes = len(self._control.changes)
            self._images = self._work = self._seconds = 0.0
        if self._seconds < WINDOW:
            return ""
        rate, speed = self._work / self._seconds, self._images / self._seconds
        self._rates.append(rate)
        self._images = self._work = self._seconds = 0.0
        median = statistics.median(self._rates)
        if rate > RECOVERED * median:
            self._told = False
        if len(self._rates) < ENOUGH or rate > SLOW * median or self._told:
            return ""
        self._told = True
        return (
            f"{speed:.0f} images/s, less than half of this run's median of "
            f"{median / rate * speed:.0f}: {self._reason()}"
        )

    def _reason(self) -> str:
        control = self._control
        if self._device != "cpu":
            return "another program may be using the device, or it is too hot or short of power"
        if control.others > BUSY:
            return (
                f"other programs use {control.others:.1f} of {control.cores} cores; "
                f"{_count(control.threads)} now, --threads N sets another number"
            )
        return (
            "no other program on these cores explains it; the processor may be too hot or short "
            f"of power, or a container's limit may hold it back; {_count(control.threads)} now, "
            "--threads N sets another number"
        )


def usable_cores() -> int:
    """Processors that this process may use: of its affinity mask, and of a container's quota."""
    from joblib import cpu_count

    return int(cpu_count())


def check_threads(threads: int) -> None:
    """UsageError unless this machine can run so many."""
    most = os.cpu_count() or 1
    if not 1 <= threads <= most:
        raise UsageError(f"--threads must be from 1 to {most} on this machine, not {threads}")


def set_threads(requested: int | None) -> None:
    """Run PyTorch on `requested` threads from here on.

    Args:
        requested: None for as many as other programs leave cores free at the moment.

    Raises:
        UsageError: more threads are requested than there are processors, or fewer than one.
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
