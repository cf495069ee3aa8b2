"""Display progress: a status line on a terminal or in a notebook, lines of plain text elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from resnet56.errors import escape_line

if TYPE_CHECKING:
    from resnet56.runs.schema import EpochMetrics, Evaluation

# A function that is called with the number of images processed since the last call.
ProgressCallback = Callable[[int], None]
# A function that creates progress callbacks from a description and the number of images.
ProgressFactory = Callable[[str, int], AbstractContextManager[ProgressCallback]]

LINE_EVERY = 60.0  # seconds between status lines if the output is not a terminal
SKIP_WITHIN = 5.0  # minimum seconds between epoch lines of a command in a notebook
UPDATE_EVERY = 0.25  # minimum seconds between updates of a notebook's output
NOTEBOOK_LINES = 40  # maximum number of lines in a notebook's output


def percent(fraction: float) -> str:
    """Format a fraction: 0.9303 -> '93.03 %'."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Format a duration: 90 -> '1:30', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def no_progress(description: str, total: int) -> AbstractContextManager[ProgressCallback]:
    """A `ProgressFactory` that displays nothing."""
    return nullcontext(lambda count: None)


class Output:
    """Displays lines of text and the status of a task. This base class displays nothing."""

    def log(self, line: str, *, skippable: bool = False) -> None:
        """Show a line. Outputs with limited space may omit skippable lines."""

    def begin(self, label: str) -> None:
        """Begin a task."""
        self.status(label, 0.0, "")

    def status(self, label: str, fraction: float, text: str) -> None:
        """Show the status of the task: its label, the completed fraction and details."""

    def end(self) -> None:
        """End the task, and remove its status."""


class LineOutput(Output):
    """Writes lines of plain text to a stream, such as a log file.

    Args:
        stream: text stream.
        brief: write no status, and omit skippable lines that closely follow another line.
    """

    def __init__(self, stream: TextIO, *, brief: bool = False) -> None:
        self.stream = stream
        self.brief = brief
        self.last_line = time.monotonic()

    def log(self, line: str, *, skippable: bool = False) -> None:
        """Write a line."""
        now = time.monotonic()
        if skippable and self.brief and now - self.last_line < SKIP_WITHIN:
            return
        self.last_line = now
        print(escape_line(line), file=self.stream, flush=True)

    def begin(self, label: str) -> None:
        """Write the label."""
        self.log(label)

    def status(self, label: str, fraction: float, text: str) -> None:
        """Write the status if no line was written in the last minute."""
        if not self.brief and time.monotonic() - self.last_line >= LINE_EVERY:
            self.log(f"  {label}  {text}")


