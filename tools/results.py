"""The evidence behind docs/results.md: keep a run's small files, print tables of all of them.

python tools/results.py keep RUN NAME    copies them to results/NAME, without this machine's paths
python tools/results.py                  prints the tables, as docs/results.md has them
"""

import dataclasses
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from resnet56.metrics import wilson_interval
from resnet56.progress import duration
from resnet56.recipe import RECIPES, Recipe, from_fields
from resnet56.rundir import RunDirectory, read_json, write_text

RESULTS = Path(__file__).parents[1] / "results"
USAGE = "usage: python tools/results.py [keep RUN NAME]"
HEAD = ("network", "command", "seeds", "test accuracy, %", "training accuracy, %", "time", "on")
TRIAL_HEAD = ("command", "seed", "held out, %", "training, %", "corrupted test images, %")


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


def command(recipe: Recipe) -> str:
    """What trains by `recipe` today: the named recipe nearest to it, and what differs."""
    mine = recipe.to_json()
    differing = {
        name: {key: value for key, value in mine.items() if value != base.to_json()[key]}
        for name, base in RECIPES.items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    words = ["resnet56", "train", name, "--data", "DIR"]
    for key, value in differing[name].items():
        if key == "seed":
            continue
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
    what = facts.get("gpu") or f"{facts['threads']} of {facts['cores']} cores, {facts['processor']}"
    return f"{what}, {facts['precision']}"


def kept() -> list[tuple[Recipe, RunDirectory]]:
    """All runs in results/, with their recipes."""
    runs = [RunDirectory(folder) for folder in sorted(RESULTS.iterdir())]
    return [(from_fields(read_json(run.recipe_file), str(run.recipe_file)), run) for run in runs]


def rows() -> list[tuple[str, ...]]:
    """A row for all seeds of a recipe on a machine, the best first within an architecture."""
    groups: dict[tuple[Recipe, str], list[tuple[int, RunDirectory]]] = defaultdict(list)
    for recipe, run in kept():
        if recipe.holdout:
            continue
        where = machine(read_json(run.environment_file))
        groups[dataclasses.replace(recipe, seed=0), where].append((recipe.seed, run))
    found = []
    for (recipe, where), seeds in groups.items():
        runs = [run for _, run in sorted(seeds, key=lambda pair: pair[0])]
        figures = [read_json(run.evaluation_file) for run in runs]
        test = [each["test"]["accuracy"] for each in figures]
        # All seeds are tested on the same images, so these say no more together than once.
        images = figures[0]["test"]["n"]
        low, high = wilson_interval(images * statistics.fmean(test), images)
        times = [sum(row["seconds"] for row in run.read_metrics()) for run in runs]
        row = (
            f"`{recipe.arch}`",
            f"`{command(recipe)}`",
            ", ".join(str(seed) for seed, _ in sorted(seeds, key=lambda pair: pair[0])),
            f"{percent(test)} ({100 * low:.2f} to {100 * high:.2f})",
            percent([each["train"]["accuracy"] for each in figures]),
            duration(statistics.fmean(times)),
            where,
        )
        found.append((recipe.arch, -statistics.fmean(test), row))
    return [row for _, _, row in sorted(found)]


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


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            print(f"{table(HEAD, rows())}\n\n{table(TRIAL_HEAD, trials())}")
        case ["keep", run, name]:
            keep(RunDirectory(Path(run)), name)
        case _:
            sys.exit(USAGE)
