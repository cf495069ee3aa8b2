"""Compare plain and residual networks, for docs/explanation/why-residual.md.

python tools/degradation.py                           print the tables from the files in results/
python tools/degradation.py draw [DIR]                draw the figures from these files, by default
                                                      to docs/explanation/
python tools/degradation.py measure DATA PLAIN RES    measure the gradients at initialization and in
                                                      the runs PLAIN and RES (plain56 and resnet56)
                                                      on training images of DATA, and write
                                                      results/gradients.json
"""

import contextlib
import io
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from resnet56.cli import main
from resnet56.files import read_json, write_bytes, write_json
from resnet56.recipe import Recipe
from resnet56.report.plots import Line, Panel, errors, layers
from resnet56.runs.directory import RunDirectory
from results import RESULTS, ROOT, kept_runs, table

GRADIENTS = RESULTS / "gradients.json"
CIFAR10, FULL_LENGTH = RESULTS / "he2015-half", RESULTS / "he2015-seed0"
DIGITS = RESULTS / "digits"
PAPER = {"resnet20": "8.75", "resnet56": "6.97"}  # test errors in %, He et al. 2015, table 6
PAIR = ("plain56", "resnet56")
SEEDS = range(5)
FIRST, LAST = "conv1", "stage3.8.conv2"  # first and last convolutions of the 56-layer networks
QUANTITIES = ("response_std", "response_gradient", "dead_relus")

Runs = list[tuple[Recipe, RunDirectory]]
Network = dict[str, Any]  # an entry of "networks" in results/gradients.json


def by_depth(runs: Iterable[tuple[Recipe, RunDirectory]]) -> Runs:
    """Sort runs by depth, architecture and seed."""
    return sorted(runs, key=lambda pair: (pair[0].arch[-2:], pair[0].arch, pair[0].seed))


def error(metrics: dict[str, Any], digits: int) -> str:
    """Format an error in percent."""
    return f"{100 * (1 - metrics['accuracy']):.{digits}f}"


def error_with_interval(metrics: dict[str, Any], digits: int) -> str:
    """Format an error in percent, with its 95 % confidence interval."""
    high, low = (100 * (1 - accuracy) for accuracy in metrics["accuracy_interval"])
    return f"{error(metrics, digits)} ({low:.{digits}f} to {high:.{digits}f})"


def cifar10_table() -> str:
    """Return the final errors on CIFAR-10 next to those of the paper."""
    full = [(recipe, run) for recipe, run in kept_runs() if run.path == FULL_LENGTH]
    rows: list[tuple[str, ...]] = []
    for recipe, run in [*by_depth(kept_runs(CIFAR10)), *full]:
        evaluation = read_json(run.evaluation_file)
        row = (
            recipe.arch,
            f"{evaluation['step']:,}",
            error(evaluation["train"], 2),
            error_with_interval(evaluation["test"], 2),
            PAPER.get(recipe.arch, ""),
        )
        rows.append(row)
    head = ("network", "steps", "training error, %", "test error, %", "paper, 64,000 steps, %")
    return table(head, rows)


def digits_table() -> str:
    """Return the final errors on the digits, with one row per seed."""
    rows: list[tuple[str, ...]] = []
    for recipe, run in by_depth(kept_runs(DIGITS)):
        evaluation = read_json(run.evaluation_file)
        train, test = error(evaluation["train"], 1), error_with_interval(evaluation["test"], 1)
        rows.append((recipe.arch, str(recipe.seed), train, test))
    return table(("network", "seed", "training error, %", "test error, %"), rows)


def measure(data: str, runs: Sequence[str]) -> None:
    """Measure statistics of the layers of plain56 and resnet56 with several seeds, and save them.

    The seed determines the training images and, for untrained networks, the initial weights.
    """
    networks: list[Network] = []
    for weights, batch_norm in (("initial", True), ("initial", False), ("trained", True)):
        models = runs if weights == "trained" else PAIR
        arguments = [*models, "--data", data, *([] if batch_norm else ["--no-batch-norm"])]
        seeds = [inspect([*arguments, "--seed", str(seed)]) for seed in SEEDS]
        for i, arch in enumerate(PAIR):
            entries = [entries[i] for entries in seeds]
            networks.append(
                {
                    "arch": arch,
                    "weights": weights,
                    "batch_norm": batch_norm,
                    "loss": [rounded(entry["loss"]) for entry in entries],
                    "layers": {
                        layer["name"]: {
                            quantity: [rounded(entry["layers"][k][quantity]) for entry in entries]
                            for quantity in QUANTITIES
                        }
                        for k, layer in enumerate(entries[0]["layers"])
                        if layer["name"] != "fc"
                    },
                }
            )
    write_json(GRADIENTS, {"seeds": list(SEEDS), "networks": networks})


