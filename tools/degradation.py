"""Compare plain and residual networks, for docs/explanation/why-residual.md.

python tools/degradation.py                   print the errors of the runs in results/digits/
python tools/degradation.py draw              draw degradation.png from the runs with seed 0
python tools/degradation.py gradients DATA    measure the gradients at initialization on training
                                              images of DATA, and draw gradients.png with seed 0
"""

import contextlib
import io
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from resnet56.cli import main
from resnet56.files import read_json, write_bytes
from resnet56.recipe import Recipe, from_fields
from resnet56.report.plots import Line, Panel, errors, layers
from resnet56.runs.directory import RunDirectory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "digits"
PICTURES = ROOT / "docs" / "explanation"
SEEDS = range(5)
FIRST, LAST = "conv1", "stage3.8.conv2"  # the first and the last convolution of 56 layers


def kept_runs() -> list[tuple[Recipe, RunDirectory]]:
    """Return the runs and their recipes, sorted by depth, architecture and seed."""
    runs = [RunDirectory(file.parent) for file in RESULTS.glob("*/recipe.json")]
    pairs = [(from_fields(read_json(run.recipe_file), str(run.recipe_file)), run) for run in runs]
    return sorted(pairs, key=lambda pair: (pair[0].arch[-2:], pair[0].arch, pair[0].seed))


def table() -> str:
    """Return the final errors of each network as a Markdown table, with one number per seed."""
    errors_of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for recipe, run in kept_runs():
        evaluation = read_json(run.evaluation_file)
        for split in ("train", "test"):
            error = 100 * (1 - evaluation[split]["accuracy"])
            errors_of[recipe.arch][split].append(f"{error:.1f}")
    lines = ["| network | training error, % | test error, % |", "|---|---|---|"]
    for arch, splits in errors_of.items():
        lines.append(f"| {arch} | {', '.join(splits['train'])} | {', '.join(splits['test'])} |")
    return "\n".join(lines)


def draw() -> None:
    """Draw the training error (dashed) and the test error (solid) over epochs."""
    curves = []
    for recipe, run in kept_runs():
        if recipe.seed == 0:
            rows = run.read_metrics()
            epochs = [row["epoch"] for row in rows]
            train = Line(recipe.arch, epochs, [1 - row["train_accuracy"] for row in rows])
            test = Line(recipe.arch, epochs, [1 - row["test_accuracy"] for row in rows])
            curves.append((train, test))
    write_bytes(PICTURES / "degradation.png", errors("degradation", "", "", curves).png())


def gradients(data: str, seed: int, *, batch_norm: bool) -> dict[str, dict[str, float]]:
    """Return the norm of the gradient with respect to each convolution output of two networks."""
    arguments = ["plain56", "resnet56", "--data", data, "--seed", str(seed), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if main(["inspect", *arguments, *([] if batch_norm else ["--no-batch-norm"])]):
            sys.exit(1)
    return {
        model["name"]: {
            layer["name"]: layer["response_gradient"]
            for layer in model["layers"]
            if layer["name"] != "fc"
        }
        for model in json.loads(output.getvalue())["models"]
    }


def compare_gradients(data: str) -> None:
    """Print the gradients of the last and the first convolution, and draw all gradients."""
    print("| network | batch norm | layer 55 | layer 1 | layer 1 / layer 55 |")
    print("|---|---|---|---|---|")
    panels = []
    for batch_norm in (True, False):
        seeds = [gradients(data, seed, batch_norm=batch_norm) for seed in SEEDS]
        for arch in seeds[0]:
            last = [by_arch[arch][LAST] for by_arch in seeds]
            first = [by_arch[arch][FIRST] for by_arch in seeds]
            ratios = [a / b for a, b in zip(first, last, strict=True)]
            cells = " | ".join(spread(values) for values in (last, first, ratios))
            print(f"| {arch} | {'yes' if batch_norm else 'no'} | {cells} |")
        lines = [
            Line(arch, list(range(1, len(norms) + 1)), list(norms.values()))
            for arch, norms in seeds[0].items()
        ]
        panels.append(Panel(f"gradient, {'with' if batch_norm else 'no'} batch norm", lines, True))
    write_bytes(PICTURES / "gradients.png", layers("gradients", "", "", panels).png())


def spread(values: list[float]) -> str:
    """Format the median and the range with two significant digits."""
    chosen = (statistics.median(values), min(values), max(values))
    middle, low, high = (
        f"{float(f'{value:.1e}'):,.0f}" if value >= 10 else f"{value:.2g}" for value in chosen
    )
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            print(table())
        case ["draw"]:
            draw()
        case ["gradients", data]:
            compare_gradients(data)
        case _:
            sys.exit("usage: python tools/degradation.py [draw | gradients DATA]")
