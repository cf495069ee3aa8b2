"""Comparison of several runs: groups of runs, significance tests, and charts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from resnet56.report import plots, recipe_words, words
from resnet56.report.plots import Chart, Line
from resnet56.report.read import RunFacts, read_predictions
from resnet56.report.statements import state
from resnet56.significance import (
    LEVEL,
    Interval,
    Means,
    Paired,
    compare_means,
    compare_predictions,
    holm,
    mean_interval,
)

SECTIONS = [
    ("results", "Results"),
    ("seeds", "Seeds"),
    ("differences", "Differences"),
    ("recipes", "Recipes"),
    ("curves", "Curves"),
]
NO_VALUE = "\N{EN DASH}"
# Up to this number of groups, compare all pairs. With more groups, compare each group with the best
# group.
MAX_PAIRS = 5


@dataclass(frozen=True)
class Entry:
    """One run in the comparison."""

    rank: int
    label: str
    facts: RunFacts

    @property
    def accuracy(self) -> float:
        """The test accuracy. The run must have been evaluated on the test images."""
        assert self.facts.test is not None
        return self.facts.test["accuracy"]


@dataclass(frozen=True)
class Group:
    """Finished and tested runs that differ only in their seed, or one imported network.

    The runs are in ascending order of their seeds.
    """

    rank: int
    entries: tuple[Entry, ...]

    @property
    def label(self) -> str:
        """The label of the run, or the number of the group if it contains several runs."""
        return (
            self.entries[0].label
            if len(self.entries) == 1
            else f"group\N{NO-BREAK SPACE}{self.rank}"
        )

    @property
    def runs(self) -> str:
        """The labels of the runs."""
        return ", ".join(entry.label for entry in self.entries)

    @property
    def seeds(self) -> list[int]:
        """The seed of each run. Empty for an imported network, which has no recipe."""
        return [entry.facts.recipe.seed for entry in self.entries if entry.facts.recipe]

    @property
    def accuracies(self) -> list[float]:
        """The test accuracy of each run."""
        return [entry.accuracy for entry in self.entries]

    @property
    def mean(self) -> float:
        """The mean test accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation of the test accuracies, or None for one run."""
        return statistics.stdev(self.accuracies) if len(self.entries) > 1 else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % confidence interval of the mean over seeds, or None for one run."""
        return mean_interval(self.accuracies) if len(self.entries) > 1 else None


@dataclass(frozen=True)
class Difference:
    """The difference between the test accuracies of two groups, and its significance test.

    Attributes:
        better: the group with the higher mean.
        other: the other group.
        result: the result of the test, with `better` as the first group.
        p_value: p-value of the test, adjusted for the number of comparisons.
    """

    better: Group
    other: Group
    result: Means | Paired
    p_value: float

    @property
    def test(self) -> str:
        """The name of the test."""
        if isinstance(self.result, Paired):
            return "McNemar"
        return "Student" if self.result.pooled else "Welch"

    @property
    def permutation_p_value(self) -> float | None:
        """The p-value of the permutation test, or None if the test was not run."""
        return None if isinstance(self.result, Paired) else self.result.permutation_p_value

    @property
    def significant(self) -> bool:
        """True if the adjusted p-value is below 0.05."""
        return self.p_value < LEVEL