def inspect(arguments: list[str]) -> list[dict[str, Any]]:
    """Return one entry per model from `resnet56 inspect`."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if main(["inspect", *arguments, "--json"]):
            sys.exit(1)
    entries: list[dict[str, Any]] = json.loads(output.getvalue())["models"]
    return entries


def rounded(value: float) -> float:
    """Round to four significant digits, to keep the file small."""
    return float(f"{value:.4g}")


def gradient_tables() -> list[str]:
    """Return the gradients of two convolutions, at initialization and after training."""
    initial: list[tuple[str, ...]] = []
    trained: list[tuple[str, ...]] = []
    for network in read_json(GRADIENTS)["networks"]:
        last = network["layers"][LAST]["response_gradient"]
        first = network["layers"][FIRST]["response_gradient"]
        ratios = [a / b for a, b in zip(first, last, strict=True)]
        cells = [spread(values) for values in (network["loss"], last, first, ratios)]
        if network["weights"] == "initial":
            initial.append((network["arch"], "yes" if network["batch_norm"] else "no", *cells))
        else:
            trained.append((network["arch"], *cells, spread(dead_channels(network))))
    head = ("loss", "layer 55", "layer 1", "layer 1 / layer 55")
    return [
        table(("network", "batch norm", *head), initial),
        table(("network", *head, "dead channels"), trained),
    ]


def dead_channels(network: Network) -> list[float]:
    """Return the number of channels that are zero for all images and positions, for each seed."""
    return [
        sum(width(name) * layer["dead_relus"][i] for name, layer in network["layers"].items())
        for i in range(len(SEEDS))
    ]


def width(layer: str) -> int:
    """Return the number of output channels of a convolution."""
    return 16 if layer == FIRST else 16 * 2 ** (int(layer[len("stage")]) - 1)


def spread(values: list[float]) -> str:
    """Format the median and the range with two significant digits. Omit the range if it is zero."""
    chosen = (statistics.median(values), min(values), max(values))
    middle, low, high = (
        f"{float(f'{value:.1e}'):,.0f}" if value >= 10 else f"{value:.2g}" for value in chosen
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def draw(directory: Path) -> None:
    """Draw the errors on CIFAR-10 over epochs, and the statistics of the layers, for seed 0."""
    curves = []
    for recipe, run in by_depth(kept_runs(CIFAR10)):
        rows = run.read_metrics()
        epochs = [row["epoch"] for row in rows]
        train = Line(recipe.arch, epochs, [1 - row["train_accuracy"] for row in rows])
        test = Line(recipe.arch, epochs, [1 - row["test_accuracy"] for row in rows])
        curves.append((train, test))
    write_bytes(directory / "degradation.png", errors("degradation", "", "", curves).png())
    figures = {
        "gradients": (
            ("gradient, with batch norm", "response_gradient", "initial", True),
            ("gradient, no batch norm", "response_gradient", "initial", False),
        ),
        "gradients-trained": (
            ("gradient", "response_gradient", "trained", True),
            ("response, standard deviation", "response_std", "trained", True),
        ),
    }
    networks = read_json(GRADIENTS)["networks"]
    for name, panels in figures.items():
        drawn = [
            Panel(
                label,
                [
                    layer_line(network, quantity)
                    for network in networks
                    if (network["weights"], network["batch_norm"]) == (weights, batch_norm)
                ],
                log=quantity == "response_gradient",
            )
            for label, quantity, weights, batch_norm in panels
        ]
        write_bytes(directory / f"{name}.png", layers(name, "", "", drawn, columns=1).png())


def layer_line(network: Network, quantity: str) -> Line:
    """Return a line with the values of a quantity for all layers, for seed 0."""
    values = [layer[quantity][0] for layer in network["layers"].values()]
    return Line(network["arch"], list(range(1, len(values) + 1)), values)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            print("\n\n".join([cifar10_table(), digits_table(), *gradient_tables()]))
        case ["draw"]:
            draw(ROOT / "docs" / "explanation")
        case ["draw", directory]:
            draw(Path(directory))
        case ["measure", data, plain, residual]:
            measure(data, (plain, residual))
        case _:
            sys.exit(
                "usage: python tools/degradation.py [draw [DIR] | measure DATA PLAIN RESIDUAL]"
            )
