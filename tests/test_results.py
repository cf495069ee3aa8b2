"""docs/results.md matches the files in results/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnet56.runs import pretrained

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RUNS = sorted((ROOT / "results").iterdir())


def test_the_tables_match_the_files() -> None:
    command = [sys.executable, str(ROOT / "tools" / "results.py")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 4
    for table in tables:
        assert table.count("\n") >= 3
        assert table in DOC
    others = DOC.replace("*", "").partition("| source |")[2].partition("\n\n")[0]
    ours = re.findall(r"^\| `resnet56 train (\w+).*?\| (\d\d\.\d\d.*?) \|", others, re.MULTILINE)
    assert [recipe for recipe, _ in ours] == ["he2015", "best"]
    for recipe, accuracy in ours:
        assert re.search(rf"train {recipe} .*{re.escape(accuracy)}", tables[0])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_accuracies_match_the_confusion_matrices(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    totals = {
        "test": 10_000,
        "train": 50_000 - recipe["val_size"],
        "validation": recipe["val_size"],
    }
    for split, total in totals.items():
        if not total:
            continue
        matrix = evaluation[split]["confusion_matrix"]
        assert sum(map(sum, matrix)) == total
        correct = sum(matrix[i][i] for i in range(10))
        assert evaluation[split]["accuracy"] == pytest.approx(correct / total)
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == recipe["epochs"]
    assert re.search(rf"\b{run.name}\b", DOC), "docs/results.md does not name it"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_results_contain_no_local_paths(run: Path) -> None:
    for file in run.iterdir():
        assert not re.search(r'"/|[ "](/tmp|/home|/root|[A-Z]:\\)', file.read_text("utf-8")), file


@pytest.mark.parametrize("name", pretrained.names())
def test_pretrained_networks_match_a_run(name: str) -> None:
    """Half precision changes the predictions of at most a few images."""
    card = pretrained.card(name)
    for run in RUNS:
        if json.loads((run / "recipe.json").read_text("utf-8")) == card["recipe"]:
            evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
            accuracy = card["evaluation"]["test"]["accuracy"]
            assert abs(evaluation["test"]["accuracy"] - accuracy) < 0.001
            return
    pytest.fail(f"{name}'s recipe is not in results/")
