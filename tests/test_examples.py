"""The scripts in examples/ run, and their networks learn."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
COLORS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200), "gray": (110,) * 3}
THIRD_PARTY = ("lightning",)
OPTIONS = {"distillation": ["--teacher", "resnet8"]}  # smaller, to save time


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create noisy images of four colors, which take fewer steps to learn than the digits."""
    root = tmp_path_factory.mktemp("data") / "colors"
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 20)):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(-50, 50, (32, 32, 3))
                Image.fromarray((noise + color).astype(np.uint8)).save(
                    root / split / name / f"{index}.png"
                )
    return root


# Lightning 2.6.6 uses a name that PyTorch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_network_of_the_example_learns(
    example: Path,
    colors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each example takes --arch, --data and --epochs, and prints its test accuracies."""
    source = example.read_text(encoding="utf-8")
    for module in THIRD_PARTY:
        if re.search(rf"^import {module}$", source, re.MULTILINE):
            pytest.importorskip(module)
    assert '"--data", default="digits"' in source
    monkeypatch.chdir(tmp_path)
    options = ["--arch", "resnet8", "--data", str(colors), "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", [str(example), *options, *OPTIONS.get(example.stem, [])])
    with torch.random.fork_rng():
        runpy.run_path(str(example), run_name="__main__")
    accuracies = re.findall(r"test accuracy: ([\d.]+)", capsys.readouterr().out)
    assert accuracies
    assert min(map(float, accuracies)) > 0.8  # guessing gives 0.25
