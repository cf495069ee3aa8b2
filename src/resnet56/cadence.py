"""Decide when training reads the loss, saves a checkpoint and stops.

All processes read the loss, save checkpoints and stop at the same steps.
"""

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

from resnet56.distributed import Distributed, all_reduce_max
from resnet56.threads import ThreadControl

READ_LOSS_EVERY = 10  # steps between reads of the loss; each read waits for the device
SAVE_EVERY = 300.0  # seconds between checkpoints within an epoch


@dataclass
class StopRequest:
    """The number of the signal that requested the stop, or None."""

    signum: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record the first Ctrl-C or SIGTERM, and then restore the previous signal handlers."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return
    signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform == "win32":
        signals.append(signal.SIGBREAK)  # Windows can send Ctrl-Break to a process group
    handlers = {s: signal.getsignal(s) for s in signals}

    def record(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in handlers:
        signal.signal(number, record)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class DueActions(NamedTuple):
    """The actions that are due after a step."""

    read_loss: bool
    save: bool
    stop: bool
    message: str = ""  # a message for the user if the number of threads has changed


class Cadence:
    """Decides which actions are due after each step.

    All processes must save checkpoints and stop at the same step, but each process has its own
    clock and receives its own signals. The processes synchronize only when they read the loss,
    because reading the loss waits for the device anyway.

    After the last step of an epoch, `after_step` requests only a read of the loss, because the
    training loop saves a checkpoint and checks for stop requests at the end of each epoch. A
    checkpoint is also due after the number of threads changes, so that a resumed run produces
    bitwise identical results.

    Args:
        steps: number of steps per epoch.
        stop: stop request of this process.
        threads: thread control of this process.
        dist: rank and world size.
        device: training device.
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
        self.record_save()

    def record_save(self) -> None:
        """Record the time of a checkpoint."""
        self.last_save = time.perf_counter()

    def after_step(self, step: int, epoch_step: int) -> DueActions:
        """Return the actions due after `step`, which is step `epoch_step` of its epoch."""
        last = epoch_step == self.steps
        read_loss = last or epoch_step % READ_LOSS_EVERY == 0
        if last or (self.dist.world_size > 1 and not read_loss):
            return DueActions(read_loss, save=False, stop=False)
        message = self.threads.after_step(step)
        stop = self.stop_requested()
        save = stop or bool(message) or self._any(time.perf_counter() - self.last_save > SAVE_EVERY)
        return DueActions(read_loss or save, save, stop, message)

    def stop_requested(self) -> bool:
        """Return whether any process has received a stop request."""
        return self._any(self.stop.signum is not None)

    def _any(self, value: bool) -> bool:
        if self.dist.world_size == 1:
            return value
        return bool(all_reduce_max(torch.tensor(float(value), device=self.device), self.dist) > 0)
