"""The README's offline commands do what it says, as a new user would run them."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import resnet56

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def offline_commands() -> list[list[str]]:
    """The README's `resnet56 ...` lines that need nothing but the installation."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("resnet56 ")]
    first = next(index for index, words in enumerate(commands) if "cifar10" in words)
    return commands[:first]


def test_the_offline_commands_run_and_the_digits_are_learned(tmp_path: Path) -> None:
    """In order, with all cores; the issue is 97 % of the test digits, in one short training."""
    commands = offline_commands()
    assert [words[1] for words in commands] == [
        "describe", "train", "evaluate", "evaluate", "report", "predict", "export", "predict",
    ]  # fmt: skip
    Image.effect_noise((400, 300), 60).save(tmp_path / "photo.jpg")
    said = []
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "resnet56", *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
        said.append(done.stdout)
    assert said[-1] == said[-3]  # ONNX Runtime's answer is PyTorch's
    assert (tmp_path / "maps" / "photo.cam.png").exists()
    run = tmp_path / "runs" / "digits"
    assert json.loads((run / "evaluation.json").read_text())["test"]["accuracy"] >= 0.97
    tree = README[README.index("runs/digits/\n") :]
    promised = re.findall(r"^  (\S+\.\w+|\S+/)  ", tree[: tree.index("```")], re.MULTILINE)
    assert len(promised) == 9
    for name in promised:
        assert (run / name).exists(), name


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but with a recipe of one short epoch."""
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(resnet56.RECIPES["quick"], arch="resnet8", epochs=1)
    monkeypatch.setitem(resnet56.RECIPES, "quick", short)
    Image.effect_noise((400, 300), 60).save(tmp_path / "photo.jpg")
    [example] = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "from-python" / "evaluation.json").exists()


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r'src="(?!http)([^"]+)"', README):
        assert (ROOT / target).exists(), target