def content(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Return the content of the comparison of several runs."""
    entries = ranked(runs)
    trained = [entry for entry in entries if entry.facts.recipe]
    grouped = groups(entries)
    pairs = differences(grouped)
    return {
        "title": title(entries, grouped),
        "sections": SECTIONS,
        "entries": entries,
        "trained": trained,
        "fields": differing_fields(trained) if len(trained) > 1 else None,
        "unrecorded": unrecorded(entries),
        "groups": grouped,
        "differences": pairs,
        "significance": significance(pairs),
        "conclusions": conclusions(grouped, pairs),
        "state": states(entries),
        "charts": [*error_charts(entries), *charts(entries)],
        "test_recorded": any("test_accuracy" in row for e in entries for row in e.facts.rows),
    }


def ranked(runs: Sequence[RunFacts]) -> list[Entry]:
    """Return the runs in descending order of test accuracy, followed by untested runs."""
    order = sorted(runs, key=lambda run: -run.test["accuracy"] if run.test else math.inf)
    names = [run.name for run in runs]
    return [
        Entry(i, run.name if names.count(run.name) == 1 else str(run.path), run)
        for i, run in enumerate(order, start=1)
    ]


def title(entries: Sequence[Entry], grouped: Sequence[Group]) -> str:
    """Return the headline: the number of runs and the best group."""
    trained = all(entry.facts.recipe for entry in entries)
    runs = words.plural(len(entries), "run" if trained else "network")
    if not grouped:
        return f"{runs} compared, none of them finished and tested"
    if len({data_key(entry) for entry in entries}) > 1:
        return f"{runs} on different data sets"
    best = grouped[0]
    accuracy = words.percent(best.mean)
    if len(best.entries) > 1:
        seeds = words.plural(len(best.entries), "seed")
        return f"{runs} compared: the best group reaches {accuracy} test accuracy over {seeds}"
    seeds = " with one seed" if trained else ""
    return f"{runs} compared: the best reaches {accuracy} test accuracy{seeds}"


def states(entries: Sequence[Entry]) -> list[str]:
    """Return warnings about unfair comparisons and a sentence about the validation accuracies."""
    sentences = []
    for entry in entries:
        sentences += [f"{entry.label}: {sentence}" for sentence in state(entry.facts)]
    if len({data_key(entry) for entry in entries}) > 1:
        sentences.append(
            "These runs do not all use the same images, so their accuracies are not directly "
            "comparable."
        )
    validated = [(v["accuracy"], entry.label) for entry in entries if (v := entry.facts.validation)]
    val_sizes = [entry.facts.recipe.val_size if entry.facts.recipe else 0 for entry in entries]
    same_split = len(set(zip(map(data_key, entries), val_sizes, strict=True))) == 1
    if len(validated) == len(entries) and same_split:
        best_first = sorted(validated, reverse=True)
        listed = ", ".join(f"{words.percent(share)} ({label})" for share, label in best_first)
        sentences.append(
            f"To choose between these runs, use their validation accuracy: {listed}. If you choose "
            "a run by its test accuracy, that accuracy is an optimistic estimate."
        )
    return sentences


def data_key(entry: Entry) -> tuple[Any, ...]:
    """Return a key that identifies the images and classes of a run.

    Two runs are comparable only if their keys are equal.
    """
    facts = entry.facts
    return facts.images or facts.source, facts.classes


def differing_fields(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Return the fields in which the recipes of trained runs differ, with one value per entry.

    The value of a field that does not apply, such as mix_alpha without mixing, is a dash. The value
    of a custom part is its name and the start of its hash.
    """
    trained = [(e.facts.recipe, e.facts.custom) for e in entries if e.facts.recipe]
    values = {
        name: [
            (recipe_words.applies(recipe, name, custom) and words.plain(recipe.to_json()[name]))
            or NO_VALUE
            for recipe, custom in trained
        ]
        for name in trained[0][0].to_json()
    }
    kinds = sorted({kind for _, custom in trained for kind in custom})
    values |= {
        f"custom {kind}": [
            f"{custom[kind]['name']} ({custom[kind]['sha256'][:8]})" if kind in custom else NO_VALUE
            for _, custom in trained
        ]
        for kind in kinds
    }
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def unrecorded(entries: Sequence[Entry]) -> str | None:
    """State which networks have no recipe."""
    names = [entry.label for entry in entries if entry.facts.recipe is None]
    if not names:
        return None
    verb = "has" if len(names) == 1 else "have"
    return f"{words.listed(names)} {verb} no recorded recipe and no training curves."


def groups(entries: Sequence[Entry]) -> list[Group]:
    """Return groups of finished and tested runs that differ only in their seed.

    The group with the highest mean comes first. A network without a recipe forms its own group.
    Runs with the same settings and the same seed are not independent samples, so only the first of
    them is used.
    """
    by_recipe: dict[Any, dict[int, Entry]] = {}
    for entry in entries:
        facts = entry.facts
        if facts.test and not (facts.recipe and facts.stored):
            by_recipe[facts.path.resolve()] = {0: entry}
        elif facts.test and facts.recipe and facts.finished:
            recipe = facts.recipe.to_json()
            seedless = tuple((name, str(recipe[name])) for name in recipe if name != "seed")
            custom = tuple(sorted((kind, part["sha256"]) for kind, part in facts.custom.items()))
            members = by_recipe.setdefault((seedless, custom, data_key(entry)), {})
            members.setdefault(facts.recipe.seed, entry)
    found = [tuple(members[seed] for seed in sorted(members)) for members in by_recipe.values()]
    found.sort(key=lambda group: -statistics.fmean(entry.accuracy for entry in group))
    return [Group(rank, group) for rank, group in enumerate(found, start=1)]


def differences(grouped: Sequence[Group]) -> list[Difference]:
    """Compare all pairs of groups, or each group with the best group if there are many groups.

    The p-values are adjusted for the number of these comparisons. Pairs that cannot be tested are
    omitted: groups evaluated on different data sets, and single runs without predictions.npz.

    Raises:
        RunError: the predictions of a run are damaged.
    """
    pairs = list(combinations(grouped, 2))
    if len(grouped) > MAX_PAIRS:
        pairs = [(grouped[0], other) for other in grouped[1:]]
    tested = [(a, b, result) for a, b in pairs if (result := _test(a, b)) is not None]
    adjusted = holm([result.p_value for _, _, result in tested])
    return [
        Difference(a, b, result, p_value)
        for (a, b, result), p_value in zip(tested, adjusted, strict=True)
    ]


def _test(first: Group, second: Group) -> Means | Paired | None:
    """Test the difference between two groups. Return None if no test applies."""
    a, b = first.entries[0], second.entries[0]
    if data_key(a) != data_key(b):
        return None
    if len(first.entries) + len(second.entries) > 2:
        return compare_means(first.accuracies, second.accuracies)
    predictions = read_predictions(a.facts), read_predictions(b.facts)
    if predictions[0] is None or predictions[1] is None:
        return None
    if not np.array_equal(predictions[0].labels, predictions[1].labels):
        return None
    return compare_predictions(predictions[0].correct, predictions[1].correct)


def significance(pairs: Sequence[Difference]) -> str:
    """Summarize which differences are significant."""
    if not pairs:
        return (
            "None of the differences can be tested for significance. A significance test requires "
            "that both runs use the same test images and that each run directory contains a "
            "predictions.npz file."
        )
    unclear = [pair for pair in pairs if not pair.significant]
    if len(pairs) == 1:
        if unclear:
            return "The difference is not significant (p \N{GREATER-THAN OR EQUAL TO} 0.05)."
        return "The difference is significant (p < 0.05)."
    if not unclear:
        return "Every difference shown is significant (adjusted p < 0.05)."
    if len(unclear) == len(pairs):
        return "No difference shown is significant (adjusted p \N{GREATER-THAN OR EQUAL TO} 0.05)."
    named = [f"{pair.better.label} and {pair.other.label}" for pair in unclear]
    if len(named) > 3:
        return f"{len(named)} of the {len(pairs)} differences are not significant."
    return f"Not significant: {'; '.join(named)}."


def conclusions(grouped: Sequence[Group], pairs: Sequence[Difference]) -> list[str]:
    """Explain what the tests show and what they do not show."""
    sentences = []
    tests = {pair.test for pair in pairs}
    if "McNemar" in tests:
        sentences.append(
            "McNemar\N{RIGHT SINGLE QUOTATION MARK}s exact test compares two trained models on the "
            "same images. It shows whether these models would also differ on other, similar "
            "images. It does not show that one recipe is better than another, because a "
            "different seed produces a different model."
        )
    if "Welch" in tests:
        sentences.append(
            "Welch\N{RIGHT SINGLE QUOTATION MARK}s t-test compares means over seeds. It shows "
            "whether the recipes would also differ on these test images with other seeds."
        )
    if "Student" in tests:
        sentences.append(
            "The variance between seeds cannot be estimated from a single run. "
            "Student\N{RIGHT SINGLE QUOTATION MARK}s t-test compares the single run with a group "
            "of several seeds and assumes the same variance for both. For a more reliable test, "
            "train the recipe of the single run with more seeds."
        )
    for pair in pairs:
        if pair.test != "Welch":
            continue
        counts = len(pair.better.entries), len(pair.other.entries)
        smallest = min(1.0, 2 / math.comb(sum(counts), counts[0]))
        if smallest > LEVEL:
            sentences.append(
                f"With {counts[0]} and {counts[1]} runs, the permutation test cannot yield a "
                f"p-value below {smallest:.2g}."
            )
    if len(pairs) > 1:
        sentences.append(f"The adjusted p-values account for {len(pairs)} comparisons (Holm 1979).")
    if len(grouped) > 1:
        sentences.append(
            "The highest of several test accuracies is an optimistic estimate. To choose a "
            "recipe, use validation images."
        )
    return list(dict.fromkeys(sentences))


def error_charts(entries: Sequence[Entry]) -> list[Chart]:
    """Plot the training error and the test or validation error of each run over epochs.

    Return no chart if no run recorded a test or validation accuracy per epoch.
    """
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
    """Plot the curves of all runs. The numbers in the legend are the ranks in the table."""
    loss_label = plots.loss_label(entry.facts.custom for entry in entries)
    plotted = (
        ("train_loss", "Training loss", loss_label, False),
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
