"""The scripts in examples/ run, and their networks learn the digits."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
CHANCE = 0.1  # accuracy of guessing one of ten digits
THIRD_PARTY = ("lightning",)
OPTIONS = {"distillation": ["--teacher", "resnet8"]}  # smaller, to save time


# Lightning 2.6.6 uses a name that PyTorch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_learns_the_digits(
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each example takes --arch and --epochs, and prints its test accuracies."""
    for module in THIRD_PARTY:
        if re.search(rf"^import {module}$", example.read_text(encoding="utf-8"), re.MULTILINE):
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    options = ["--arch", "resnet8", "--epochs", "2", *OPTIONS.get(example.stem, [])]
    monkeypatch.setattr(sys, "argv", [str(example), *options])
    with torch.random.fork_rng():
        runpy.run_path(str(example), run_name="__main__")
    accuracies = re.findall(r"test accuracy: ([\d.]+)", capsys.readouterr().out)
    assert accuracies
    assert min(map(float, accuracies)) > 2 * CHANCE
