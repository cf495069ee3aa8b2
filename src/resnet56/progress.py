"""Progress display: a live bar on a terminal, plain lines elsewhere."""

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

from resnet56.errors import escape_line

ProgressCallback = Callable[[int], None]

LINE_EVERY = 60.0  # seconds between lines within an epoch, if the output is not a terminal


def percent(fraction: float) -> str:
    """0.9303 -> '93.03 %'."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """90 -> '1:30', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingDisplay:
    """Displays the steps and epochs of a training run, or nothing if `quiet` is true."""

    def __init__(self, *, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.quiet = quiet
        self.costs: Sequence[float] = ()
        self.steps = self.done = 0
        self.bar: Progress | None = None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> "TrainingDisplay":
        """Return self. The display starts with `begin`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def log(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.quiet:
            # Wrap long lines on a terminal, but not in a log file.
            self.console.print(
                escape_line(line), markup=False, soft_wrap=not self.console.is_terminal
            )

    def evaluation_progress(
        self, description: str, total: int
    ) -> AbstractContextManager[ProgressCallback]:
        """Show the progress of an evaluation after training."""
        if self.bar is not None:
            self.bar.stop()
        return evaluation_progress(description, total, self.console, quiet=self.quiet)

    def begin(self, costs: Sequence[float], steps: int, done: int) -> None:
        """Start the display of a training run.

        Args:
            costs: relative duration of a step, for each epoch.
            steps: steps per epoch.
            done: steps already finished, if the run is resumed.
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
        """Return the relative duration of the first `step` steps."""
        epoch, remainder = divmod(step, self.steps)
        return self.steps * sum(self.costs[:epoch]) + (
            remainder * self.costs[epoch] if remainder else 0
        )

    def step(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show the state after `step` steps in total. Metrics are means over the epoch so far."""
        if self.quiet:
            return
        now = time.monotonic()
        work = self._work(step)
        total = self._work(len(self.costs) * self.steps)
        left = (now - self.started) * (total - work) / (work - self._work(self.done))
        epoch = f"{(step - 1) // self.steps + 1}/{len(self.costs)}"
        speed = f"{images_per_second:.0f} img/s"
        numbers = f"loss {loss:.3f}  acc {percent(accuracy)}  {speed}  {duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=work, epoch=epoch, numbers=numbers)
        elif now - self.last_line >= LINE_EVERY:
            self.last_line = now
            self.log(f"  in epoch {epoch}  {numbers}")

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the metrics of a finished epoch. `row` is its row of metrics.jsonl."""
        self.last_line = time.monotonic()
        epochs = len(self.costs)
        line = (
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
            f"  loss {row['train_loss']:.4f}  acc {percent(row['train_accuracy'])}"
        )
        if "val_accuracy" in row:
            line += f"  val {percent(row['val_accuracy'])}"
        if "test_accuracy" in row:
            line += f"  test {percent(row['test_accuracy'])}"
        self.log(f"{line}  {row['images_per_second']:.0f} img/s  {duration(row['seconds'])}")


@contextmanager
def evaluation_progress(
    description: str, total: int, console: Console, *, quiet: bool = False
) -> Iterator[ProgressCallback]:
    """Print what is being evaluated, and show a progress bar on a terminal.

    Yields:
        A function to call with the number of images processed since the last call.
    """
    if quiet:
        yield lambda count: None
        return
    line = escape_line(f"evaluating on {description}")
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
def prediction_progress(total: int) -> Iterator[ProgressCallback]:
    """Show a progress bar for `total` images on stderr, below the printed results."""
    bar = Progress(
        TextColumn("{task.completed:,} of {task.total:,} images"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # rich must not change a file or a pipe
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)


class DownloadProgress:
    """Displays a download. Call it with the received bytes and the total, or None if unknown."""

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
        """Stop the bar, and leave it on the screen."""
        self.bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` bytes have been received."""
        self.bar.update(self.task, completed=done, total=total)
        if self.bar.disable and total and 10 * done // total > self.tenths:
            self.tenths = 10 * done // total
            self.console.print(f"{self.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
