"""Reports show the numbers in the files, escape names, and are self-contained."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from browsers import chromium
from report_fixtures import BEST, CIFAR, NUMBERS, PARITY, Page, make_run, samples

from resnet56 import cli
from resnet56.errors import RunError, UsageError
from resnet56.files import read_json, write_json
from resnet56.recipe import RECIPES, Recipe
from resnet56.report import plots, recipe_words, story, words, write_report
from resnet56.report.comparison import content
from resnet56.report.page import stories
from resnet56.report.read import read_run
from resnet56.report.render import escape_markdown, unbroken
from resnet56.runs.directory import RunDirectory
from resnet56.samples import MAX_MISTAKES

EVIL = ("<script>alert(1)</script>", "猫 & \"Hund\" $x_1$ | `b` 'c'")


def page_of(run: Path, **options: Any) -> Page:
    return Page(write_report([run], **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with all optional files, and its report."""
    recipe = replace(BEST, val_size=500)
    run = make_run(tmp_path_factory.mktemp("full") / "run", recipe, extras=True)
    write_report([run])
    return run


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return Page((full / "report.html").read_text(encoding="utf-8"))


# One run's page


def test_the_headline_equals_the_evaluation(full: Path, page: Page) -> None:
    evaluation = read_json(full / "evaluation.json")
    test, train = evaluation["test"], evaluation["train"]
    low, high = test["accuracy_interval"]
    gap = 100 * (train["accuracy"] - test["accuracy"])
    assert page.by_id["test-accuracy"] == f"{100 * test['accuracy']:.2f} %"
    assert page.by_id["test-interval"] == f"{100 * low:.2f} % to {100 * high:.2f} %"
    assert page.by_id["train-accuracy"] == f"{100 * train['accuracy']:.2f} %"
    assert page.by_id["gap"] == f"{gap:+.2f} points"
    assert page.by_id["parameters"] == "853,018"
    seconds = sum(row["seconds"] for row in RunDirectory(full).read_metrics())
    assert page.by_id["time"] == words.duration(seconds)
    assert page.by_id["ece"] == f"{test['calibration']['ece']:.4f}"
    assert page.by_id["brier"] == f"{test['calibration']['brier']:.4f}"


def test_the_tables_equal_the_evaluation(full: Path, page: Page) -> None:
    test = read_json(full / "evaluation.json")["test"]
    head, *rows = page.tables["confusion"]
    assert head[1:] == list(CIFAR)
    assert [row[0] for row in rows] == list(CIFAR)
    assert [[int(cell) for cell in row[1:]] for row in rows] == test["confusion_matrix"]
    for name, row in zip(CIFAR, page.tables["per-class"][1:-2], strict=True):
        scores = test["per_class"][name]
        expected = [f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")]
        assert row == [name, *expected, f"{scores['support']:.0f}"]


def test_all_measurements_are_shown(page: Page) -> None:
    assert PARITY["comparisons"][0]["verdict"] in page.text
    assert "the mean accuracy is 73.25 %" in page.text
    assert "4.732" in page.text
    labels = [v for tag, name, v in page.attributes if (tag, name) == ("img", "alt")]
    assert sum(alt.startswith("Test image") for alt in labels) == 24
    assert sum(alt.endswith("augmented") for alt in labels) == 30
    assert "was not measured" not in page.text


def test_the_page_is_well_formed_and_self_contained(full: Path, page: Page) -> None:
    text = (full / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "http://" not in text
    assert "https://" not in text
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("data:", "#")), (tag, name, value)
        assert not name.startswith("on"), (tag, name)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    anchors = [v[1:] for tag, name, v in page.attributes if (tag, name) == ("a", "href")]
    assert set(anchors) <= set(page.ids)
    used = re.findall(r"url\(#([^)]*)\)", text)
    assert used
    assert set(used) <= set(page.ids)
    assert not re.search(r"#0[1-4]0[0-4]0[0-7]\b", text)  # all placeholders were replaced


def test_reports_are_deterministic(full: Path, tmp_path: Path) -> None:
    again = write_report([full], tmp_path / "again.html")
    assert again.read_bytes() == (full / "report.html").read_bytes()


@pytest.mark.usefixtures("blank_charts")
def test_a_plain_network_is_not_described_as_residual(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / arch, replace(BEST, arch=arch)) for arch in ("plain56", "resnet56")]
    plain, residual = (page_of(run) for run in runs)
    assert plain.text.count("Plain-56") >= 2
    for phrase in ("residual", "shortcut samples", "ResNet-56"):
        assert phrase not in plain.text
        assert phrase in residual.text
    markdown = write_report([runs[0]], format="md").read_text(encoding="utf-8")
    assert "It consists of basic blocks without shortcuts." in markdown


def test_an_unfinished_run_is_reported_as_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=3, tested=False)
    page = page_of(run)
    assert "has completed 3 of 200 epochs" in page.text
    assert "has not been tested" in page.text
    assert "resnet56 evaluate" not in page.text
    assert "test-accuracy" not in page.by_id
    assert "loss-figure_1" in page.ids


@pytest.mark.usefixtures("blank_charts")
def test_measurements_of_earlier_weights_are_not_shown(tmp_path: Path) -> None:
    """The run was trained further after its evaluation."""
    run = make_run(tmp_path / "run", extras=True)
    evaluation = read_json(run / "evaluation.json")
    write_json(run / "evaluation.json", evaluation | {"epoch": 3, "step": 390 * 3})
    parity = read_json(run / "parity.json")["comparisons"]
    write_json(run / "parity.json", {"comparisons": [one | {"step": 390 * 3} for one in parity]})
    page = page_of(run)
    assert "finished, but it has not been tested" in page.text
    assert f"To test the run: resnet56 evaluate {run}\n" in page.text
    assert "test-accuracy" not in page.by_id
    for comparison in parity:
        assert comparison["verdict"] not in page.text
    assert "its predicted class" not in page.text  # and their mistakes are not shown
    other = make_run(tmp_path / "other")
    compared = Page(write_report([run, other], tmp_path / "c.html").read_text(encoding="utf-8"))
    assert [row[1] for row in compared.tables["runs"][1:]] == ["other", "run"]
    assert "None of the differences can be tested for significance." in compared.text


