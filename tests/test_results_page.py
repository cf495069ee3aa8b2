"""The documents match the files in results/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet56.recipe import from_fields
from resnet56.runs import pretrained

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
WHY_DIR = ROOT / "docs" / "explanation"
WHY = (WHY_DIR / "why-residual.md").read_text(encoding="utf-8")
RUNS = sorted(file.parent for file in (ROOT / "results").glob("*/recipe.json"))
DIGITS_RUNS = sorted(file.parent for file in (ROOT / "results" / "digits").glob("*/recipe.json"))
CIFAR100_RUNS = sorted(
    file.parent for file in (ROOT / "results" / "cifar100").glob("*/recipe.json")
)
HALF_RUNS = sorted(file.parent for file in (ROOT / "results" / "he2015-half").glob("*/recipe.json"))
LOCAL_PATH = re.compile(r'"/|[ "](/tmp|/home|/root|[A-Z]:\\)')
ALL_RUNS = [*RUNS, *CIFAR100_RUNS, *HALF_RUNS, *DIGITS_RUNS]


def run_tool(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def test_the_tables_match_the_files() -> None:
    tables = run_tool("results.py").strip().split("\n\n")
    assert len(tables) == 8
    for table in tables:
        assert table.count("\n") >= 2
        assert table in DOC
    others = DOC.replace("*", "").partition("| source |")[2].partition("\n\n")[0]
    ours = re.findall(r"^\| `resnet56 train (\w+).*?\| (\d\d\.\d\d.*?) \|", others, re.MULTILINE)
    assert [recipe for recipe, _ in ours] == ["he2015", "best", "best"]
    for recipe, accuracy in ours:
        assert re.search(rf"train {recipe} .*{re.escape(accuracy)}", tables[0] + tables[2])


def test_an_ensemble_averages_probabilities(tmp_path: Path) -> None:
    """One confident network outweighs two that are less confident."""
    labels = indices = np.array([0, 1])
    for name, logit in (("a", 3.0), ("b", -0.4), ("c", -0.4)):
        (tmp_path / name).mkdir()
        logits = np.array([[logit, 0], [0, logit]], dtype=np.float32)
        file = tmp_path / name / "predictions.npz"
        np.savez(file, logits=logits, labels=labels, indices=indices)
    runs = [str(tmp_path / name) for name in "abc"]
    *single, ensemble = run_tool("ensemble.py", *runs).splitlines()
    assert [line.rpartition(": ")[2] for line in single] == ["100.00%", "0.00%", "0.00%"]
    assert ensemble == "ensemble of 3: 100.00%"


def test_an_ensemble_requires_predictions(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "ensemble.py"), str(tmp_path), str(tmp_path)]
    failed = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"{tmp_path} contains no predictions.npz; write it with:")


def test_the_tables_of_plain_and_residual_networks_match_the_files() -> None:
    tables = run_tool("degradation.py").strip().split("\n\n")
    assert [table.count("\n") for table in tables] == [6, 9, 5, 3]
    for table in tables:
        assert table in WHY


def test_the_figures_of_plain_and_residual_networks_match_the_files(tmp_path: Path) -> None:
    run_tool("degradation.py", "draw", str(tmp_path))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(re.findall(r"\]\(([\w-]+\.png)\)", WHY))
    for name in names:
        with Image.open(tmp_path / name) as new, Image.open(WHY_DIR / name) as kept:
            drawn, expected = (np.asarray(one.convert("L"), dtype=float) for one in (new, kept))
        assert drawn.shape == expected.shape
        # Other versions of Matplotlib can change the antialiasing, but not the curves.
        assert np.mean(abs(drawn - expected) > 100) < 0.001, name


@pytest.mark.parametrize("run", ALL_RUNS, ids=lambda run: run.name)
def test_accuracies_match_the_confusion_matrices(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    train, test = (1_437, 360) if run in DIGITS_RUNS else (50_000, 10_000)
    totals = {"test": test, "train": train - recipe["val_size"], "validation": recipe["val_size"]}
    for split, total in totals.items():
        if not total:
            continue
        matrix = evaluation[split]["confusion_matrix"]
        assert sum(map(sum, matrix)) == total
        correct = sum(row[i] for i, row in enumerate(matrix))
        assert evaluation[split]["accuracy"] == pytest.approx(correct / total)
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == recipe["epochs"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_results_page_names_each_run(run: Path) -> None:
    assert re.search(rf"\b{run.name}\b", DOC)


@pytest.mark.parametrize("run", ALL_RUNS, ids=lambda run: run.name)
def test_results_contain_no_local_paths(run: Path) -> None:
    for file in run.iterdir():
        assert not LOCAL_PATH.search(file.read_text("utf-8")), file


@pytest.mark.parametrize("name", pretrained.names())
def test_pretrained_networks_match_a_run(name: str) -> None:
    """Half precision changes the predictions for at most a few images."""
    card = pretrained.card(name)
    recipe, accuracies = from_fields(card["recipe"], name), []
    for run in [*RUNS, *CIFAR100_RUNS]:
        if from_fields(json.loads((run / "recipe.json").read_text("utf-8")), run.name) != recipe:
            continue
        test = json.loads((run / "evaluation.json").read_text("utf-8"))["test"]
        if len(test["per_class"]) == len(card["config"]["classes"]):  # the same data set
            accuracies.append(test["accuracy"])
    assert len(accuracies) == 1, f"{name}: runs in results/ with its recipe and its classes"
    assert abs(accuracies[0] - card["evaluation"]["test"]["accuracy"]) < 0.001


@pytest.mark.parametrize("file", ["CHANGELOG.md", "docs/getting-started.md"])
def test_documented_accuracies_match_the_model_cards(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    for name in pretrained.names():
        accuracy = pretrained.card(name)["evaluation"]["test"]["accuracy"]
        assert re.search(rf"`{name}`[ (|]+(CIFAR-\d+ \| )?{100 * accuracy:.2f} ", text), name


@pytest.mark.parametrize("name", pretrained.names())
def test_model_cards_contain_no_local_paths(name: str) -> None:
    text = (pretrained.DIRECTORY / f"{name}.json").read_text("utf-8")
    assert not LOCAL_PATH.search(text)
