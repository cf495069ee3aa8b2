"""Copy the small files of runs to results/, and generate the tables of docs/results.md.

python tools/results.py keep RUN NAME    copy the files to results/NAME, without local paths
python tools/results.py                  print the tables of docs/results.md
python tools/results.py draw             draw docs/results.png from the table of published results
"""

import dataclasses
import math
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
from resnet56.report.plots import Chart, Palette
from resnet56.runs.directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
USAGE = "usage: python tools/results.py [keep RUN NAME | draw]"
HEAD = (
    "network",
    "command",
    "seeds",
    "test accuracy, %",
    "training accuracy, %",
    "time",
    "machine",
)
CHANGED_HEAD = (
    "command",
    "seeds",
    "test, %",
    "training, %",
    "gap, points",
    "ECE",
    "time",
    "machine",
)
TRIAL_HEAD = ("command", "seed", "validation, %", "training, %", "corrupted test images, %")
SEARCH_HEAD = ("augmentation", "weight decay", "EMA decay", "validation, %", "validation loss")
RECOMMENDATION_HEAD = (
    "recommendation",
    "change",
    "images",
    "before, %",
    "after, %",
    "difference, points",
)
# Recommendation of the original report, a change that follows it, and the runs before and after.
RECOMMENDATIONS = (
    (
        "data augmentation",
        "crops and flips in `report`",
        "report-no-augmentation-seed0",
        "report-seed0",
    ),
    (
        "data augmentation",
        "CutMix instead of Cutout in half of the batches of `best`, 90 epochs",
        "search90/cutout-wd0.0005",
        "search90/cutmix-wd0.0005",
    ),
    (
        "data augmentation",
        "RICAP instead of Cutout in `best`, 90 epochs",
        "search90/cutout-wd0.0005",
        "search90/ricap-wd0.0005",
    ),
    (
        "data augmentation",
        "TrivialAugment and Cutout instead of Cutout in `best`, 60 epochs",
        "best60-validation",
        "best60-trivial-augment-validation",
    ),
    (
        "regularization",
        "weight decay 1e-4 instead of 0 in `report`, without crops and flips",
        "report-no-augmentation-no-decay-seed0",
        "report-no-augmentation-seed0",
    ),
    (
        "regularization",
        "weight decay 5e-4 instead of 2e-4 in `best`, 90 epochs",
        "search90/cutmix-wd0.0002",
        "search90/cutmix-wd0.0005",
    ),
    (
        "epoch count",
        "40 epochs instead of 12 in `report`",
        "report12-seed0",
        "report-seed0",
    ),
    (
        "epoch count",
        "40 epochs instead of 12 in `report`, without crops and flips",
        "report12-no-augmentation-seed0",
        "report-no-augmentation-seed0",
    ),
    (
        "epoch count",
        "250 epochs instead of 140 in `best`",
        "best140-cutmix-seed0",
        "best250-seed0",
    ),
    (
        "all three",
        "`best` with Cutout only and 120 epochs instead of `report`, both with bottleneck blocks",
        "report-seed0",
        "best120-bottleneck-seed0",
    ),
)


def keep(run: RunDirectory, name: str) -> None:
    """Copy the small files of a run, without weights, and remove local paths."""
    origin = run.data_origin() or "digits"
    files = [run.recipe_file, run.environment_file, run.metrics_file, run.evaluation_file]
    if run.parity_file.exists():
        files.append(run.parity_file)
    for file in files:
        text = file.read_text(encoding="utf-8")
        # The command can contain the directory or its parent. Replace the longer path first.
        for path in (origin, str(Path(origin).parent)) if "/" in origin else ():
            text = text.replace(path, "DIR")
        write_text(RESULTS / name / file.name, text)