@pytest.mark.usefixtures("blank_charts")
@pytest.mark.parametrize("tested", [True, False])
def test_an_imported_network_has_no_recipe_and_no_curves(tmp_path: Path, tested: bool) -> None:
    run = make_run(tmp_path / "theirs", done=0, tested=tested, extras=tested)
    for file in ("recipe.json", "environment.json", "metrics.jsonl"):
        (run / file).unlink()
    page = page_of(run)
    assert "so the run has no recipe and no training curves" in page.text
    assert "The training curves are not recorded." in page.text
    assert "recipe" not in page.ids
    assert ("test-accuracy" in page.by_id) == tested
    command = f"To evaluate it: resnet56 evaluate {run} --data DIR"
    assert (command in page.text) == (not tested)
    labels = [v for tag, name, v in page.attributes if (tag, name) == ("img", "alt")]
    assert not any(alt.endswith("augmented") for alt in labels)
    markdown = write_report([run], format="md").read_text(encoding="utf-8")
    assert "no recipe and no training curves" in markdown
    assert "augmented" not in markdown.replace("not augmented", "")
    assert "unfinished" not in markdown


def test_a_network_may_have_been_trained_on_other_images(full: Path) -> None:
    """Pretrained weights have a recipe, but can be evaluated on any data set."""
    facts = read_run(full)
    trained, other = (stories(replace(facts, stored=stored)) for stored in (True, False))
    assert trained["gap"][0].startswith("The network overfits:")
    assert trained["gap"][0].endswith("It was trained with augmentation.")
    assert other["gap"][0].startswith("The network probably overfits:")
    assert "compare the network with others" in other["meeting"][-1]
    assert other["optimizer"] == trained["optimizer"]


def test_a_directory_is_rejected_as_output(full: Path, tmp_path: Path) -> None:
    for form in ("html", "md"):
        with pytest.raises(
            UsageError, match=rf"is a directory; choose a file such as .*report\.{form}"
        ):
            write_report([full], tmp_path, format=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("blank_charts")
def test_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, replace(BEST, seed=seed), accuracy=share, seed=number)
        for number, (name, seed, share) in enumerate((("a", 0, 0.9), ("b", 0, 0.8), ("c", 1, 0.7)))
    ]
    page = Page(write_report(runs, tmp_path / "c.html").read_text(encoding="utf-8"))
    shares = [read_json(tmp_path / name / "evaluation.json")["test"]["accuracy"] for name in "ac"]
    assert f"{50 * sum(shares):.2f}" in " ".join(page.tables["seed-groups"][1])


def test_a_report_before_the_first_epoch_has_no_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=0, tested=False)
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").unlink()
    page = page_of(run)
    assert "No epoch is finished yet" in page.text
    assert "The machine of this run was not recorded" in page.text
    assert "figure_1" not in " ".join(page.ids)


def test_class_names_with_markup_are_escaped(tmp_path: Path) -> None:
    recipe = replace(BEST, epochs=1)
    run = make_run(tmp_path / "run", recipe, EVIL, images=200, extras=True)
    page = page_of(run)
    assert page.tags.count("script") == 3  # the scripts of the page itself
    assert page.tables["per-class"][1][0] == EVIL[0]
    assert page.tables["confusion"][2][0] == EVIL[1]
    titles = [value for tag, name, value in page.attributes if name == "title"]
    assert any(EVIL[0] in title and EVIL[1] in title for title in titles)
    assert "One epoch is not enough to show a trend." in page.text


def test_a_report_of_100_classes_is_smaller_than_3_mb(tmp_path: Path) -> None:
    classes = tuple(f"class number {i:02} $x_{i}$" for i in range(100))
    run = make_run(tmp_path / "run", classes=classes, accuracy=0.6, images=5000)
    np.savez_compressed(run / "samples.npz", **samples(classes, mistakes=MAX_MISTAKES))
    out = write_report([run])
    assert out.stat().st_size < 3_000_000
    page = Page(out.read_text(encoding="utf-8"))
    matrix = read_json(run / "evaluation.json")["test"]["confusion_matrix"]
    rows = page.tables["confusion"][1:]
    assert [[int(cell) for cell in row[1:]] for row in rows] == matrix


def test_more_than_150_classes_are_shown_in_a_confusion_chart(tmp_path: Path) -> None:
    classes = tuple(f"{i}" for i in range(151))
    page = page_of(make_run(tmp_path / "run", classes=classes))
    assert "confusion" not in page.tables
    assert "confusion-figure_1" in page.ids


