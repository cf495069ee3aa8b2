"""Keep the small files of runs in results/, and generate the tables of docs/results.md from them.

python tools/results.py keep RUN NAME    copy the files to results/NAME, without local paths
python tools/results.py                  print the tables of docs/results.md
python tools/results.py draw             draw docs/results.png from its table of published results
"""

import dataclasses
import re
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet56.files import read_json, write_bytes, write_text
from resnet56.metrics import wilson_interval
from resnet56.progress import duration
from resnet56.recipe import RECIPES, Recipe, from_fields
from resnet56.report.plots import Chart, Ink
from resnet56.runs.directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
USAGE = "usage: python tools/results.py [keep RUN NAME | draw]"
HEAD = ("network", "command", "seeds", "test accuracy, %", "training accuracy, %", "time", "on")
CHANGED_HEAD = ("command", "seeds", "test, %", "training, %", "gap, points", "ECE", "time", "on")
TRIAL_HEAD = ("command", "seed", "validation, %", "training, %", "corrupted test images, %")


def keep(run: RunDirectory, name: str) -> None:
    """Copy what is small and says how the run was made and how good it is; not the weights."""
    origin = run.data_origin() or "digits"
    files = [run.recipe_file, run.environment_file, run.metrics_file, run.evaluation_file]
    if run.parity_file.exists():
        files.append(run.parity_file)
    for file in files:
        text = file.read_text(encoding="utf-8")
        # The command may name the folder itself or the one around it; the longer name goes first.
        for path in (origin, str(Path(origin).parent)) if "/" in origin else ():
            text = text.replace(path, "DIR")
        write_text(RESULTS / name / file.name, text)


