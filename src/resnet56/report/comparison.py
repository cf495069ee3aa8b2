"""Content of the comparison of several runs, for the templates."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from resnet56.report import plots, recipe_words, story, words
from resnet56.report.page import plain
from resnet56.report.plots import Chart, Line
from resnet56.report.read import RunFacts
from resnet56.runs.schema import Metrics

SECTIONS = [
    ("results", "Results"),
    ("differences", "Differences"),
    ("seeds", "Seeds"),
    ("recipes", "Recipes"),
    ("curves", "Curves"),
]
NO_VALUE = "\N{EN DASH}"
# Number of runs up to which all pairs are compared. With more runs, each is compared with the best.
MAX_PAIRS = 5

Interval = tuple[float, float]


@dataclass(frozen=True)
class Entry:
    """One run in the comparison."""

    rank: int
    label: str
    facts: RunFacts


@dataclass(frozen=True)
class Difference:
    """Test accuracy of `better` minus that of `other`, with its 95 % interval, in [0, 1]."""

    better: Entry
    other: Entry
    value: float
    interval: Interval

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass(frozen=True)
class Group:
    """Tested runs that differ only in their seed."""

    entries: tuple[Entry, ...]
    mean: float  # of the test accuracies
    deviation: float  # their sample standard deviation

    @property
    def seeds(self) -> list[int]:
        """The seeds in ascending order."""
        return sorted(entry.facts.recipe.seed for entry in self.entries)


def content(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Return the content of the comparison of several runs."""
    entries = ranked(runs)
    pairs = differences(entries)
    return {
        "title": title(entries),
        "sections": SECTIONS,
        "entries": entries,
        "fields": differing_fields(entries),
        "groups": seed_groups(entries),
        "differences": pairs,
        "significance": significance(pairs),
        "state": states(entries),
        "charts": [*error_charts(entries), *charts(entries)],
        "test_recorded": any("test_accuracy" in row for e in entries for row in e.facts.rows),
    }


def ranked(runs: Sequence[RunFacts]) -> list[Entry]:
    """Sort by test accuracy, best first; untested runs come last, in the given order."""
    order = sorted(runs, key=lambda run: -run.test["accuracy"] if run.test else math.inf)
    names = [run.name for run in runs]
    return [
        Entry(i, run.name if names.count(run.name) == 1 else str(run.path), run)
        for i, run in enumerate(order, start=1)
    ]


def title(entries: Sequence[Entry]) -> str:
    """Return the headline: the number of runs and the best result."""
    best = entries[0].facts.test
    runs = words.plural(len(entries), "run")
    if best is None:
        return f"{runs} compared, none of them tested"
    accuracy = words.percent(best["accuracy"])
    return f"{runs} compared: the best reaches {accuracy} test accuracy"


def states(entries: Sequence[Entry]) -> list[str]:
    """Return warnings about an unfair comparison, and the validation accuracies."""
    sentences = []
    for entry in entries:
        facts = entry.facts
        for sentence in story.unfinished(
            facts.progress.epoch, facts.recipe.epochs, tested=facts.test is not None
        ):
            sentences.append(f"{entry.label}: {sentence}")
    if len({data_key(entry) for entry in entries}) > 1:
        sentences.append(
            "These runs do not all use the same images, so their accuracies are not directly "
            "comparable."
        )
    validated = [(v["accuracy"], entry.label) for entry in entries if (v := entry.facts.validation)]
    same_split = len({(data_key(entry), entry.facts.recipe.val_size) for entry in entries}) == 1
    if len(validated) == len(entries) and same_split:
        best_first = sorted(validated, reverse=True)
        listed = ", ".join(f"{words.percent(share)} ({label})" for share, label in best_first)
        sentences.append(
            f"To choose between these runs, use their validation accuracy: {listed}. Choosing by "
            "test accuracy would make the test accuracy of the chosen run too optimistic."
        )
    return sentences


def data_key(entry: Entry) -> tuple[Any, ...]:
    """Images and classes, which must be equal for two runs to be comparable."""
    facts = entry.facts
    return facts.images or facts.source, facts.classes