@pytest.mark.usefixtures("blank_charts")
def test_the_page_of_a_tested_run_suggests_what_to_say_in_a_meeting(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    environment = read_json(run / "environment.json")
    environment["data"]["source"] = "CIFAR-10 (official split): 50,000 training images"
    write_json(run / "environment.json", environment)
    page = page_of(run)
    sentences = page.by_id["meeting"]
    share = read_json(run / "evaluation.json")["test"]["accuracy"]
    assert f"ResNet-56 reaches {100 * share:.2f} % test accuracy" in sentences
    assert "He et al. (2015) report 93.03 % for the same network" in sentences
    other = make_run(tmp_path / "other", replace(BEST, arch="resnet56-bottleneck"))
    assert "He et al." not in page_of(other).by_id["meeting"]
    text = write_report([run], format="md").read_text(encoding="utf-8")
    assert "## Summary for a meeting\n\n- ResNet-56 reaches" in text
    untested = page_of(make_run(tmp_path / "untested", done=3, tested=False))
    assert "meeting" not in untested.ids
    assert "Meeting" not in untested.text


@pytest.mark.usefixtures("blank_charts")
def test_only_relevant_fields_are_shown(tmp_path: Path) -> None:
    best = recipe_words.fields(BEST, flips=True)
    assert {"schedule", "cutout", "flip", "ema_decay"} <= best.keys()
    off = {"drop_epochs", "drop_factor", "sizes", "mix", "mix_alpha", "teacher_weight", "val_size"}
    assert not off & best.keys()
    step = recipe_words.fields(RECIPES["report"], flips=False)
    assert step["drop_epochs"] == [10, 20, 30]
    assert "flip" not in step
    mixed = Recipe(mix="mixup", plain_tail=5, weight_decay=0)
    shown = recipe_words.fields(mixed, flips=True)
    assert (shown["mix_alpha"], shown["plain_tail"]) == (1.0, 5)
    assert "decay_norm" not in shown
    page = page_of(make_run(tmp_path / "run"))
    assert "drop_epochs" not in page.by_id["recipe"]
    assert "cosine" in page.by_id["recipe"]
    runs = [
        make_run(tmp_path / name, r) for name, r in (("best", BEST), ("report", RECIPES["report"]))
    ]
    fields = content([read_run(run) for run in runs])["fields"]
    assert fields["drop_epochs"] == ["\N{EN DASH}", "10, 20, 30"]
    assert fields["cutout"] == ["16", "0"]


def skeleton(page: str) -> list[str]:
    """Return the headings, captions and notes of a page, and the fields of its recipe."""
    found = re.findall(r"<(h2|h3|caption|summary)[^>]*>(.*?)</\1>", page)
    found += re.findall(r'<p class="(note)[^>]*>(.*?)</p>', page)
    recipe = page[page.index('id="recipe"') :].partition("</dl>")[0]
    return [text for _, text in found] + re.findall("<dt>(.*?)</dt>", recipe)


@pytest.mark.usefixtures("blank_charts")
def test_the_example_report_is_up_to_date(tmp_path: Path) -> None:
    """If this fails, run `python tools/example_report.py DIR RUN`."""
    docs = Path(__file__).parents[2] / "docs"
    example = (docs / "example-report.html").read_text(encoding="utf-8")
    run = make_run(tmp_path / "run", RECIPES["best"], extras=True)
    evaluation = read_json(run / "evaluation.json")
    evaluation["device"] = "cpu"
    evaluation["robustness"]["images"] = 500
    del evaluation["speed"]
    write_json(run / "evaluation.json", evaluation)
    today = write_report([run]).read_text(encoding="utf-8")
    assert skeleton(example) == skeleton(today)


# Errors


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("evaluation.json", "{}", r"evaluation\.json is damaged: test is missing"),
        ("evaluation.json", "[", r"evaluation\.json is damaged"),
        ("metrics.jsonl", '{"epoch": 1}\n', r"metrics\.jsonl:1 is damaged: step is missing"),
        ("metrics.jsonl", "[1]\n", r"metrics\.jsonl:1 is damaged"),
        ("parity.json", "{}", r"parity\.json is damaged: comparisons is missing"),
        (
            "parity.json",
            '{"comparisons": [{}]}',
            r"parity\.json is damaged: comparisons\[0\]\.a is missing",
        ),
        ("samples.npz", "no archive", r"samples\.npz is damaged"),
        ("recipe.json", "{", r"recipe\.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    run = make_run(tmp_path / "run", images=100)
    (run / file).write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        write_report([run])
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_one_damaged_run_does_not_stop_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        make_run(tmp_path / name, images=100)
    (tmp_path / "b" / "evaluation.json").write_text('{"test": 5}')
    (tmp_path / "d").mkdir()
    assert cli.main(["report", "a", "b", "c", "d"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].startswith("resnet56: b/evaluation.json is damaged: test is 5; expected")
    assert said[1].startswith("resnet56: d has no checkpoint")
    assert said[2] == "resnet56: skipped 2 of 4 runs"
    assert (tmp_path / "comparison.html").exists()
    assert cli.main(["report", "b", "d"]) == 1
    with pytest.raises(RunError, match="test is 5"):
        write_report([tmp_path / "a", tmp_path / "b"])


def test_inconsistent_sample_arrays_are_rejected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=100)
    for change in (
        {"mistake_true": np.full(24, 10)},
        {"originals": np.zeros((6, 32, 32, 3), np.uint8)},
        {"mistake_confidence": np.zeros(3)},
    ):
        np.savez(run / "samples.npz", **(samples(CIFAR) | change))
        with pytest.raises(RunError, match=r"samples\.npz is damaged: "):
            write_report([run])


def test_an_evaluation_of_other_classes_is_rejected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=100)
    evaluation = read_json(run / "evaluation.json")
    evaluation["test"]["confusion_matrix"] = [[1, 2], [3, 4]]
    write_json(run / "evaluation.json", evaluation)
    with pytest.raises(RunError, match="does not have 10 rows and columns"):
        write_report([run])


def test_missing_runs_and_unwritable_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        write_report([])
    with pytest.raises(RunError, match="no run found at"):
        write_report([tmp_path / "none"])
    run = make_run(tmp_path / "run", done=0, tested=False)
    file = tmp_path / "file"
    file.write_text("content")
    for format_ in ("html", "md"):
        with pytest.raises(RunError, match="cannot write") as caught:
            write_report([run], file / "report.html", format=format_)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert file.read_text() == "content"


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, resnet56.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Markdown


def test_markdown_links_to_existing_images_and_escapes_names(tmp_path: Path) -> None:
    recipe = replace(BEST, epochs=2, val_size=10)
    run = make_run(tmp_path / "a run", recipe, EVIL, images=200, extras=True)
    out = write_report([run], tmp_path / "out of #1, 9%.md", format="md")
    text = out.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\n]*?\]\(([^)\s]+)\)", text)
    assert len(links) == text.count("![") > 24
    for link in links:
        file = out.parent / unquote(link)
        assert file.read_bytes().startswith(b"\x89PNG")
    assert len(set(links)) == len(list((tmp_path / "out of #1, 9%-files").iterdir()))
    assert "<script" not in text
    assert r"\$x\_1\$ \| \`b\`" in text
    table = [line for line in text.splitlines() if line.startswith("| &lt;script&gt;")]
    assert table
    test = read_json(run / "evaluation.json")["test"]
    assert f"**{100 * test['accuracy']:.2f} %**" in text
    for lines in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}
        assert len(cells) == 1, lines