def nearest(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The named recipe that differs least, and the fields in which `recipe` differs from it."""
    mine = recipe.to_json()
    differing = {
        name: {
            key: value
            for key, value in mine.items()
            if key != "seed" and value != base.to_json()[key]
        }
        for name, base in RECIPES.items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    return name, differing[name]


def command(recipe: Recipe) -> str:
    """What trains by `recipe` today."""
    name, differing = nearest(recipe)
    words = ["resnet56", "train", name, "--data", "DIR"]
    for key, value in differing.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(f"{each:g}" if type(each) is float else str(each)
                                     for each in values)]  # fmt: skip
    return shlex.join(words)


def percent(values: list[float]) -> str:
    """One value, or their mean and sample standard deviation."""
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def machine(facts: dict[str, Any]) -> str:
    """What it ran on: the GPU, or threads and processor."""
    threads, cores = facts["threads"], facts["cores"]
    share = f"{cores} cores" if threads == cores else f"{threads} of {cores} cores"
    processor = facts["processor"].replace("(R)", "").removesuffix(" Processor")
    return f"{facts.get('gpu') or f'{share}, {processor}'}, {facts['precision']}"


def kept() -> list[tuple[Recipe, RunDirectory]]:
    """All runs in results/, with their recipes."""
    runs = [RunDirectory(folder) for folder in sorted(RESULTS.iterdir())]
    return [(from_fields(read_json(run.recipe_file), str(run.recipe_file)), run) for run in runs]


@dataclasses.dataclass(frozen=True)
class Group:
    """All seeds of a recipe on a machine."""

    recipe: Recipe
    where: str
    seeds: list[int]
    figures: list[dict[str, Any]]
    times: list[float]

    def accuracies(self, split: str) -> list[float]:
        """One for each seed."""
        return [each[split]["accuracy"] for each in self.figures]

    def test_accuracy(self) -> str:
        """With its 95 % interval."""
        accuracies = self.accuracies("test")
        # All seeds are tested on the same images, so these say no more together than once.
        images = self.figures[0]["test"]["n"]
        low, high = wilson_interval(images * statistics.fmean(accuracies), images)
        return f"{percent(accuracies)} ({100 * low:.2f} to {100 * high:.2f})"


def groups() -> list[Group]:
    """Of all runs that held nothing out, the best first within an architecture."""
    runs: dict[tuple[Recipe, str], list[tuple[int, RunDirectory]]] = defaultdict(list)
    for recipe, run in kept():
        if not recipe.holdout:
            where = machine(read_json(run.environment_file))
            runs[dataclasses.replace(recipe, seed=0), where].append((recipe.seed, run))
    found = []
    for (recipe, where), pairs in runs.items():
        pairs.sort(key=lambda pair: pair[0])
        figures = [read_json(run.evaluation_file) for _, run in pairs]
        times = [sum(row["seconds"] for row in run.read_metrics()) for _, run in pairs]
        found.append(Group(recipe, where, [seed for seed, _ in pairs], figures, times))
    return sorted(
        found, key=lambda group: (group.recipe.arch, -statistics.fmean(group.accuracies("test")))
    )


def changed(recipe: Recipe) -> bool:
    """Whether it is a variation on a named recipe, not that for a network or a length of time."""
    return not nearest(recipe)[1].keys() <= {"arch", "epochs"}


def rows() -> list[tuple[str, ...]]:
    """What the named recipes give."""
    return [
        (
            f"`{group.recipe.arch}`",
            f"`{command(group.recipe)}`",
            ", ".join(map(str, group.seeds)),
            group.test_accuracy(),
            percent(group.accuracies("train")),
            duration(statistics.fmean(group.times)),
            group.where,
        )
        for group in groups()
        if not changed(group.recipe)
    ]


def variations() -> dict[str, list[tuple[str, ...]]]:
    """For each named recipe of which variations were run: those, and the recipe itself."""
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    varied = {nearest(group.recipe)[0] for group in groups() if changed(group.recipe)}
    for group in groups():
        if (name := nearest(group.recipe)[0]) not in varied:
            continue
        test, train = group.accuracies("test"), group.accuracies("train")
        errors = [each["test"]["calibration"]["ece"] for each in group.figures]
        row = (
            f"`{command(group.recipe)}`",
            ", ".join(map(str, group.seeds)),
            group.test_accuracy(),
            percent(train),
            percent([theirs - mine for mine, theirs in zip(test, train, strict=True)]),
            f"{statistics.fmean(errors):.3f}",
            duration(statistics.fmean(group.times)),
            group.where,
        )
        found[name].append(row)
    return found


def trials() -> list[tuple[str, ...]]:
    """A row for each run with images held out, the best on those first."""
    found = []
    for recipe, run in kept():
        if not recipe.holdout:
            continue
        figures = read_json(run.evaluation_file)
        accuracy = figures["holdout"]["accuracy"]
        low, high = figures["holdout"]["accuracy_interval"]
        row = (
            f"`{command(recipe)}`",
            str(recipe.seed),
            f"{100 * accuracy:.2f} ({100 * low:.2f} to {100 * high:.2f})",
            percent([figures["train"]["accuracy"]]),
            percent([figures["robustness"]["mean_accuracy"]]),
        )
        found.append((-accuracy, row))
    return [row for _, row in sorted(found)]


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the table of docs/results.md that sets ours among others."""

    name: str
    accuracy: float  # in %
    interval: list[float]  # its ends, in %; of ours only
    chosen: bool  # whether by the test set


def published() -> list[Published]:
    """That table, the best last."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = text[text.index("| source |") :].partition("\n\n")[0].splitlines()[2:]
    found = []
    for line in lines:
        source, network, accuracy, weights = line.replace("*", "").strip("| ").split(" | ")
        name = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", source).replace("`", "")
        figures = [float(figure) for figure in re.findall(r"\d\d\.\d+", accuracy)]
        interval = figures[-2:] if "(" in accuracy else []
        chosen = weights.startswith("best on the test set")
        found.append(Published(f"{name} ({network})", figures[0], interval, chosen))
    return sorted(found, key=lambda row: row.accuracy)


def draw(figure: "Figure", ink: Ink) -> None:
    """One dot per result, hollow where it was selected on the test set; ours with intervals."""
    axes = figure.subplots()
    rows = published()
    ours, theirs = ink.series[0], ink.text
    for height, row in enumerate(rows):
        color = ours if row.interval else theirs
        axes.plot(row.interval, [height] * len(row.interval), color=color, linewidth=2)
        face = "white" if row.chosen else color
        axes.plot(row.accuracy, height, "o", color=color, markerfacecolor=face)
        axes.annotate(
            f"{row.accuracy:.2f}",
            (row.accuracy, height),
            (0, 5),
            textcoords="offset points",
            ha="center",
            color=color,
        )
    for label, color, face, line in (
        ("this package, with 95 % interval", ours, ours, "-"),
        ("published", theirs, theirs, "none"),
        ("published, selected on the test set", theirs, "white", "none"),
    ):
        axes.plot(
            [], [], color=color, linestyle=line, marker="o", markerfacecolor=face, label=label
        )
    axes.legend(loc="lower right", frameon=True, framealpha=1, edgecolor="none")
    axes.set_title("ResNet-56 on CIFAR-10: test accuracy", loc="left", color=theirs)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    axes.set_ylim(-0.5, len(rows) - 0.2)
    axes.set_xlabel("test accuracy, %")
    axes.grid(axis="x")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            tables = [table(HEAD, rows())]
            tables += [table(CHANGED_HEAD, lines) for lines in variations().values()]
            tables.append(table(TRIAL_HEAD, trials()))
            print("\n\n".join(tables))
        case ["keep", run, name]:
            keep(RunDirectory(Path(run)), name)
        case ["draw"]:
            chart = Chart("results", "", "", draw, size=(7.0, 3.6))
            write_bytes(ROOT / "docs" / "results.png", chart.png())
        case _:
            sys.exit(USAGE)
