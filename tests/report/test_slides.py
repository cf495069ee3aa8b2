"""Every run has ten slides, with few words and the numbers from its files."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import BEST, CIFAR, Page, make_metrics, make_run

from resnet56 import cli
from resnet56.errors import RunError, UsageError
from resnet56.files import read_json
from resnet56.recipe import RECIPES
from resnet56.report import slides, words, write_report
from resnet56.report.read import read_run
from resnet56.runs.directory import RunDirectory

TOPICS = [
    *("Idea", "Architecture", "Data", "Training", "Results"),
    *("Confusion matrix", "Mistakes", "Overfitting", "Takeaways"),
]
MAX_WORDS = 44


@pytest.fixture(scope="module")
def decks(slide_files: dict[str, Path]) -> dict[str, Page]:
    return {name: Page(file.read_text(encoding="utf-8")) for name, file in slide_files.items()}


def write(run: Path, out: Path | None = None) -> Path:
    return write_report([run], out, format="slides")


def title(deck: Page, number: int) -> str:
    return deck.by_id[f"title-{number}"]


def test_every_run_has_ten_slides_on_fixed_topics(
    runs: dict[str, Path], decks: dict[str, Page]
) -> None:
    for name, deck in decks.items():
        assert [i for i in deck.ids if i.isdigit()] == [str(i) for i in range(1, 11)], name
        topics = [title(deck, i).partition(": ")[0] for i in range(2, 11)]
        assert topics == TOPICS, name
        assert deck.tags.count("h1") == 1
        assert deck.tags.count("h2") == 9
        assert runs[name].name in title(deck, 1)


def test_slides_have_few_words(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        for slide in slides.slides(read_run(run)):
            text = " ".join((slide.title, *slide.sentences))
            assert len(re.findall(r"\w[\w.,-]*", text)) <= MAX_WORDS, (name, text)
            assert all(sentence.endswith(".") for sentence in slide.sentences), (name, text)


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def test_all_percentages_are_those_of_the_evaluation(
    runs: dict[str, Path], decks: dict[str, Page]
) -> None:
    checked = 0
    for name, run in runs.items():
        facts = read_run(run)
        known = [*numbers_in(facts.evaluation), *numbers_in(facts.rows)]
        if facts.samples:
            known += [float(value) for value in facts.samples.mistake_confidence]
        if facts.test:
            bins = facts.test["calibration"]["bins"]
            pairs = [(b["confidence"], b["count"]) for b in bins if b["confidence"] is not None]
            known.append(sum(c * n for c, n in pairs) / facts.test["n"])
            known.append(max(map(sum, facts.test["confusion_matrix"])) / facts.test["n"])
        allowed = {f"{100 * value:.2f} %" for value in known if 0 <= value <= 1}
        found = set(re.findall(r"\d+\.\d\d %", decks[name].text))
        assert found <= allowed, name
        checked += len(found)
    assert checked > 150


def test_each_number_is_on_its_slide(runs: dict[str, Path], decks: dict[str, Page]) -> None:
    deck, evaluation = decks["full"], read_json(runs["full"] / "evaluation.json")
    test, train = evaluation["test"], evaluation["train"]
    right = round(test["accuracy"] * test["n"])
    low, high = (f"{100 * bound:.2f} %" for bound in test["accuracy_interval"])
    assert deck.by_id["test-accuracy"] == f"{100 * test['accuracy']:.2f} %"
    assert f"{right:,} of 2,000 test images" in title(deck, 6)
    assert f"interval is {low} to {high}." in deck.by_id["6"]
    assert f"{2000 - right} of 2,000 test images" in title(deck, 8)
    assert "853,018 parameters" in deck.by_id["3"]
    assert "27 blocks of 2 layers" in deck.by_id["2"]
    gap = 100 * (train["accuracy"] - test["accuracy"])
    assert title(deck, 9).endswith(f"a gap of {gap:.2f} points")
    seconds = round(sum(row["seconds"] for row in RunDirectory(runs["full"]).read_metrics()))
    assert title(deck, 5).endswith(f"200 epochs in {seconds // 60} min {seconds % 60} s")
    head, *rows = deck.tables["confusion"]
    assert head[1:] == list(CIFAR)
    assert [row[0] for row in rows] == list(CIFAR)
    assert [[int(c.replace(",", "")) for c in row[1:]] for row in rows] == test["confusion_matrix"]
    bars = {row[0]: row[2] for table in deck.tables.values() for row in table if len(row) == 3}
    for name in CIFAR:
        assert bars[name] == f"{100 * test['per_class'][name]['recall']:.2f} %"
    assert bars["training"] == f"{100 * train['accuracy']:.2f} %"
    assert bars["validation"] == f"{100 * evaluation['validation']['accuracy']:.2f} %"


def test_a_perfect_result_has_no_mistakes(decks: dict[str, Page]) -> None:
    deck = decks["perfect"]
    assert "No classes are confused" in title(deck, 7)
    assert "No mistakes on 2,000 test images" in title(deck, 8)
    assert "0 mistakes" in deck.by_id["8"]
    assert "error" not in deck.by_id["10"]


def test_the_verb_agrees_with_the_number_of_mistakes(runs: dict[str, Path]) -> None:
    facts = read_run(runs["perfect"])
    assert facts.test is not None
    row = facts.test["confusion_matrix"][0]
    for title in ("1 of 2,000 test images is misclassified", "2 of 2,000 test images are mis"):
        row[0], row[1] = row[0] - 1, row[1] + 1
        assert slides.mistakes(facts).title.startswith(title)


def test_the_processor_is_named_without_trademark_signs(runs: dict[str, Path]) -> None:
    facts = read_run(runs["full"])
    facts = replace(facts, environment={"processor": "Intel(R) Xeon(R) Processor"})
    assert slides.opening(facts).sentences[-1].endswith("on Intel Xeon Processor.")


def test_slides_for_a_hundred_classes_show_the_largest_errors(
    runs: dict[str, Path], decks: dict[str, Page]
) -> None:
    deck = decks["hundred"]
    assert "confusion" not in deck.tables
    pair = read_json(runs["hundred"] / "evaluation.json")["test"]["most_confused"][0]
    label = f"{pair['true']} \N{RIGHTWARDS ARROW} {pair['predicted']}"
    rows = [row for table in deck.tables.values() for row in table if label in row]
    assert "the highest and the lowest" in deck.by_id["6"]
    assert "the highest and the lowest" not in decks["full"].by_id["6"]
    assert [row[2] for row in rows] == [f"{pair['count']} ({100 * pair['fraction']:.2f} %)"]


def test_a_plain_network_has_no_shortcuts(runs: dict[str, Path], decks: dict[str, Page]) -> None:
    assert "no block has a shortcut" in title(decks["plain"], 2)
    assert "Each block adds its input" in title(decks["full"], 2)
    arcs = {
        name: re.findall(r'class="wire accent"', (runs[name] / "slides.html").read_text("utf-8"))
        for name in ("plain", "full")
    }
    assert len(arcs["plain"]) == 0
    assert len(arcs["full"]) == 1 + 27  # one block, and the complete network
    assert "Training images are not augmented." in decks["plain"].by_id["4"]


def test_missing_results_are_reported(runs: dict[str, Path], decks: dict[str, Page]) -> None:
    [*_, last] = RunDirectory(runs["validated"]).read_metrics()
    accuracy = f"{100 * last['val_accuracy']:.2f} %"
    assert f"reaches {accuracy} validation accuracy after 3 epochs" in title(decks["validated"], 1)
    assert "above validation accuracy" in title(decks["validated"], 9)
    for name in ("validated", "unfinished", "new", "converted"):
        assert "no test results yet" in title(decks[name], 6)
        assert "test accuracy" not in decks[name].text
    assert "4 of 200 epochs" in decks["unfinished"].by_id["6"]
    assert "No epoch is finished yet" in decks["new"].by_id["5"]
    for name in ("imported", "converted"):
        assert "The training curves are not recorded." in decks[name].by_id["5"]
    assert "test accuracy" in title(decks["imported"], 1)
    assert "The network probably overfits" in title(decks["imported"], 9)
    assert "augmentation." not in decks["imported"].text
    assert "trained with augmentation." in decks["full"].by_id["9"]
    assert "trained without augmentation." in decks["plain"].by_id["9"]


def test_accuracy_at_chance_level_is_reported(decks: dict[str, Page]) -> None:
    assert "no evidence that the network has learned" in decks["chance"].by_id["6"]


def test_names_are_escaped_and_shortened(runs: dict[str, Path], decks: dict[str, Page]) -> None:
    text = (runs["evil"] / "slides.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert" in text
    deck = decks["evil"]
    for number in range(2, 11):
        assert "x" * 50 not in title(deck, number)


def test_decks_are_small_self_contained_and_deterministic(
    runs: dict[str, Path], decks: dict[str, Page], tmp_path: Path
) -> None:
    for name, run in runs.items():
        file = run / "slides.html"
        text = file.read_text(encoding="utf-8")
        assert file.stat().st_size < 400_000, name
        assert "http" not in text.replace("http-equiv", "")
        assert not re.search(r"@import|url\((?!#)", text)
        for tag, attribute, value in decks[name].attributes:
            if attribute in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("data:", "#")), (tag, attribute, value)
            assert not attribute.startswith("on"), (tag, attribute)
        assert len(decks[name].ids) == len(set(decks[name].ids))
        texts = [v for tag, key, v in decks[name].attributes if (tag, key) == ("img", "alt")]
        assert all(texts)
        assert len(texts) == decks[name].tags.count("img")
    again = write(runs["full"], tmp_path / "again.html")
    assert again.read_bytes() == (runs["full"] / "slides.html").read_bytes()


def test_durations_are_written_in_words() -> None:
    assert slides.time_taken(44.6) == "45 s"
    assert slides.time_taken(110) == "1 min 50 s"
    assert slides.time_taken(3599.6) == "1 h 0 min"
    assert slides.time_taken(4500) == "1 h 15 min"
    assert words.duration(4500) == "1:15:00"


def test_optimizers_and_schedules_are_described_in_a_few_words() -> None:
    assert slides.optimizer(RECIPES["he2015"]) == (
        "Optimizer: SGD with momentum 0.9, batch size 128, and weight decay 0.0001."
    )
    assert slides.schedule(RECIPES["report"]) == (
        "Learning rate: 0.02, multiplied by 0.5 after epochs 10, 20, and 30."
    )
    assert slides.schedule(replace(BEST, warmup_epochs=1)) == (
        "Learning rate: warm-up to 0.1 over 1 epoch, then cosine decay to zero."
    )
    often = replace(RECIPES["report"], drop_epochs=tuple(map(float, range(1, 12))))
    assert slides.schedule(often) == "Learning rate: 0.02, multiplied 11 times by 0.5."
    assert slides.schedule(replace(often, drop_epochs=())) == "Learning rate: 0.02, constant."
    tuned = replace(RECIPES["he2015"], optimizer="adamw", weights="runs/a", freeze=("body",))
    assert slides.optimizer(tuned) == (
        "Optimizer: AdamW with batch size 128, weight decay 0.0001, pretrained weights, and frozen "
        "layers."
    )
    assert "distillation, and EMA" in slides.optimizer(replace(BEST, teacher=("resnet56",)))


def test_classes_with_the_same_accuracy_are_counted() -> None:
    metrics: Any = make_metrics(("a", "b", "c"), 300, 1.0)
    assert slides.class_range(metrics) == ["All 3 classes have the same accuracy."]
    metrics["per_class"]["b"]["recall"] = 0.5
    assert slides.class_range(metrics) == [
        "Accuracy per class ranges from 50.00 % (“b”) to 100.00 % (2 classes)."
    ]


# The command


def test_the_command_writes_slides(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deck.html"
    assert cli.main(["report", str(runs["two"]), "--format", "slides", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == (runs["two"] / "slides.html").read_bytes()


def test_errors_have_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs["two"])
    for arguments, message in (
        ((run, "--format", "pdf"), "format: 'pdf' is not one of"),
        ((run, run, "--format", "slides"), "slides show one run, not 2"),
        ((run, "--format", "slides", "--out", str(tmp_path)), "choose a file such as"),
        ((str(tmp_path / "none"), "--format", "slides"), "is neither a run nor"),
    ):
        assert cli.main(["report", *arguments]) > 0
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    with pytest.raises(UsageError, match="slides.html"):
        write_report([runs["two"]], tmp_path, format="slides")
    damaged = make_run(tmp_path / "damaged", images=100)
    (damaged / "evaluation.json").write_text(json.dumps({"test": {}}))
    with pytest.raises(RunError, match="damaged"):
        write(damaged)


def test_the_help_describes_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--format {html,md,slides}" in text
    assert "slides.html" in text