def test_markdown_is_written_to_the_run_by_default_and_is_deterministic(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(BEST, epochs=2), done=0, images=100)
    out = write_report([run], format="md")
    assert out == run / "report.md"
    before = {path.name: path.read_bytes() for path in run.rglob("*.png")} | {"": out.read_bytes()}
    write_report([run], format="md")
    after = {path.name: path.read_bytes() for path in run.rglob("*.png")} | {"": out.read_bytes()}
    assert before == after
    assert (run / "report-files" / "reliability.png").exists()


def test_special_characters_are_escaped() -> None:
    assert escape_markdown("a|b\n*c* <d> & _e_") == r"a\|b \*c\* &lt;d&gt; &amp; \_e\_"
    assert escape_markdown("# no heading") == r"\# no heading"
    assert unbroken("<b> 93.03 % of it") == '&lt;b&gt; <span class="nb">93.03 %</span> of it'


# Several runs


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("several")
    runs = [
        make_run(directory / f"seed-{i}", replace(BEST, seed=i), accuracy=accuracy, seed=i)
        for i, accuracy in enumerate((0.92, 0.93, 0.94))
    ]
    runs.append(make_run(directory / "he", RECIPES["he2015"], accuracy=0.6, seed=7))
    runs.append(make_run(directory / "begun", replace(BEST, seed=9), done=2, tested=False))
    return runs


def test_a_comparison_ranks_runs_and_groups_seeds(
    several: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = write_report(several)
    assert out == Path("comparison.html")
    page = Page(out.read_text(encoding="utf-8"))
    shares = {
        run.name: read_json(run / "evaluation.json")["test"]["accuracy"] for run in several[:4]
    }
    ranked = sorted(shares, key=lambda name: -shares[name])
    rows = page.tables["runs"][1:]
    assert [row[1] for row in rows] == [*ranked, "begun"]
    assert [row[2] for row in rows[:4]] == [f"{100 * shares[name]:.2f} %" for name in ranked]
    assert rows[4][2] == "not tested"
    assert rows[4][6] == "2 of 200"
    seeds = [shares[f"seed-{i}"] for i in range(3)]
    mean, deviation = np.mean(seeds), np.std(seeds, ddof=1)
    group = page.tables["seed-groups"][1]
    each = ", ".join(f"{100 * share:.2f} %" for share in seeds)
    assert group[1:6] == [
        "seed-0, seed-1, seed-2",
        "0, 1, 2",
        each,
        f"{100 * mean:.2f} %",
        f"{100 * deviation:.2f} points",
    ]
    assert f"the best group reaches {100 * mean:.2f} % test accuracy over 3 seeds" in page.text
    head, *differing = page.tables["fields"]
    assert head == ["Field", *ranked, "begun"]
    fields = {row[0]: row[1:] for row in differing}
    assert fields["seed"] == [name.removeprefix("seed-").replace("he", "0") for name in ranked] + [
        "9"
    ]
    assert "arch" not in fields
    [pair] = page.tables["pairs"][1:]
    assert pair[:2] == ["group\N{NO-BREAK SPACE}1", "he"]
    assert (pair[4], pair[8]) == ("Student", "yes")
    assert "The variance between seeds cannot be estimated from a single run." in page.text


@pytest.mark.usefixtures("blank_charts")
def test_errors_over_epochs_are_plotted(tmp_path: Path) -> None:
    """As in figure 6 of He et al. 2015, each run has a dashed and a solid curve in one color."""
    runs = [make_run(tmp_path / arch, replace(BEST, arch=arch)) for arch in ("plain20", "resnet20")]
    page = Page(write_report(runs, tmp_path / "before.html").read_text(encoding="utf-8"))
    assert "(dashed)" not in page.text
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"test_loss": row["train_loss"] + 0.1, "test_accuracy": 0.9}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = [read_run(run) for run in runs]
    [chart] = [chart for chart in content(facts)["charts"] if chart.name == "error"]
    assert chart.title == "Training error (dashed) and test error (solid)"
    [axes] = chart._figure(plots.PAPER).axes
    curves = axes.get_lines()
    assert [line.get_linestyle() for line in curves] == ["--", "-"] * 2
    assert curves[0].get_color() == curves[1].get_color() != curves[2].get_color()
    for line, fact, key in zip(
        curves[:2], [facts[0]] * 2, ("train_accuracy", "test_accuracy"), strict=True
    ):
        assert list(line.get_xdata()) == [row["epoch"] for row in fact.rows]
        expected = [100 * (1 - row[key]) for row in fact.rows]
        assert list(line.get_ydata()) == pytest.approx(expected)
    text = write_report(runs, tmp_path / "after.md", format="md").read_text(encoding="utf-8")
    assert "Training error (dashed) and test error (solid)" in text
    assert "It does not influence training." in text
    held = [make_run(tmp_path / name, replace(BEST, val_size=500)) for name in "ab"]
    page = Page(write_report(held, tmp_path / "held.html").read_text(encoding="utf-8"))
    assert "Training error (dashed) and validation error (solid)" in page.text
    assert "does not influence training" not in page.text


def test_a_comparison_is_written_as_markdown(several: list[Path], tmp_path: Path) -> None:
    out = write_report(several, tmp_path / "c.md", format="md")
    text = out.read_text(encoding="utf-8")
    links = re.findall(r"\]\((c-files/[^)]+)\)", text)
    assert len(links) > 2
    for link in links:
        assert (tmp_path / link).exists()
    assert "| 1 | seed-0, seed-1, seed-2 | 0, 1, 2 |" in text
    assert "| Student |" in text
    assert re.search(r"^\| Field \|.* begun \|$", text, flags=re.M)
    for lines in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in lines.splitlines()}) == 1, lines