def nearest(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Return the most similar named recipe, and the fields in which `recipe` differs from it."""
    fields = recipe.to_json()
    differing = {
        name: {
            key: value
            for key, value in fields.items()
            if key != "seed" and value != base.to_json()[key]
        }
        for name, base in RECIPES.items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    return name, differing[name]


def command(recipe: Recipe) -> str:
    """Return the command that trains with this recipe."""
    name, differing = nearest(recipe)
    words = ["resnet56", "train", name, "--data", "DIR"]
    for key, value in differing.items():
        if recipe.mix == "none" and key in ("mix_alpha", "mix_probability"):
            continue  # has no effect
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(f"{item:g}" if type(item) is float else str(item)
                                     for item in values)]  # fmt: skip
    return shlex.join(words)


def percent(values: list[float]) -> str:
    """Format one value, or the mean and sample standard deviation of several values."""
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def machine(facts: dict[str, Any]) -> str:
    """Describe the machine by its GPU, or by its threads and processor."""
    threads, cores = facts["threads"], facts["cores"]
    share = f"{cores} cores" if threads == cores else f"{threads} of {cores} cores"
    processor = facts["processor"].replace("(R)", "").removesuffix(" Processor")
    return f"{facts.get('gpu') or f'{share}, {processor}'}, {facts['precision']}"


def kept_runs(directory: Path = RESULTS) -> list[tuple[Recipe, RunDirectory]]:
    """Return the runs in the subdirectories of `directory` with their recipes."""
    runs = [RunDirectory(file.parent) for file in sorted(directory.glob("*/recipe.json"))]
    return [(from_fields(read_json(run.recipe_file), str(run.recipe_file)), run) for run in runs]


@dataclasses.dataclass(frozen=True)
class Group:
    """All runs of a recipe on a machine, one per seed."""

    recipe: Recipe
    machine: str
    seeds: list[int]
    metrics: list[dict[str, Any]]
    times: list[float]

    def accuracies(self, split: str) -> list[float]:
        """Return the accuracy for each seed."""
        return [metrics[split]["accuracy"] for metrics in self.metrics]

    def test_accuracy(self) -> str:
        """Format the test accuracy with its 95 % confidence interval."""
        accuracies = self.accuracies("test")
        # All seeds are evaluated on the same images, so more seeds do not narrow the interval.
        images = self.metrics[0]["test"]["n"]
        low, high = wilson_interval(images * statistics.fmean(accuracies), images)
        return f"{percent(accuracies)} ({100 * low:.2f} to {100 * high:.2f})"


def groups(directory: Path = RESULTS) -> list[Group]:
    """Group the runs without a validation set. The groups are sorted by network and accuracy."""
    runs: dict[tuple[Recipe, str], list[tuple[int, RunDirectory]]] = defaultdict(list)
    for recipe, run in kept_runs(directory):
        if not recipe.val_size:
            host = machine(read_json(run.environment_file))
            runs[dataclasses.replace(recipe, seed=0), host].append((recipe.seed, run))
    found = []
    for (recipe, host), pairs in runs.items():
        pairs.sort(key=lambda pair: pair[0])
        metrics = [read_json(run.evaluation_file) for _, run in pairs]
        times = [sum(row["seconds"] for row in run.read_metrics()) for _, run in pairs]
        found.append(Group(recipe, host, [seed for seed, _ in pairs], metrics, times))
    return sorted(
        found, key=lambda group: (group.recipe.arch, -statistics.fmean(group.accuracies("test")))
    )


def changed(recipe: Recipe) -> bool:
    """Return whether a recipe differs from all named recipes in fields besides arch and epochs."""
    return not nearest(recipe)[1].keys() <= {"arch", "epochs"}


def rows(found: list[Group]) -> list[tuple[str, ...]]:
    """Return one row per group."""
    return [
        (
            f"`{group.recipe.arch}`",
            f"`{command(group.recipe)}`",
            ", ".join(map(str, group.seeds)),
            group.test_accuracy(),
            percent(group.accuracies("train")),
            duration(statistics.fmean(group.times)),
            group.machine,
        )
        for group in found
    ]


def variations() -> dict[str, list[tuple[str, ...]]]:
    """Return rows for each named recipe that has variations, and for these variations."""
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    varied = {nearest(group.recipe)[0] for group in groups() if changed(group.recipe)}
    for group in groups():
        if (name := nearest(group.recipe)[0]) not in varied:
            continue
        test, train = group.accuracies("test"), group.accuracies("train")
        errors = [metrics["test"]["calibration"]["ece"] for metrics in group.metrics]
        row = (
            f"`{command(group.recipe)}`",
            ", ".join(map(str, group.seeds)),
            group.test_accuracy(),
            percent(train),
            percent(
                [
                    train_accuracy - test_accuracy
                    for test_accuracy, train_accuracy in zip(test, train, strict=True)
                ]
            ),
            f"{statistics.fmean(errors):.3f}",
            duration(statistics.fmean(group.times)),
            group.machine,
        )
        found[name].append(row)
    return found


def trials() -> list[tuple[str, ...]]:
    """Return one row per run with a validation set, best first."""
    found = []
    for recipe, run in kept_runs():
        if not recipe.val_size:
            continue
        metrics = read_json(run.evaluation_file)
        accuracy = metrics["validation"]["accuracy"]
        low, high = metrics["validation"]["accuracy_interval"]
        row = (
            f"`{command(recipe)}`",
            str(recipe.seed),
            f"{100 * accuracy:.2f} ({100 * low:.2f} to {100 * high:.2f})",
            percent([metrics["train"]["accuracy"]]),
            percent([metrics["robustness"]["mean_accuracy"]]),
        )
        found.append((-accuracy, row))
    return [row for _, row in sorted(found)]


def candidates() -> list[tuple[str, ...]]:
    """Return one row per run and EMA of the search in results/search90, best first."""
    found = []
    for directory in (RESULTS / "search90").iterdir():
        recipe = read_json(directory / "recipe.json")
        names = {"none": "Cutout", "cutmix": "CutMix, Cutout", "ricap": "RICAP"}
        for ema in read_json(directory / "ema.json")["ema_candidates"]:
            row = (
                names[recipe["mix"]],
                f"{recipe['weight_decay']:g}",
                f"{ema['decay']:g}",
                percent([ema["val_accuracy"]]),
                f"{ema['val_loss']:.3f}",
            )
            found.append((-ema["val_accuracy"], row))
    return [row for _, row in sorted(found)]


def recommendations() -> list[tuple[str, ...]]:
    """Return one row per change that the original report recommended."""
    found: list[tuple[str, ...]] = []
    for recommendation, change, *names in RECOMMENDATIONS:
        (split, before, n), (other, after, m) = (accuracy_of(RESULTS / name) for name in names)
        if (split, n) != (other, m):
            sys.exit(f"{names[0]} and {names[1]} were evaluated on different images")
        # The interval treats the accuracies as independent, although the images are the same.
        margin = 1.96 * math.sqrt((before * (1 - before) + after * (1 - after)) / n)
        low, middle, high = (
            f"{100 * (after - before + offset):+.2f}" for offset in (-margin, 0, margin)
        )
        row = (
            recommendation,
            change,
            f"{n:,} {split}",
            percent([before]),
            percent([after]),
            f"{middle} ({low} to {high})",
        )
        found.append(row)
    return found


def accuracy_of(directory: Path) -> tuple[str, float, int]:
    """Return the split for comparing a run, and the accuracy and number of images on this split."""
    if (ema := directory / "ema.json").exists():
        content = read_json(ema)
        [chosen] = [
            candidate["val_accuracy"]
            for candidate in content["ema_candidates"]
            if candidate["decay"] == content["ema_decay"]
        ]
        return "validation", chosen, read_json(directory / "recipe.json")["val_size"]
    evaluation = read_json(directory / "evaluation.json")
    split = "validation" if "validation" in evaluation else "test"
    return split, evaluation[split]["accuracy"], evaluation[split]["n"]


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


@dataclasses.dataclass(frozen=True)
class Published:
    """A row in the table of published results in docs/results.md."""

    name: str
    accuracy: float  # in %
    interval: list[float]  # bounds in %; empty for results from other projects
    selected_on_test: bool  # whether the weights were selected on the test set


def published() -> list[Published]:
    """Parse the table of published results, and sort it by accuracy."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = text[text.index("| source |") :].partition("\n\n")[0].splitlines()[2:]
    found = []
    for line in lines:
        source, network, accuracy, weights = line.replace("*", "").strip("| ").split(" | ")
        name = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", source).replace("`", "")
        numbers = [float(number) for number in re.findall(r"\d\d\.\d+", accuracy)]
        interval = numbers[-2:] if "(" in accuracy else []
        selected = weights.startswith("best on the test set")
        found.append(Published(f"{name} ({network})", numbers[0], interval, selected))
    return sorted(found, key=lambda row: row.accuracy)


def draw(figure: "Figure", palette: Palette) -> None:
    """Draw one dot per result, and confidence intervals for the results of this package.

    A dot is hollow if the weights were selected on the test set.
    """
    axes = figure.subplots()
    rows = published()
    own_color, other_color = palette.series[0], palette.text
    for position, row in enumerate(rows):
        color = own_color if row.interval else other_color
        axes.plot(row.interval, [position] * len(row.interval), color=color, linewidth=2)
        face = "white" if row.selected_on_test else color
        axes.plot(row.accuracy, position, "o", color=color, markerfacecolor=face)
        axes.annotate(
            f"{row.accuracy:.2f}",
            (row.accuracy, position),
            (0, 5),
            textcoords="offset points",
            ha="center",
            color=color,
        )
    for label, color, face, line in (
        ("this package, with 95 % interval", own_color, own_color, "-"),
        ("published", other_color, other_color, "none"),
        ("published, selected on the test set", other_color, "white", "none"),
    ):
        axes.plot(
            [], [], color=color, linestyle=line, marker="o", markerfacecolor=face, label=label
        )
    axes.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none")
    axes.set_title("ResNet-56 on CIFAR-10: test accuracy", loc="left", color=other_color)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    axes.set_ylim(-0.5, len(rows) - 0.2)
    axes.set_xlabel("test accuracy, %")
    axes.grid(axis="x")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            tables = [table(HEAD, rows([g for g in groups() if not changed(g.recipe)]))]
            tables.append(table(HEAD, rows(groups(RESULTS / "cifar100"))))
            tables += [table(CHANGED_HEAD, lines) for lines in variations().values()]
            tables += [table(TRIAL_HEAD, trials()), table(SEARCH_HEAD, candidates())]
            tables.append(table(RECOMMENDATION_HEAD, recommendations()))
            print("\n\n".join(tables))
        case ["keep", run, name]:
            keep(RunDirectory(Path(run)), name)
        case ["draw"]:
            chart = Chart("results", "", "", draw, size=(7.0, 3.6))
            write_bytes(ROOT / "docs" / "results.png", chart.png())
        case _:
            sys.exit(USAGE)
