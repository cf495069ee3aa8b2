"""The commands of the README work for a new user."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from resnet56.cli import main
from resnet56.recipe import RECIPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def offline_commands() -> list[list[str]]:
    """Return the `resnet56 ...` commands that require only the installation."""
    lines = [line for block in blocks(GUIDE, "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("resnet56 ")]
    first = next(index for index, words in enumerate(commands) if "cifar10" in words)
    return commands[:first]


# ResNet-8 replaces the ResNet-56 of the recipe, and networks of eight layers replace those that are
# inspected. They take a tenth of the time. With a higher learning rate, ResNet-8 learns the digits
# in half of the epochs.
SMALLER = {"plain56": "plain8", "resnet56": "resnet8"}
QUICK = replace(RECIPES["quick"], arch="resnet8", epochs=3, lr=0.1)


def test_the_offline_commands_run_and_the_digits_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands run in order. The run must reach 95 % test accuracy on the digits."""
    commands = offline_commands()
    assert [words[1] for words in commands] == [
        "describe", "inspect", "train", "evaluate", "evaluate", "report", "report", "predict",
        "export", "predict",
    ]  # fmt: skip
    shortened = [[SMALLER.get(word, word) for word in words[1:]] for words in commands]
    assert shortened[1][:3] == ["inspect", "plain8", "resnet8"]
    Image.effect_noise((400, 300), 60).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "quick", QUICK)
    printed = []
    for words in shortened:
        assert main(words) == 0, words
        printed.append(capsys.readouterr().out)
    assert printed[-1] == printed[-3]  # ONNX Runtime and PyTorch print the same prediction
    assert (tmp_path / "maps" / "photo.cam.png").exists()
    run = tmp_path / "runs" / "digits"
    assert json.loads((run / "evaluation.json").read_text())["test"]["accuracy"] >= 0.95
    tree = GUIDE[GUIDE.index("runs/digits/\n") :]
    promised = re.findall(r"^  (\S+\.\w+|\S+/)  ", tree[: tree.index("```")], re.MULTILINE)
    assert len(promised) == 9
    for name in promised:
        assert (run / name).exists(), name


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("src/**/*.md")],
    ids=lambda path: path.name,
)
def test_links_to_files_are_valid(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r'(?:src|href)="(?!http)([^"]+)"', text):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150