@pytest.mark.usefixtures("blank_charts")
def test_comparisons_of_untested_runs_or_other_images_have_a_warning(tmp_path: Path) -> None:
    a = make_run(tmp_path / "1" / "run", images=100)
    b = make_run(tmp_path / "2" / "run", classes=("a", "b"), images=100)
    page = Page(write_report([a, b], tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "do not all use the same images" in page.text
    assert "None of the differences can be tested for significance." in page.text
    assert "2 runs on different data sets" in page.text
    assert {row[1] for row in page.tables["runs"][1:]} == {str(a), str(b)}
    same = [
        make_run(tmp_path / name, replace(BEST, lr=lr), images=100, fingerprint=name[0])
        for name, lr in (("ab", 0.1), ("ac", 0.2))
    ]
    other = make_run(tmp_path / "b", images=100, fingerprint="b")
    page = Page(write_report([*same, other], tmp_path / "e.html").read_text(encoding="utf-8"))
    assert "do not all use the same images" in page.text  # although the data sets have equal names
    assert len(page.tables["pairs"][1:]) == 1
    c = make_run(tmp_path / "c", done=0, tested=False)
    d = make_run(tmp_path / "d", done=0, tested=False)
    page = Page(write_report([c, d], tmp_path / "d.html").read_text(encoding="utf-8"))
    assert "none of them finished and tested" in page.text
    assert "All recipes are the same." in page.text


@pytest.mark.usefixtures("blank_charts")
def test_runs_with_a_validation_set_are_ranked_by_validation_accuracy(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, replace(BEST, val_size=500, lr=lr), accuracy=share, seed=seed)
        for name, lr, share, seed in (("low", 0.01, 0.8, 1), ("high", 0.1, 0.9, 2))
    ]
    held = {run.name: read_json(run / "evaluation.json")["validation"]["accuracy"] for run in runs}
    order = sorted(held, key=lambda name: -held[name])
    listed = ", ".join(f"{100 * held[name]:.2f} % ({name})" for name in order)
    page = Page(write_report(runs, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert f"use their validation accuracy: {listed}." in page.text
    for name, other in (("all", BEST), ("others", replace(BEST, val_size=400))):
        added = make_run(tmp_path / name, other)
        page = Page(write_report([*runs, added], tmp_path / "d.html").read_text(encoding="utf-8"))
        assert "validation accuracy:" not in page.text


# Sentences


def only(sentences: list[str]) -> str:
    assert len(sentences) == 1
    return sentences[0]


def test_the_gap_is_classified() -> None:
    def gap(*arguments: Any, augmented: bool) -> str:
        found = story.gap(*arguments, augmented=augmented)
        return f"{found.verdict}: {found.details}"

    sentence = gap(0.9998, 0.9303, (0.9251, 0.9351), augmented=True)
    assert sentence == (
        "The network overfits: training accuracy is 99.98 % and test accuracy is 93.03 %, a gap of "
        "6.95 points. It fits almost all training images. It was trained with augmentation."
    )
    sentence = gap(0.90, 0.80, (0.79, 0.81), augmented=False)
    assert sentence.startswith("The network overfits")
    assert "a gap of 10.00 points. It does not fit all training images." in sentence
    assert sentence.endswith("It was trained without augmentation.")
    assert "is little overfitting" in gap(0.95, 0.935, (0.93, 0.94), augmented=True)
    assert "is no significant overfitting" in gap(0.95, 0.94, (0.93, 0.96), augmented=True)
    sentence = gap(0.93, 0.95, (0.94, 0.96), augmented=True)
    assert sentence.startswith("There is no sign of overfitting")
    assert sentence.endswith("test accuracy is 95.00 %, which is 2.00 points higher.")
    assert "is no significant overfitting" in gap(1.0, 1.0, (0.99, 1.0), augmented=True)


def test_a_result_at_chance_level_is_reported() -> None:
    even = {"n": 100, "confusion_matrix": [[40, 10], [10, 40]]}
    uneven = {"n": 100, "confusion_matrix": [[85, 5], [5, 5]]}
    assert story.against_chance(even | {"accuracy_interval": [0.71, 0.87]}) == []
    assert "includes 90.00 %" in only(
        story.against_chance(uneven | {"accuracy_interval": [0.83, 0.94]})
    )
    assert "lies below 50.00 %" in only(
        story.against_chance(even | {"accuracy_interval": [0.3, 0.4]})
    )


def rows(*losses: float, validation: tuple[float, ...] = ()) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"epoch": i, "train_loss": x} for i, x in enumerate(losses, 1)]
    for row, share in zip(made, validation, strict=False):
        row["val_accuracy"] = share
    return made


def test_the_trend_of_the_last_epochs_is_described() -> None:
    step, cosine = Recipe(epochs=1), Recipe(epochs=1, schedule="cosine")
    assert story.trend([], step) == []
    assert story.trend(rows(2.0), step) == ["One epoch is not enough to show a trend."]
    sentence = only(story.trend(rows(1.0, 0.9), step))
    assert sentence == (
        "The training loss was still falling at the end: it was 0.9000 in the last epoch and "
        "1.0000 in the previous epoch. More epochs may help."
    )
    falling = only(story.trend(rows(1.0, 0.9), cosine))
    assert "expected because the learning rate falls to zero, so it does not show" in falling
    # This run ends before the decay begins.
    warming = Recipe(epochs=1, schedule="cosine", warmup_epochs=1)
    assert "More epochs may help" in only(story.trend(rows(1.0, 0.9), warming))
    # The loss falls because the last epoch has weaker augmentation.
    tail = Recipe(epochs=1, cutout=8, plain_tail=1)
    falling = only(story.trend(rows(1.0, 0.9), tail))
    assert "expected because the augmentation is weaker in the last epochs" in falling
    unused = Recipe(epochs=1, plain_tail=1)
    assert "More epochs may help" in only(story.trend(rows(1.0, 0.9), unused))
    assert "leveled off" in only(story.trend(rows(1.0, 0.96), step))
    assert "rising" in only(story.trend(rows(1.0, 1.2), step))
    assert only(story.trend(rows(1.0, 0.5), Recipe(epochs=3))) == (
        "So far, the training loss has changed from 1.0000 in epoch 1 to 0.5000 in epoch 2."
    )
    assert "leveled off" in only(story.trend(rows(0.0, 0.0), step))
    assert "rising" in only(story.trend(rows(0.0, 0.5), step))
    # Twenty epochs: the last two (mean 0.55) against the two before (0.95).
    many = rows(*[1.0] * 17, 0.9, 0.6, 0.5)
    sentence = only(story.trend(many, step))
    assert "its mean was 0.5500 over the last 2 epochs and 0.9500 over the previous 2" in sentence
    peak = story.trend(rows(1.0, 1.0, 1.0, validation=(0.5, 0.7, 0.6)), step)
    assert "highest after epoch 2 (70.00 %). It was 60.00 % after epoch 3." in peak[1]
    end = story.trend(rows(1.0, 1.0, validation=(0.5, 0.7)), step)
    assert "highest at the end, 70.00 % after epoch 2" in end[1]


def per_class(**f1: float) -> dict[str, dict[str, float]]:
    return {name: {"f1": value, "support": 5} for name, value in f1.items()}


def test_the_best_and_the_worst_class_are_named() -> None:
    sentence = only(story.best_and_worst(per_class(cat=0.8, dog=0.9, frog=0.95)))
    assert sentence == (
        "“frog” has the highest F1 score (0.9500), and “cat” has the lowest (0.8000)."
    )
    sentence = only(story.best_and_worst(per_class(a=1.0, b=1.0, c=0.5)))
    assert "“a” and “b” have the highest F1 score" in sentence
    assert "All 2 classes have the same F1 score" in only(
        story.best_and_worst(per_class(a=1.0, b=1.0))
    )
    many = per_class(**{f"c{i}": 1.0 for i in range(9)}, bad=0.5)
    assert "9 classes have the highest F1 score" in only(story.best_and_worst(many))
    absent = per_class(a=1.0, b=0.5) | {"none": {"f1": 0.0, "support": 0}}
    assert "“b” has the lowest" in only(story.best_and_worst(absent))
    assert story.best_and_worst(per_class(a=1.0)) == []


def test_the_most_confused_pair_is_named() -> None:
    assert "All test images are classified correctly" in only(story.confusions([]))
    one = {"true": "cat", "predicted": "dog", "count": 58, "fraction": 0.058}
    back = {"true": "dog", "predicted": "cat", "count": 1, "fraction": 0.001}
    assert only(story.confusions([one])) == (
        "The most frequent error is “cat” classified as “dog”: 58 images, 5.80 % of the class."
    )
    assert only(story.confusions([one, back])).endswith("The reverse error affects 1 image.")
    tied = one | {"true": "a", "predicted": "b"}
    assert only(story.confusions([one, tied])).startswith(
        "One of the most frequent errors is “cat”"
    )


def split(accuracy: float, interval: tuple[float, float], **metrics: Any) -> dict[str, Any]:
    """Return metrics on 1,000 images of two classes. The first class has 600 images."""
    wrong = round(1000 * (1 - accuracy))
    made = {
        "accuracy": accuracy,
        "accuracy_interval": list(interval),
        "n": 1000,
        "confusion_matrix": [[600 - wrong, wrong], [0, 400]],
        "per_class": {
            "cat": {"support": 600, "recall": 1 - wrong / 600},
            "dog": {"support": 400, "recall": 1.0},
        },
        "most_confused": [
            {"true": "cat", "predicted": "dog", "count": wrong, "fraction": wrong / 600}
        ],
    }
    return made | metrics


def meeting(
    test: dict[str, Any],
    train: dict[str, Any] | None,
    published: float | None = None,
    **options: bool,
) -> list[str]:
    options = {"augmented": True, "finished": True} | options
    return story.meeting("ResNet-56", test, train, published=published, **options)


def test_the_talking_points_are_five_sentences() -> None:
    test, train = split(0.9, (0.88, 0.92)), split(0.995, (0.99, 0.999))
    assert meeting(test, train, 0.93) == [
        "ResNet-56 reaches 90.00 % test accuracy on 1,000 images (95 % confidence interval: "
        "88.00 % to 92.00 %).",
        "For comparison, He et al. (2015) report 93.00 % for the same network (above this "
        "interval), and always predicting the most frequent class would reach 60.00 %.",
        "The most frequent error is “cat” classified as “dog” (100 images), and “cat” has the "
        "lowest recall (83.33 %).",
        "Training accuracy is 99.50 %, 9.50 points above test accuracy, so the network overfits: "
        "it fits almost all training images, but it is less accurate on new images.",
        "Next, try stronger augmentation or more training images, and repeat the run with other "
        "seeds to measure how much the accuracy varies.",
    ]
    assert "(within this interval)" in meeting(test, train, 0.91)[1]
    assert "(below this interval)" in meeting(test, train, 0.87)[1]
    assert meeting(test, train)[1].startswith("For comparison, always predicting")


def test_the_talking_points_describe_each_type_of_gap() -> None:
    test = split(0.9, (0.88, 0.92))

    def told(train: dict[str, Any] | None, **options: bool) -> tuple[str, str]:
        _, _, _, gap, step = meeting(test, train, **options)
        return gap, step

    gap, step = told(None)
    assert "was not measured, so it is unknown whether the network overfits" in gap
    assert step.startswith("Next, repeat the run with other seeds")
    for accuracy in (0.85, 0.91):  # a negative gap, and one within the interval
        gap, step = told(split(accuracy, (0.0, 1.0)))
        assert "so there is no significant overfitting" in gap
        assert step.startswith("Next, try more epochs or a larger network, and repeat")
    gap, step = told(split(0.97, (0.96, 0.98)), augmented=False)
    assert "overfits, although it does not fit all training images" in gap
    assert step.startswith("Next, try augmentation or more training images")
    narrow = split(0.9, (0.895, 0.905))
    assert "little overfitting" in meeting(narrow, split(0.915, (0.91, 0.92)))[3]


def test_the_talking_points_state_why_a_result_is_preliminary() -> None:
    good, train = split(0.9, (0.88, 0.92)), split(0.9, (0.88, 0.92))
    assert "finish the training run" in meeting(good, train, finished=False)[4]
    chance = split(0.6, (0.57, 0.63))
    assert "check the labels" in meeting(chance, train)[4]
    perfect = split(1.0, (0.996, 1.0), most_confused=[])
    sentences = meeting(perfect, perfect)
    assert "classifies all test images correctly, so they do not reveal" in sentences[2]
    assert "with 0 mistakes, an improvement is hard to measure" in sentences[4]
    assert "with 1 mistake, " in meeting(split(0.999, (0.995, 1.0)), perfect)[4]
    absent = split(0.9, (0.88, 0.92))
    absent["per_class"]["none"] = {"support": 0, "recall": None}
    assert "“cat” has the lowest recall" in meeting(absent, train)[2]


def bins(*filled: tuple[int, float]) -> dict[str, Any]:
    made = [{"count": n, "confidence": c} for n, c in filled]
    return {"ece": 0.05, "brier": 0.1, "bins": [*made, {"count": 0, "confidence": None}]}


def test_confidence_is_compared_with_the_accuracy_interval() -> None:
    # (30 * 0.9 + 10 * 0.5) / 40 = 0.8
    calibration = bins((30, 0.9), (10, 0.5))
    assert story.mean_confidence(calibration["bins"]) == pytest.approx(0.8)
    over = only(story.confidence(calibration, 0.7, (0.65, 0.75)))
    assert "is overconfident: its mean confidence is 80.00 %, 10.00 points above" in over
    under = only(story.confidence(calibration, 0.9, (0.85, 0.95)))
    assert "is underconfident: its mean confidence is 80.00 %, 10.00 points below" in under
    assert "neither" in only(story.confidence(calibration, 0.78, (0.7, 0.85)))


def test_robustness_hardware_and_unfinished_runs_are_described() -> None:
    assert story.robustness(None) == []
    metrics = {
        "clean_accuracy": 0.9,
        "mean_accuracy": 0.7,
        "corruptions": {"fog": [0.8, 0.6], "motion_blur": [0.7, 0.9]},
    }
    sentence = only(story.robustness(metrics))
    assert "the mean accuracy is 70.00 %, 20.00 points lower than" in sentence
    assert "Accuracy is lowest for fog (70.00 %) and highest for motion blur (80.00 %)" in sentence
    equal = {
        "clean_accuracy": 0.7,
        "mean_accuracy": 0.75,
        "corruptions": {"a": [0.75], "b": [0.75]},
    }
    sentence = only(story.robustness(equal))
    assert sentence.endswith("5.00 points higher than on the same images without corruption.")
    assert story.hardware([]) == []
    assert story.hardware(PARITY["comparisons"]) == [PARITY["comparisons"][0]["verdict"]]
    assert story.unfinished(5, 5, tested=True) == []
    assert "finished, but it has not been tested" in only(story.unfinished(5, 5, tested=False))
    assert "has completed 1 of 5 epochs" in only(story.unfinished(1, 5, tested=False))
    assert "It was tested after 1 of 5" in only(story.unfinished(1, 5, tested=True))


def test_recipes_are_described_in_sentences() -> None:
    schedule = recipe_words.schedule
    assert schedule(RECIPES["he2015"]) == (
        "The learning rate starts at 0.1 and is multiplied by 0.1 after epochs 82 and 123."
    )
    assert schedule(Recipe(epochs=5)) == "The learning rate starts at 0.02 and stays constant."
    assert schedule(BEST) == (
        "The learning rate rises linearly to 0.1 over the first 5 epochs, then decays to zero at "
        "epoch 200 (cosine schedule)."
    )
    assert "over the first epoch, then decays linearly to zero" in schedule(RECIPES["quick"])
    assert schedule(Recipe(epochs=2, warmup_epochs=2)).endswith(
        "rises linearly toward 0.02 until the end of training."
    )
    bare = Recipe(padding=0, flip=True)
    assert recipe_words.augmentation(bare, flips=False) == "Training images are not augmented."
    assert "flipped horizontally with probability 0.5" in recipe_words.augmentation(
        bare, flips=True
    )
    turns = recipe_words.augmentation(Recipe(alternate_flip=True), flips=True)
    assert "flipped horizontally in every other epoch" in turns
    grown = recipe_words.augmentation(Recipe(sizes=(16, 16, 24)), flips=True)
    assert "downscaled to 16 \N{MULTIPLICATION SIGN} 16 for 2 epochs and to 24" in grown
    trivial = Recipe(padding=0, trivial_augment=True)
    assert "geometric or color" in recipe_words.augmentation(trivial, flips=False)
    assert recipe_words.is_augmented(trivial, flips=False)
    assert "1 black pixel on" in recipe_words.augmentation(Recipe(padding=1), flips=False)
    several = Recipe(ema_decay=(0.999, 0.9995), val_size=1, teacher=("a", "b"), teacher_weight=0.9)
    told = recipe_words.optimizer(several)
    assert "decays of 0.999 and 0.9995 per step, and uses the one with the highest" in told
    assert "probabilities of an ensemble of 2 trained networks for the same" in told
    assert told.count("with weight 0.9, and the labels with weight 0.1.") == 1
    mixed = Recipe(mix="ricap", mix_alpha=0.3, mix_probability=0.5, cutout=8, plain_tail=15)
    sentence = recipe_words.augmentation(mixed, flips=False)
    assert "In 50 % of batches, each image is composed of random crops of four images" in sentence
    assert "without Cutout" in sentence
    assert "= 0.3, and the targets are mixed" in sentence
    assert sentence.endswith("Cutout and RICAP are disabled in the last 15 epochs.")
    plain = Recipe(plain_tail=15)  # no augmentation besides crops and flips
    assert "disabled" not in recipe_words.augmentation(plain, flips=True)
    assert recipe_words.is_augmented(Recipe(padding=0, mix="mixup"), flips=False)
    assert "no momentum" in recipe_words.optimizer(Recipe(momentum=0.0))
    tuned = Recipe(optimizer="adamw", weights="runs/a", freeze=("conv1", "bn1"))
    assert recipe_words.optimizer(tuned).startswith(
        "The network is trained with AdamW (batch size 32) for 40 epochs. Training starts from the "
        "weights of runs/a. The layers conv1 and bn1 are frozen."
    )
    assert "Only the classifier" in recipe_words.optimizer(replace(tuned, freeze=("body",)))
    assert {"weights", "freeze"} <= recipe_words.fields(tuned, flips=True).keys()
    assert not {"momentum", "nesterov"} & recipe_words.fields(tuned, flips=True).keys()
    assert not {"weights", "freeze"} & recipe_words.fields(Recipe(), flips=True).keys()


def test_numbers_are_formatted_for_readers() -> None:
    assert words.points(0.0657, sign=True) == "+6.57 points"
    assert words.points(-0.01, sign=True) == "−1.00 points"  # noqa: RUF001 - a true minus
    assert words.points(-0.000001, sign=True) == "0.00 points"
    assert [words.big(n) for n in (464, 853018, 125485696)] == [
        "464",
        "853 thousand",
        "125.5 million",
    ]
    assert words.listed([]) == ""
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b, and c"
    assert words.listed(["a", "b"]) == "a and b"


@pytest.mark.usefixtures("blank_charts")
@pytest.mark.parametrize("flip", [True, False])
def test_flips_are_described_if_the_run_recorded_them(tmp_path: Path, flip: bool) -> None:
    run = make_run(tmp_path / "run", done=1, tested=False)
    environment = read_json(run / "environment.json")
    environment["data"]["flip"] = flip
    write_json(run / "environment.json", environment)
    text = page_of(run).text
    assert ("flipped horizontally" in text) == flip


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=3000"),
)
MEASURE = """<!DOCTYPE html><body><p id="w"></p>
<iframe name="full" src="full.html"></iframe>
<iframe name="evil" src="evil.html"></iframe>
<iframe name="several" src="several.html"></iframe>
<style>iframe { width: 390px; height: 800px; border: 0 }</style><script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    const head = page.querySelectorAll("#per-class th button")[3];
    if (head) head.click();
    const first = page.querySelector("#per-class tbody th");
    const { scrollWidth, clientWidth } = page.documentElement;
    found[frame.name] = [scrollWidth, clientWidth, first ? first.textContent : ""];
    const cell = page.querySelector("#confusion button");
    if (frame.name !== "full") continue;
    const hint = page.getElementById("cell-hint");
    const label = cell.getAttribute("aria-label");
    const states = [cell.getAttribute("aria-pressed")];
    cell.click();
    states.push(cell.getAttribute("aria-pressed"));
    const panel = page.getElementById("cell");
    const images = [...panel.querySelectorAll("img")].map((image) => image.naturalWidth);
    found.click = { hint: hint.hidden, label, states, text: panel.innerText, images };
    cell.click();
    found.click.closed = panel.innerText;
  }
  document.getElementById("w").textContent = JSON.stringify(found);
};</script>"""


