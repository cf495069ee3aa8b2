"""The documentation matches the program: generated pages, examples, flags, and names of code."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import onnx_file
from PIL import Image

import resnet56
from resnet56.cli import COMMANDS
from resnet56.data import readers
from resnet56.data.dataset import Dataset, Split

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
COMMAND_LINE = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
THIRD_PARTY = ("mlflow", "onnxruntime", "timm", "wandb")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page, except those in lists, which are incomplete."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, block in enumerate(blocks(page, "python"))
]
COMMAND_BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, block in enumerate(blocks(page, "bash"))
]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["command_line", "run_directory"])
def test_the_reference_is_up_to_date(reference: ModuleType, page: str) -> None:
    """If this fails, run `python tools/reference.py`."""
    file = DOCS / "reference" / f"{page.replace('_', '-')}.md"
    assert file.read_text(encoding="utf-8") == getattr(reference, page)()


def test_every_command_has_a_section(reference: ModuleType) -> None:
    assert reference.commands() == list(COMMANDS)


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


@pytest.fixture
def user_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a directory with the photo, the images and the clone that the pages mention.

    Recipes and data sets are shortened.
    """
    monkeypatch.chdir(tmp_path)
    load = readers.load_data

    def load_some(name: str) -> Dataset:
        data = load(name)
        return dataclasses.replace(data, train=_first(data.train, 128), test=_first(data.test, 32))

    monkeypatch.setattr(readers, "load_data", load_some)
    short = dataclasses.replace(resnet56.RECIPES["quick"], arch="resnet8", epochs=1)
    monkeypatch.setitem(resnet56.RECIPES, "quick", short)
    Image.effect_noise((40, 30), 60).save("photo.jpg")
    for split in ("train", "test"):
        for name, color in (("cat", "gray"), ("dog", "brown")):
            directory = tmp_path / "animals" / split / name
            directory.mkdir(parents=True)
            for size in range(32, 40):
                Image.new("RGB", (size, size), color).save(directory / f"{size}.png")
    (tmp_path / "resnet56").symlink_to(ROOT, target_is_directory=True)
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_python_examples_run(example: str, user_directory: Path) -> None:
    """An example that requires another package runs only if this package is installed."""
    for module in THIRD_PARTY:
        if re.search(rf"^(import|from) {module}\b", example, re.MULTILINE):
            pytest.importorskip(module)
    if "runs/digits" in example:
        data, recipe = resnet56.load_data("digits"), resnet56.RECIPES["quick"]
        resnet56.train(recipe, data, "runs/digits")
    if "net.onnx" in example:
        Path("net.onnx").write_bytes(onnx_file())
    with torch.random.fork_rng():
        exec(compile(example, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", COMMAND_BLOCKS)
def test_documented_flags_exist(block: str) -> None:
    for line in block.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|\| |-m )resnet56 (.*)", line)
        if not found:
            continue
        command, *rest = shlex.split(found[1], comments=True)
        assert command in COMMANDS, line
        section = COMMAND_LINE.partition(f"\n## resnet56 {command}\n")[2].partition("\n## ")[0]
        for word in rest:
            if word.startswith("--"):
                flag = word.partition("=")[0]
                assert re.search(rf"{flag}[ ,|\]\n]", section), f"{flag} in: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_break_in_code_starts_a_list_item(page: Path) -> None:
    """Markdown reads a line that starts with an operator as a list item, even within backticks."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n", prose):
        for code in re.findall(r"`[^`]*`", paragraph):
            assert not re.search(r"\n\s*([*+-]|\d+[.)])\s", code), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documented_files_exist(page: Path) -> None:
    """Paths of code in a page, relative to the package or to the repository."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for path in re.findall(r"`([\w./-]+\.(?:py|c|h))`", text):
        assert (ROOT / "src" / "resnet56" / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "name", ["how-to/extend.md", "explanation/native-step.md", "explanation/gpu-step.md"]
)
def test_documented_names_exist_in_the_code(name: str) -> None:
    """Names in backticks such as `Augmentation.in_epoch` or `RECIPES`."""
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for pattern in ("*.py", "*.[ch]")
        for file in (ROOT / "src" / "resnet56").rglob(pattern)
    )
    text = re.sub(r"^ *```.*?^ *```", "", (DOCS / name).read_text("utf-8"), flags=re.S | re.M)
    for word in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", text):
        if word == "cc":  # a program
            continue
        for part in word.split("."):
            assert re.search(rf"\b{part}\b", code), word
