"""The tutorials run, and their stored outputs match their code."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
BUILD, USE = "build-and-train", "use-a-trained-network"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The first tutorial trains three networks with PyTorch alone. In the tests, the first of these
# networks has 14 layers. The other two have 8 layers and are trained briefly, and their stored
# outputs are checked instead. The tests also train smaller networks with the package, in the first
# tutorial on fewer images.
SHORTENED = {
    BUILD: {
        "model = ResNet()\nhistory": "model = ResNet(n=2)\nhistory",
        "repeats = len(x_train) // 64\n": "repeats = 2\n",
        "fit(ResNet(), x_few": "fit(ResNet(n=1), x_few",
        "plain = ResNet(residual=False)": "plain = ResNet(n=1, residual=False)",
        "fit(plain, x_train, y_train)": "fit(plain, x_train[:96], y_train[:96])",
        'arch="resnet20", epochs=3, val_size=287': 'arch="resnet8", epochs=3, val_size=1000',
    },
    USE: {'arch="resnet20", epochs=20': 'arch="resnet8", epochs=20'},
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run each tutorial in an empty directory. An error in a cell raises an exception."""
    tool = load_tool("notebooks")
    notebooks = {path.stem: read(path) for path in TUTORIALS}
    for name, replacements in SHORTENED.items():
        for code, shorter in replacements.items():
            [cell] = [cell for cell in code_cells(notebooks[name]) if code in cell.source]
            cell.source = cell.source.replace(code, shorter)
    return {
        name: tool.run(notebook, tmp_path_factory.mktemp(name))
        for name, notebook in notebooks.items()
    }


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(output: Any) -> str:
    return output["text"] if output.output_type == "stream" else output.data["text/plain"]


def printed(notebook: Any) -> str:
    return "\n".join(text(output) for cell in code_cells(notebook) for output in cell.outputs)


def epochs(output: str) -> list[list[tuple[float, float]]]:
    """Return the training and validation accuracy of the four epochs of each network."""
    pattern = r"training loss \S+, accuracy (\S+); validation loss \S+, accuracy (\S+)"
    rows = [(float(train), float(val)) for train, val in re.findall(pattern, output)]
    assert len(rows) == 12
    return [rows[:4], rows[4:8], rows[8:]]


def test_there_are_two_tutorials() -> None:
    assert [path.stem for path in TUTORIALS] == [BUILD, USE]


@pytest.mark.parametrize("name", [BUILD, USE])
def test_the_stored_outputs_match_the_code(executed: dict[str, Any], name: str) -> None:
    """Numbers depend on the machine and may differ. If this fails, run tools/notebooks.py."""

    def outputs(cell: Any) -> list[tuple[str, list[str], str]]:
        return [
            (
                output.output_type,
                sorted(output.get("data", {})),
                re.sub(r"\s*-?[0-9][0-9.,e+-]*", " #", text(output)),
            )
            for output in cell.outputs
        ]

    stored = code_cells(read(ROOT / "docs" / "tutorials" / f"{name}.ipynb"))
    for before, after in zip(stored, code_cells(executed[name]), strict=True):
        assert outputs(before) == outputs(after), before.source
        assert before.execution_count == after.execution_count


def test_the_text_of_the_first_tutorial_describes_the_results(executed: dict[str, Any]) -> None:
    """The residual network learns, few images cause overfitting, and the plain network fails."""
    results, stored = printed(executed[BUILD]), printed(read(TUTORIALS[0]))
    [residual, *_], [_, few, plain] = (epochs(output) for output in (results, stored))
    assert min(residual[-1]) > 0.9
    assert residual[0][1] < residual[-1][1] - 0.3
    assert few[-1][0] > 0.99
    assert few[-1][1] < few[-1][0] - 0.1
    assert plain[-1][0] < residual[-1][0] - 0.2
    assert "largest difference between the logits: 0.0\n" in results
    assert "equal to scikit-learn: True" in results
    [low] = re.findall(r"confidence interval: (\S+)% to", results)
    assert float(low) > 90


def test_the_text_of_the_second_tutorial_describes_the_results(executed: dict[str, Any]) -> None:
    """The photo is a cat, and the network trained on few digits is underconfident."""
    results, stored = printed(executed[USE]), printed(read(TUTORIALS[1]))
    assert "same class as predict: True" in results
    assert re.search(r"^cat +9[0-9.]+%|^cat +100.0%", results, re.MULTILINE)
    [mean, logit] = re.findall(r"^(?:mean of the map plus bias|logit): +(\S+)", results, re.M)
    assert float(mean) == pytest.approx(float(logit), abs=1e-3)
    for output in (results, stored):
        [confidence] = re.findall(r"mean confidence: +(\S+)%", output)
        [accuracy] = re.findall(r"^accuracy: +(\S+)%", output, re.MULTILINE)
        assert float(confidence) < float(accuracy) - 2
        [temperature] = re.findall(r"temperature: (\S+)", output)
        assert float(temperature) < 0.95


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_stored_tutorial_is_clean(path: Path) -> None:
    """A notebook has outputs, but no noise, paths, or metadata of the machine that ran it."""
    assert path.stat().st_size < 1_000_000
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata == load_tool("notebooks").METADATA
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    images = 0
    for cell in cells:
        assert set(cell.metadata) <= {"alt", "tags"}, cell.source
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not re.search(r"/\w+/\w+|\\Users|[Ww]arning|0x[0-9a-f]{6}", text(output))
            if "image/png" in output.get("data", {}):
                images += 1
                assert cell.metadata["alt"], cell.source
    assert images >= 8


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_links_in_a_tutorial_are_valid(path: Path) -> None:
    markdown = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", markdown):
        assert (path.parent / target).exists(), target