@pytest.fixture
def profile(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "profile"
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
def test_no_page_scrolls_horizontally_on_a_phone(
    full: Path, several: list[Path], tmp_path: Path, profile: Path
) -> None:
    evil = make_run(tmp_path / "evil", replace(BEST, epochs=2), EVIL, images=200, extras=True)
    for name, runs in {"full": [full], "evil": [evil], "several": several}.items():
        write_report(runs, tmp_path / f"{name}.html")
    (tmp_path / "wrapper.html").write_text(MEASURE)
    address = (tmp_path / "wrapper.html").as_uri()
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r'<p id="w">(.+?)</p>', done.stdout)
    assert found, done.stderr
    widths = json.loads(html.unescape(found[1]))
    click = widths.pop("click")
    assert len(widths) == 3
    for name, (wide, inside, _) in widths.items():
        assert inside <= 390  # the scroll bar can take some width
        assert wide == inside, f"{name} is {wide} pixels wide"
    assert "CONSOLE" not in done.stderr, done.stderr
    scores = read_json(full / "evaluation.json")["test"]["per_class"]
    assert widths["full"][2] == max(
        scores, key=lambda key: scores[key]["f1"]
    )  # the table was sorted
    # A click on the first cell with mistakes shows the images of that cell.
    matrix = read_json(full / "evaluation.json")["test"]["confusion_matrix"]
    row, column = next((i, j) for i in range(10) for j in range(10) if i != j and matrix[i][j])
    count, kept = matrix[row][column], samples(CIFAR)
    shown = sum((kept["mistake_true"] == row) & (kept["mistake_predicted"] == column))
    assert click["label"].startswith(f"true {CIFAR[row]}, predicted {CIFAR[column]}: {count} (")
    assert (click["hint"], click["states"]) == (False, ["false", "true"])
    assert click["text"].startswith(f"{CIFAR[row]} classified as {CIFAR[column]}: {count} image")
    assert click["images"] == [32] * shown
    assert click["closed"] == ""


