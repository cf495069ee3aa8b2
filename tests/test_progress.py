"""The progress of training on a terminal, in a log file and in a notebook."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from resnet56 import progress
from resnet56.progress import (
    LineOutput,
    NotebookOutput,
    Output,
    TerminalOutput,
    TrainingDisplay,
    default_output,
    image_progress,
    stream_output,
)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def run_notebook(directory: Path, *cells: str) -> list[list[dict[str, Any]]]:
    """Run a notebook in a new kernel, and return the stored outputs of each cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(directory)}}
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", allow_errors=True, resources=resources
    )
    client.execute()
    return [cell.outputs for cell in notebook.cells]


# Create a data set and a recipe with which training takes one second.
SETUP = """
import dataclasses, json, signal, torch
from resnet56 import Dataset, RECIPES, Split, train
split = Split(torch.randint(0, 256, (16, 3, 32, 32)).byte(), torch.arange(16) % 2)
data = Dataset("tiny", ("a", "b"), split, split, True, "random images", "nowhere")
recipe = dataclasses.replace(RECIPES["quick"], arch="resnet8", epochs=10, batch_size=3)
"""


def test_a_training_run_stores_one_small_output_in_a_notebook(tmp_path: Path) -> None:
    setup, shown, hidden, stopped, resumed = run_notebook(
        tmp_path,
        SETUP,
        'result = train(recipe, data, "run")',
        'result = train(recipe, data, "hidden", progress=False)',
        'train(recipe, data, "stopped", callbacks=[lambda _: signal.raise_signal(signal.SIGINT)])',
        'print(train(recipe, data, "stopped", resume=True, progress=False)["epoch"])',
    )
    assert setup == []
    [output] = shown
    assert output["data"].keys() == {"text/plain"}
    lines = output["data"]["text/plain"].splitlines()
    assert [line.split("  loss")[0] for line in lines[:10]] == [
        f"epoch {epoch:>2}/10" for epoch in range(1, 11)
    ]
    assert lines[10].startswith("test accuracy ")
    assert len(json.dumps(shown)) < 1_000
    assert hidden == []
    [progress_of_stopped, error] = stopped
    assert progress_of_stopped["data"]["text/plain"].startswith("epoch  1/10")
    message = "training stopped after epoch 1 of 10; the checkpoint is saved in stopped"
    assert error["traceback"] == [f"{message}; continue with resume=True"]
    assert [output["text"] for output in resumed] == ["10\n"]


# Shows 200 epochs of 1,000 steps.
COMMAND = """
import sys
from resnet56.progress import TrainingDisplay, stream_output
with TrainingDisplay(stream_output(sys.stdout)) as display:
    display.begin([1.0] * 200, 1000, 0)
    for step in range(1, 200_001):
        display.step(step, 1.0, 0.5, 100.0)
        if step % 1000 == 0:
            display.epoch({"epoch": step // 1000, "train_loss": 1.0, "train_accuracy": 0.5,
                           "images_per_second": 100.0, "seconds": 1.0})
print("isatty", sys.stdout.isatty())
"""


def test_a_command_in_a_notebook_writes_few_lines(tmp_path: Path) -> None:
    """The notebook would store every character that a progress bar redraws."""
    (tmp_path / "command.py").write_text(COMMAND)
    [outputs] = run_notebook(tmp_path, f"!{sys.executable} command.py")
    text = "".join(output["text"] for output in outputs)
    assert "\x1b" not in text
    assert len(text) < 2_000
    assert "epoch 200/200" in text
    if sys.platform != "win32":
        assert "isatty True" in text


def test_a_notebook_keeps_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    output = NotebookOutput()
    monkeypatch.setattr(output, "_update", lambda **options: None)
    for number in range(50):
        output.log(f"line {number}")
    lines = output.content()["text/plain"].splitlines()
    assert lines == ["(10 earlier lines)", *(f"line {number}" for number in range(10, 50))]


def test_a_notebook_shows_a_bar_and_escapes_names(monkeypatch: pytest.MonkeyPatch) -> None:
    output = NotebookOutput()
    monkeypatch.setattr(output, "_update", lambda **options: None)
    output.log("<b>")
    output.status("a & b", 0.5, "1 < 2")
    html = output.content()["text/html"]
    bar = '<progress value="0.5000"></progress>'
    assert html == f"<pre>&lt;b&gt;\na &amp; b {bar} 1 &lt; 2</pre>"
    output.end()
    assert output.content() == {"text/plain": "<b>"}


def test_a_terminal_shows_a_bar_and_removes_it() -> None:
    stream = Terminal()
    output = stream_output(stream)
    assert isinstance(output, TerminalOutput)
    output.status("epoch 1/2", 0.5, "loss 1.0")
    output.log("line")
    output.end()
    assert "epoch 1/2" in stream.getvalue()
    assert stream.getvalue().count("line\n") == 1
    assert stream.getvalue().endswith("\x1b[2K")  # the bar is erased


@pytest.mark.parametrize("terminal", [True, False])
def test_python_shows_progress_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    assert type(default_output()) is (TerminalOutput if terminal else Output)
    assert type(default_output(True)) is (TerminalOutput if terminal else LineOutput)
    assert type(default_output(False)) is Output


def test_lines_show_the_status_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with image_progress(LineOutput(stream), "evaluating", 1000) as advance:
        for clock[0] in (20.0, 59.0, 61.0, 100.0):
            advance(100)
    assert stream.getvalue() == "evaluating\n  evaluating  300 of 1,000 images  2:22 left\n"


def test_the_remaining_time_accounts_for_faster_small_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs take a quarter of the time of the other two. Each has ten steps."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    display = TrainingDisplay(LineOutput(stream))
    display.begin([0.25, 0.25, 1.0, 1.0], 10, 4)  # resumed after four steps
    clock[0] = 400.0
    display.step(8, 1.0, 0.5, 100.0)  # 100 s per quarter; 2 + 10 quarters and 20 wholes are left
    assert stream.getvalue().strip().endswith("2:33:20 left")
    clock[0] = 2400.0
    display.step(25, 1.0, 0.5, 100.0)  # 16 quarters and 5 wholes; 15 wholes are left
    assert stream.getvalue().strip().endswith("1:06:40 left")