class TerminalOutput(Output):
    """Writes lines to a terminal, with the status and a bar below them."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, force_terminal=True, highlight=False)
        self.bar: Progress | None = None

    def log(self, line: str, *, skippable: bool = False) -> None:
        """Write a line above the status."""
        self.console.print(escape_line(line), markup=False)

    def status(self, label: str, fraction: float, text: str) -> None:
        """Show the status."""
        if self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # do not redirect output to a file or a pipe
            )
            self.bar.add_task("", total=1.0)
        task = self.bar.task_ids[0]
        self.bar.update(task, description=escape_line(label), completed=fraction, text=text)
        self.bar.start()  # has no effect if the bar is already visible

    def end(self) -> None:
        """Remove the status."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class NotebookOutput(Output):
    """Shows everything in one output of a notebook cell, and updates this output.

    The notebook stores only the latest content of the output, which has a limited number of lines.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.state: tuple[str, float, str] | None = None
        self.handle: Any = None  # an IPython.display.DisplayHandle
        self.updated = 0.0

    def log(self, line: str, *, skippable: bool = False) -> None:
        """Show a line."""
        self.lines.append(escape_line(line))
        self._update(force=not skippable)

    def status(self, label: str, fraction: float, text: str) -> None:
        """Show the status below the lines."""
        self.state = (escape_line(label), fraction, text)
        self._update()

    def end(self) -> None:
        """Remove the status."""
        self.state = None
        self._update(force=True)

    def _update(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self.updated >= UPDATE_EVERY:
            self.updated = now
            if self.handle is not None:
                self.handle.update(self.content(), raw=True)
            elif self.lines or self.state:
                from IPython.display import display

                self.handle = display(self.content(), raw=True, display_id=True)

    def content(self) -> dict[str, str]:
        """Return the content of the output for each MIME type."""
        lines = self.lines[-NOTEBOOK_LINES:]
        if earlier := len(self.lines) - len(lines):
            lines = [f"({earlier} earlier lines)", *lines]
        if self.state is None:
            return {"text/plain": "\n".join(lines)}
        label, fraction, numbers = self.state
        bar = f'<progress value="{fraction:.4f}"></progress>'
        status = f"{escape(label)} {bar} {escape(numbers)}"
        return {
            "text/plain": "\n".join([*lines, f"{label}  {100 * fraction:.0f} %  {numbers}"]),
            "text/html": "<pre>" + "\n".join([*map(escape, lines), status]) + "</pre>",
        }


def stream_output(stream: TextIO) -> Output:
    """Return the `Output` for a stream: a status line on a terminal, lines of plain text elsewhere.

    A command in a notebook cell (`!resnet56 train`) writes to a terminal, but the notebook stores
    every character. The command therefore writes only a few lines of plain text.
    """
    brief = _started_by_notebook()
    if stream.isatty() and not brief:
        return TerminalOutput(stream)
    return LineOutput(stream, brief=brief)


def default_output(show: bool | None = None) -> Output:
    """Return the `Output` for a function that the user calls from Python.

    Args:
        show: whether to show progress. By default, show it only in a notebook or on a terminal.
    """
    if show is False:
        return Output()
    if _in_notebook():
        return NotebookOutput()
    if sys.stderr is not None and (show or sys.stderr.isatty()):
        return stream_output(sys.stderr)
    return Output()


def _in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _started_by_notebook() -> bool:
    """Return whether a notebook started this process. ipykernel sets the variables in `names`."""
    names = ("TERM", "PAGER", "GIT_PAGER")
    return [os.environ.get(name) for name in names] == ["xterm-color", "cat", "cat"]


class TrainingDisplay:
    """Displays the steps, epochs and results of a training run."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.costs: Sequence[float] = ()
        self.steps = self.done = 0
        self.started = time.monotonic()

    def __enter__(self) -> "TrainingDisplay":
        """Return self. `begin` starts the display."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the status."""
        self.output.end()

    def log(self, line: str) -> None:
        """Show a line."""
        self.output.log(line)

    @contextmanager
    def evaluation_progress(self, description: str, total: int) -> Iterator[ProgressCallback]:
        """Show the progress of an evaluation after training."""
        self.output.end()
        with image_progress(self.output, f"evaluating on {description}", total) as advance:
            yield advance

    def begin(self, costs: Sequence[float], steps: int, done: int) -> None:
        """Start the display of a training run.

        Args:
            costs: relative duration of a step in each epoch.
            steps: number of steps per epoch.
            done: number of finished steps if the run is resumed.
        """
        self.costs, self.steps, self.done = costs, steps, done
        self.started = time.monotonic()
        self.output.status("training", self._work(done) / self._work(len(costs) * steps), "")

    def _work(self, step: int) -> float:
        """Return the relative duration of the first `step` steps."""
        epoch, remainder = divmod(step, self.steps)
        return self.steps * sum(self.costs[:epoch]) + (
            remainder * self.costs[epoch] if remainder else 0
        )

    def step(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show the status after `step` steps. Metrics are means over the current epoch."""
        work, total = self._work(step), self._work(len(self.costs) * self.steps)
        elapsed = time.monotonic() - self.started
        left = elapsed * (total - work) / (work - self._work(self.done))
        epoch = f"{(step - 1) // self.steps + 1}/{len(self.costs)}"
        speed = f"{images_per_second:.0f} img/s"
        numbers = f"loss {loss:.3f}  acc {percent(accuracy)}  {speed}  {duration(left)} left"
        self.output.status(f"epoch {epoch}", work / total, numbers)

    def epoch(self, row: "EpochMetrics") -> None:
        """Show the metrics of a finished epoch."""
        epochs = len(self.costs)
        line = (
            f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
            f"  loss {row['train_loss']:.4f}  acc {percent(row['train_accuracy'])}"
        )
        if "val_accuracy" in row:
            line += f"  val {percent(row['val_accuracy'])}"
        if "test_accuracy" in row:
            line += f"  test {percent(row['test_accuracy'])}"
        line += f"  {row['images_per_second']:.0f} img/s  {duration(row['seconds'])}"
        self.output.log(line, skippable=row["epoch"] < epochs)

    def result(self, evaluation: "Evaluation") -> None:
        """Show the metrics of the trained model."""
        if val := evaluation.get("validation"):
            self.log(
                f"validation accuracy {percent(val['accuracy'])}, loss {val['loss']:.4f}, "
                f"{val['n']:,} images; use it to choose between settings"
            )
        test, train = evaluation["test"], evaluation["train"]
        low, high = test["accuracy_interval"]
        self.log(
            f"test accuracy {percent(test['accuracy'])} "
            f"(95 % interval {100 * low:.2f} to {100 * high:.2f}), loss {test['loss']:.4f}, "
            f"{test['n']:,} images"
        )
        self.log(
            f"training accuracy {percent(train['accuracy'])}, loss {train['loss']:.4f}, "
            f"{train['n']:,} images without augmentation"
        )


@contextmanager
def image_progress(output: Output, label: str, total: int) -> Iterator[ProgressCallback]:
    """Show how many of `total` images have been processed.

    Yields:
        A function to call with the number of images processed since the last call.
    """
    started, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        left = duration((time.monotonic() - started) * (total - done) / max(done, 1))
        output.status(label, done / total, f"{done:,} of {total:,} images  {left} left")

    output.begin(label)
    try:
        yield advance
    finally:
        output.end()


class DownloadProgress:
    """Displays a download.

    Each call passes the number of bytes received so far, and the total number of bytes.
    """

    def __init__(self, name: str) -> None:
        self.output = default_output(True)
        self.name = name
        self.started = time.monotonic()
        self.first: int | None = None  # bytes already received at the first call
        self.done = 0

    def __enter__(self) -> "DownloadProgress":
        """Return self. The first call starts the display."""
        return self

    def __exit__(self, *_: object) -> None:
        """Replace the status with a line that states the number of bytes received."""
        self.output.end()
        if self.done:
            self.output.log(f"{self.name}: {self.done / 1e6:.0f} MB received")

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` bytes (None if unknown) have been received."""
        if self.first is None:
            self.first, self.started = done, time.monotonic()
        self.done = done
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        size = f" of {total / 1e6:.0f}" if total else ""
        text = f"{done / 1e6:.0f}{size} MB  {rate / 1e6:.1f} MB/s"
        self.output.status(self.name, done / total if total else 0.0, text)
