"""Comparisons of runs: groups of seeds, significance tests, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import BEST, make_run

from resnet56.cli import main
from resnet56.errors import RunError
from resnet56.report import comparison, write_report
from resnet56.report.read import read_run
from resnet56.runs.directory import RunDirectory


def compared(*runs: Path) -> tuple[list[comparison.Group], list[comparison.Difference]]:
    groups = comparison.groups(comparison.ranked([read_run(run) for run in runs]))
    return groups, comparison.differences(groups)


def seeds(path: Path, lr: float, accuracies: tuple[float, ...]) -> list[Path]:
    return [
        make_run(path / f"{lr}-{i}", replace(BEST, lr=lr, seed=i), accuracy=share, seed=i)
        for i, share in enumerate(accuracies)
    ]


def test_the_best_group_is_not_the_group_of_the_best_run(tmp_path: Path) -> None:
    steady = seeds(tmp_path, 0.1, (0.90, 0.90, 0.90))
    lucky = seeds(tmp_path, 0.2, (0.95, 0.70))
    groups, [pair] = compared(*lucky, *steady)
    assert [group.seeds for group in groups] == [[0, 1, 2], [0, 1]]
    assert groups[1].accuracies[0] > max(groups[0].accuracies)
    assert pair.better is groups[0]
    assert pair.test == "Welch"
    assert not pair.significant
    expected = comparison.compare_means(groups[0].accuracies, groups[1].accuracies)
    assert pair.result == expected


@pytest.mark.usefixtures("blank_charts")
def test_single_runs_are_compared_image_by_image(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", accuracy=0.93, seed=1)
    b = make_run(tmp_path / "b", replace(BEST, lr=0.2), accuracy=0.90, seed=2)
    _, [pair] = compared(a, b)
    assert pair.test == "McNemar"
    files = [RunDirectory(run).read_predictions() for run in (a, b)]
    right = [f["logits"].argmax(axis=1) == f["labels"] for f in files if f is not None]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert isinstance(pair.result, comparison.Paired)
    assert [pair.result.only_first, pair.result.only_second] == only
    assert pair.result.difference == pytest.approx(right[0].mean() - right[1].mean())
    for format in ("html", "md"):
        page = write_report([a, b], tmp_path / f"c.{format}", format=format)
        assert "McNemar" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("blank_charts")
def test_imported_networks_are_compared_with_a_run_image_by_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = make_run(tmp_path / "ours", accuracy=0.93, seed=1)
    theirs = [make_run(tmp_path / name, accuracy=0.9, seed=2) for name in ("theirs", "other")]
    for run in theirs:
        for file in ("recipe.json", "metrics.jsonl"):
            (run / file).unlink()
    groups, pairs = compared(*theirs, ours)
    assert [group.seeds for group in groups] == [[0], [], []]
    assert [pair.test for pair in pairs] == ["McNemar"] * 3
    assert main(["compare", str(ours), str(theirs[0]), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [[run["seed"] for run in group["runs"]] for group in result["groups"]] == [[0], [None]]
    assert result["title"].startswith("2 networks compared: the best reaches")
    assert main(["compare", str(ours), *map(str, theirs)]) == 0
    for format in ("html", "md"):
        file = write_report([ours, *theirs], tmp_path / f"c.{format}", format=format)
        text = file.read_text(encoding="utf-8")
        assert "theirs and other have no recorded recipe and no training curves." in text


def test_p_values_are_adjusted_for_all_pairs(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / str(lr), replace(BEST, lr=lr), accuracy=share, seed=7)
        for lr, share in ((0.1, 0.93), (0.2, 0.92), (0.3, 0.90))
    ]
    _, pairs = compared(*runs)
    raw = [pair.result.p_value for pair in pairs]
    assert [pair.p_value for pair in pairs] == comparison.holm(raw)
    assert max(pair.p_value for pair in pairs) >= max(raw)
    assert len(pairs) == 3


def test_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", replace(BEST, seed=0), accuracy=0.9)
    again = make_run(tmp_path / "again", replace(BEST, seed=0), accuracy=0.9)
    b = make_run(tmp_path / "b", replace(BEST, seed=1), accuracy=0.9)
    [group], _ = compared(a, again, b)
    assert group.seeds == [0, 1]


def test_predictions_of_another_evaluation_are_rejected(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", accuracy=0.93)
    b = make_run(tmp_path / "b", replace(BEST, lr=0.2), accuracy=0.5)
    (a / "predictions.npz").write_bytes((b / "predictions.npz").read_bytes())
    with pytest.raises(RunError, match=r"a/predictions\.npz does not match evaluation\.json"):
        compared(a, b)
    (a / "predictions.npz").unlink()
    groups, pairs = compared(a, b)
    assert len(groups) == 2
    assert not pairs


def test_images_in_another_order_are_not_paired(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", accuracy=0.93)
    b = make_run(tmp_path / "b", replace(BEST, lr=0.2), accuracy=0.9)
    arrays = RunDirectory(b).read_predictions()
    assert arrays is not None
    RunDirectory(b).write_predictions({name: array[::-1] for name, array in arrays.items()})
    _, pairs = compared(a, b)
    assert not pairs


def test_the_command_prints_tables_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = seeds(tmp_path, 0.1, (0.93, 0.94, 0.935))
    poor = seeds(tmp_path, 0.2, (0.60, 0.61, 0.62))
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, good + poor), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "6 runs compared: the best group reaches" in printed
    assert "Welch" in printed
    assert "The difference is significant (p < 0.05)." in printed
    assert "With 3 and 3 runs, the permutation test cannot yield a p-value below 0.1." in printed
    assert "Welch" in page.read_text(encoding="utf-8")
    assert main(["compare", *map(str, good + poor), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    accuracies = [
        json.loads((run / "evaluation.json").read_text())["test"]["accuracy"] for run in good
    ]
    assert [run["test_accuracy"] for run in result["groups"][0]["runs"]] == accuracies
    assert result["groups"][0]["mean"] == pytest.approx(np.mean(accuracies))
    [pair] = result["differences"]
    assert (pair["better"], pair["other"], pair["test"], pair["significant"]) == (
        0,
        1,
        "Welch",
        True,
    )
    assert pair["permutation_p_value"] == pytest.approx(0.1)


def test_runs_that_cannot_be_compared_cause_one_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "a", images=100, fingerprint="1")
    other = make_run(tmp_path / "other", images=100, fingerprint="2")
    untested = make_run(tmp_path / "untested", done=0, tested=False)
    for arguments, message in (
        ([a], "at least two runs"),
        ([a, other], "were tested on different images; compare runs on the same data set"),
        ([a, untested], "untested has not been evaluated; evaluate it first: resnet56 evaluate .*"),
        ([a, tmp_path / "missing"], "missing"),
    ):
        assert main(["compare", *map(str, arguments)]) != 0
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1
