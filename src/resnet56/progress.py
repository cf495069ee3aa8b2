"""What a person sees of long work: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from resnet56.errors import printable

ProgressCallback = Callable[[int], None]

LINE_EVERY = 60.0  # seconds between signs of life within an epoch, off a terminal


def percent(share: float) -> str:
    """0.9303 -> '93.03 %'."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """90 -> '1:30', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingDisplay:
    """Shows a training's steps and epochs; `quiet` shows nothing."""

    def __init__(self, *, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.quiet = quiet
        self.costs: Sequence[float] = ()
        self.steps = self.done = 0
        self.bar: Progress | None = None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> "TrainingDisplay":
        """Nothing is shown before `begin`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if not self.quiet:
            # A terminal breaks lines between words; a log keeps them whole.
            self.console.print(
                printable(line), markup=False, soft_wrap=not self.console.is_terminal
            )

    def measuring(self, what: str, total: int) -> AbstractContextManager[ProgressCallback]:
        """The training is over and something of `total` images is measured."""
        if self.bar is not None:
            self.bar.stop()
        return measuring(what, total, self.console, quiet=self.quiet)

    def begin(self, costs: Sequence[float], steps: int, done: int) -> None:
        """A training goes on after `done` steps.

        Args:
            costs: for each of its epochs, how long a step takes, in any unit.
            steps: in an epoch.
            done: the steps taken before.
        """
        self.costs, self.steps, self.done = costs, steps, done
        self.started = self.last_line = time.monotonic()
        if self.console.is_terminal and not self.quiet:
            self.bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.bar.add_task("", total=self._work(len(costs) * steps), epoch="", numbers="")

    def _work(self, step: int) -> float:
        """The cost of all steps before `step`."""
        epoch, rest = divmod(step, self.steps)
        return self.steps * sum(self.costs[:epoch]) + (rest * self.costs[epoch] if rest else 0)

    def step(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """`step` steps of all are taken; the other numbers are the epoch's so far."""
        if self.quiet:
            return
        now = time.monotonic()
        work = self._work(step)
        here, ahead = work - self._work(self.done), self._work(len(self.costs) * self.steps) - work
        left = ahead * (now - self.started) / here
        epoch = f"{(step - 1) // self.steps + 1}/{len(self.costs)}"
        speed = f"{images_per_second:.0f} img/s"
        numbers = f"loss {loss:.3f}  acc {percent(accuracy)}  {speed}  {duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=work, epoch=epoch, numbers=numbers)
        elif now - self.last_line >= LINE_EVERY:
            self.last_line = now
            self.say(f"  in epoch {epoch}  {numbers}")

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is over; `row` is its line of metrics.jsonl."""
        self.last_line = time.monotonic()
        epochs = len(self.costs)
        line = (
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
            f"  loss {row['train_loss']:.4f}  acc {percent(row['train_accuracy'])}"
        )
        if "val_accuracy" in row:
            line += f"  held out {percent(row['val_accuracy'])}"
        if "test_accuracy" in row:
            line += f"  test {percent(row['test_accuracy'])}"
        self.say(f"{line}  {row['images_per_second']:.0f} img/s  {duration(row['seconds'])}")


@contextmanager
def measuring(
    what: str, total: int, console: Console, *, quiet: bool = False
) -> Iterator[ProgressCallback]:
    """Say what is being measured and, on a terminal, how many of `total` images are done.

    Yields:
        A function to call with the images done since the last call.
    """
    if quiet:
        yield lambda count: None
        return
    line = printable(f"measuring on {what}")
    if not console.is_terminal:
        console.print(line, markup=False, soft_wrap=True)
        yield lambda count: None
        return
    bar = Progress(
        TextColumn(line, markup=False),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)
    console.print(line, markup=False)


@contextmanager
def looking(total: int) -> Iterator[ProgressCallback]:
    """A bar on stderr over `total` pictures, below what is printed meanwhile."""
    bar = Progress(
        TextColumn("looking at {task.completed:,} of {task.total:,} pictures"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a file or a pipe gets its lines from us, not rich
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)


class DownloadProgress:
    """Shows a download; called with the bytes that are there and all bytes, if known."""

    def __init__(self, name: str) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.name = name
        self.bar = Progress(
            TextColumn(name),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=None)
        self.tenths = 0

    def __enter__(self) -> "DownloadProgress":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is."""
        self.bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """`done` of `total` bytes are there."""
        self.bar.update(self.task, completed=done, total=total)
        if self.bar.disable and total and 10 * done // total > self.tenths:
            self.tenths = 10 * done // total
            self.console.print(f"{self.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