def differing_fields(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Return the fields in which the recipes differ, with one value per entry.

    The value of a field that does not apply, such as mix_alpha without mixing, is a dash.
    """
    recipes = [entry.facts.recipe for entry in entries]
    values = {
        name: [
            (recipe_words.applies(recipe, name) and plain(recipe.to_json()[name])) or NO_VALUE
            for recipe in recipes
        ]
        for name in recipes[0].to_json()
    }
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def seed_groups(entries: Sequence[Entry]) -> list[Group]:
    """Group tested, finished runs that differ only in the seed, with the best run for each seed."""
    by_recipe: dict[tuple[Any, ...], dict[int, Entry]] = {}
    for entry in entries:
        facts = entry.facts
        if facts.test and facts.finished:
            recipe = facts.recipe.to_json()
            seedless = tuple((name, str(recipe[name])) for name in recipe if name != "seed")
            members = by_recipe.setdefault((seedless, data_key(entry)), {})
            members.setdefault(facts.recipe.seed, entry)
    groups = []
    for members in by_recipe.values():
        if len(members) > 1:
            shares = [
                entry.facts.test["accuracy"] for entry in members.values() if entry.facts.test
            ]
            mean, deviation = statistics.fmean(shares), statistics.stdev(shares)
            groups.append(Group(tuple(members.values()), mean, deviation))
    return groups


def differences(entries: Sequence[Entry]) -> list[Difference]:
    """Return differences in test accuracy between all pairs, or to the best of many runs."""
    tested = [entry for entry in entries if entry.facts.test]
    pairs = list(combinations(tested, 2))
    if len(tested) > MAX_PAIRS:
        pairs = [(tested[0], other) for other in tested[1:]]
    result = []
    for better, other in pairs:
        a, b = better.facts.test, other.facts.test
        if a and b and data_key(better) == data_key(other):
            interval = newcombe(_with_interval(a), _with_interval(b))
            result.append(Difference(better, other, a["accuracy"] - b["accuracy"], interval))
    return result


def _with_interval(test: Metrics) -> tuple[float, float, float]:
    low, high = test["accuracy_interval"]
    return test["accuracy"], low, high


def newcombe(a: tuple[float, float, float], b: tuple[float, float, float]) -> Interval:
    """Return the 95 % interval of the difference of two proportions (Newcombe 1998, method 10).

    Args:
        a, b: proportion, and the lower and upper bound of its Wilson interval.
    """
    difference = a[0] - b[0]
    below = math.hypot(a[0] - a[1], b[2] - b[0])
    above = math.hypot(a[2] - a[0], b[0] - b[1])
    return max(-1.0, difference - below), min(1.0, difference + above)


def significance(pairs: Sequence[Difference]) -> str:
    """Summarize which differences are not significant."""
    if not pairs:
        return "No two tested runs use the same images, so there are no differences to show."
    unclear = [pair for pair in pairs if not pair.significant]
    if not unclear:
        return "Every difference shown is significant: no interval includes zero."
    if len(unclear) == len(pairs):
        return "No difference shown is significant: every interval includes zero."
    named = [f"{pair.better.label} and {pair.other.label}" for pair in unclear]
    if len(named) > 3:
        return (
            f"Not significant, because their intervals include zero: {len(named)} of the "
            f"{len(pairs)} differences."
        )
    return f"Not significant, because the interval includes zero: {'; '.join(named)}."


def error_charts(entries: Sequence[Entry]) -> list[Chart]:
    """Training error with test or validation error over epochs, if any run recorded one."""
    curves, measured = [], set()
    for entry in entries:
        rows = entry.facts.rows
        if not rows:
            continue
        label = f"{entry.rank}  {entry.label}"
        other = None
        for key, images in (("test_accuracy", "test"), ("val_accuracy", "validation")):
            if other is None and (measured_rows := [row for row in rows if key in row]):
                other = _error(label, measured_rows, key)
                measured.add(images)
        curves.append((_error(label, rows, "train_accuracy"), other))
    if not measured:
        return []
    name = f"Training error (dashed) and {' or '.join(sorted(measured))} error (solid)"
    alt = f"{name} over epochs for {words.plural(len(curves), 'run')}."
    return [plots.errors("error", name, alt, curves)]


def _error(label: str, rows: Sequence[Mapping[str, Any]], key: str) -> Line:
    return Line(label, [row["epoch"] for row in rows], [1 - row[key] for row in rows])


def charts(entries: Sequence[Entry]) -> list[Chart]:
    """Curves of all runs; the numbers in the legend are the ranks in the table."""
    plotted = (
        ("train_loss", "Training loss", "cross-entropy, nats", False),
        ("train_accuracy", "Training accuracy", "accuracy, %", True),
        ("val_accuracy", "Validation accuracy", "accuracy, %", True),
        ("lr", "Learning rate", "learning rate", False),
    )
    drawn = []
    for key, name, label, percent in plotted:
        lines = []
        for entry in entries:
            rows: list[Mapping[str, Any]] = [row for row in entry.facts.rows if key in row]
            if rows:
                epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
                lines.append(Line(f"{entry.rank}  {entry.label}", epochs, values))
        if lines:
            alt = f"{name} over epochs for {words.plural(len(lines), 'run')}."
            identifier = key.replace("_", "-")
            drawn.append(plots.curves(identifier, name, alt, lines, label, percent=percent))
    return drawn
