"""When a training reads its loss, saves and stops: the same steps in all processes."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

import torch

from resnet56.distributed import Distributed, highest
from resnet56.threads import ThreadControl

READ_LOSS_EVERY = 10  # steps between readings of the loss, each of which waits for the device
SAVE_EVERY = 300.0  # seconds between checkpoints within an epoch


@dataclass
class StopRequest:
    """The signal that asked the training to stop, once one has."""

    signum: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first Ctrl-C or SIGTERM instead of acting on it; a second one acts as usual."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform == "win32":
        signals.append(signal.SIGBREAK)  # Ctrl-Break, the one that reaches a process group
    before = {s: signal.getsignal(s) for s in signals}

    def note(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Due(NamedTuple):
    """What is due after a step."""

    read_loss: bool
    save: bool
    stop: bool
    message: str = ""  # for the user, if the number of threads has changed


class Cadence:
    """Decides after each step what is due.

    Several processes must save and stop at the same step, but each has its own clock and receives
    its own signals. So they ask each other, and only where they wait for the device anyway: when
    they read the loss. The end of an epoch always saves, so nothing else is due there. A change of
    threads is saved at once: resumed from there, a run computes the same bits.

    Args:
        steps: in an epoch.
        stop: of this process.
        threads: of this process.
        dist: which process this is, of how many.
        device: of the training.
    """

    def __init__(
        self,
        steps: int,
        stop: StopRequest,
        threads: ThreadControl,
        dist: Distributed,
        device: torch.device,
    ) -> None:
        self.steps = steps
        self.stop = stop
        self.threads = threads
        self.dist = dist
        self.device = device
        self.saved()

    def saved(self) -> None:
        """A checkpoint has been written."""
        self.last_save = time.perf_counter()

    def after_step(self, step: int, epoch_step: int) -> Due:
        """What is due after `step` steps of all, `epoch_step` of them in this epoch."""
        last = epoch_step == self.steps
        read_loss = last or epoch_step % READ_LOSS_EVERY == 0
        if last or (self.dist.world_size > 1 and not read_loss):
            return Due(read_loss, save=False, stop=False)
        message = self.threads.after_step(step)
        stop = self.stop_requested()
        save = stop or bool(message) or self._any(time.perf_counter() - self.last_save > SAVE_EVERY)
        return Due(read_loss or save, save, stop, message)

    def stop_requested(self) -> bool:
        """Whether any of the processes has been asked to stop."""
        return self._any(self.stop.signum is not None)

    def _any(self, mine: bool) -> bool:
        if self.dist.world_size == 1:
            return mine
        return bool(highest(torch.tensor(float(mine), device=self.device), self.dist) > 0)