def test_headers_of_large_tables_stay_visible(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(BEST, epochs=2), NUMBERS, extras=True)
    address = write_report([run], tmp_path / "report.html").as_uri()
    with chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        found = {name: page.evaluate(SCROLLED_HEADERS, name) for name in ("confusion", "per-class")}
    assert found["confusion"] == {"corner": "TD THEAD", "left": "TH TBODY", "top": "TH THEAD"}
    assert found["per-class"]["corner"] == found["per-class"]["top"] == "TH THEAD"


# Scroll a table and return the types of the cells at its edges.
SCROLLED_HEADERS = """name => {
  const table = document.getElementById(name), box = table.parentElement;
  box.scrollIntoView();
  box.scrollTo(500, 500);
  const { left, top } = box.getBoundingClientRect();
  const at = (x, y) => {
    const cell = document.elementFromPoint(left + x, top + y).closest("th, td, table, div");
    return `${cell.tagName} ${cell.parentElement.parentElement.tagName}`;
  };
  return { corner: at(20, 15), left: at(4, 300), top: at(200, 15) };
}"""


def test_long_run_names_leave_room_for_the_curves(tmp_path: Path) -> None:
    names = [f"{letter * 200}-{number}" for number, letter in enumerate("abcd")]
    runs = [make_run(tmp_path / name, replace(BEST, epochs=2), images=100) for name in names]
    text = write_report(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "aaaaaaaa…aaaaaaaaaa-0" in text  # the legend shortens names
    assert {row[1] for row in Page(text).tables["runs"][1:]} == set(names)
