"""What a person is told while they wait."""

import io

import pytest
from rich.console import Console

from resnet56 import progress
from resnet56.progress import TrainingDisplay


def test_the_time_left_knows_that_small_images_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of a quarter of the work each, then two whole ones; ten steps in each."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    said = io.StringIO()
    shown = TrainingDisplay(console=Console(file=said))
    shown.begin([0.25, 0.25, 1.0, 1.0], 10, 4)  # resumed after four steps
    clock[0] = 400.0
    shown.step(8, 1.0, 0.5, 100.0)  # 400 s for 4 quarters; 2 + 10 quarters and 20 wholes to go
    assert said.getvalue().strip().endswith("2:33:20 left")  # 100 s a quarter
    clock[0] = 2400.0
    shown.step(25, 1.0, 0.5, 100.0)  # for 16 quarters and 5 wholes: 15 wholes to go
    assert said.getvalue().strip().endswith("1:06:40 left")
