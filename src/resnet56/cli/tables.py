"""Figures and networks as a terminal shows them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from resnet56.errors import printable, shown
from resnet56.progress import percent

if TYPE_CHECKING:
    from resnet56.runs.schema import Comparison, Evaluation, Metrics


def _table(*columns: str, left: int = 1) -> Table:
    """A table without lines; all columns but the first `left` are set right."""
    table = Table(*columns, box=None)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def _cell(name: str) -> str:
    """A foreign name as a cell, in which rich would take brackets for markup."""
    return shown(name).replace("[", r"\[")


def _share(value: float | None) -> str:
    """Percent without the sign; a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{100 * value:.2f}"


def show_figures(figures: "Metrics", title: str) -> None:
    """Print one split's entry of evaluation.json."""
    console = Console(highlight=False)
    low, high = figures["accuracy_interval"]
    ece, brier = figures["calibration"]["ece"], figures["calibration"]["brier"]
    lines = (
        title,
        f"accuracy {percent(figures['accuracy'])} (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f}), top-2 {percent(figures['top2'])}, top-3 {percent(figures['top3'])}",
        f"loss {figures['loss']:.4f}, calibration error {ece:.4f}, Brier score {brier:.4f}, "
        f"{figures['n']:,} images",
    )
    for line in lines:
        console.print(printable(line), markup=False, soft_wrap=True)
    table = _table("class", "precision", "recall", "F1", "images")
    for name, row in figures["per_class"].items():
        shares = map(_share, (row["precision"], row["recall"], row["f1"]))
        table.add_row(_cell(name), *shares, f"{row['support']:,}")
    console.print(table)
    for pair in figures["most_confused"][:3]:
        line = f"{pair['count']} {shown(pair['true'])} taken for {shown(pair['predicted'])}"
        console.print(line, markup=False, soft_wrap=True)


def show_extras(result: "Evaluation") -> None:
    """Print the robustness and speed of evaluation.json, where they were measured."""
    console = Console(highlight=False)
    if robustness := result.get("robustness"):
        severities = robustness["severities"]
        table = _table(
            f"accuracy on {robustness['images']:,} images, severity", *map(str, severities)
        )
        for name, accuracies in robustness["corruptions"].items():
            table.add_row(name, *(f"{100 * value:.1f}" for value in accuracies))
        console.print(table)
    if speed := result.get("speed"):
        for batch, row in (("1", speed["batch_1"]), ("256", speed["batch_256"])):
            console.print(
                f"batch {batch}: {row['milliseconds_an_image']:.2f} ms an image, "
                f"{row['images_per_second']:,.0f} images/s"
            )


def show_accuracies(figures: Mapping[str, "Metrics"]) -> None:
    """Print a line for each of several test sets."""
    table = _table("images", "accuracy", "interval", "loss", "n")
    for name, row in figures.items():
        low, high = row["accuracy_interval"]
        interval = f"{100 * low:.2f} to {100 * high:.2f}"
        table.add_row(
            _cell(name), percent(row["accuracy"]), interval, f"{row['loss']:.4f}", f"{row['n']:,}"
        )
    Console(highlight=False).print(table)


def show_comparison(found: "Comparison") -> None:
    """Print an entry of parity.json."""
    for side, accuracy in ((found["a"], found["accuracy_a"]), (found["b"], found["accuracy_b"])):
        print(f"{side}: accuracy {percent(accuracy)}")
    print(
        f"logits differ by {found['median_difference']:.2g} in the median, "
        f"{found['largest_difference']:.2g} at most"
    )
    print(found["verdict"])


def show_network(network: dict[str, Any]) -> None:
    """Print what `describe` computed of a network."""
    console = Console(highlight=False)
    shortcut = network["shortcut"]
    console.print(
        f"{network['arch']}: {network['depth']} layers, {network['block']} blocks of "
        f"{network['layers_a_block']} layers, "
        f"{'no shortcuts' if shortcut == 'none' else f'shortcut option {shortcut}'}"
    )
    table = _table("part", "layers", "blocks", "output", "parameters", "MACs", left=2)
    for part in network["parts"]:
        output = "x".join(map(str, part["output"]))
        table.add_row(
            part["name"],
            part["layers"],
            str(part["blocks"] or ""),
            output,
            f"{part['parameters']:,}",
            f"{part['macs']:,}",
        )
    table.add_row(
        "all", str(network["depth"]), "", "", f"{network['parameters']:,}", f"{network['macs']:,}"
    )
    console.print(table)


def show_bench(found: dict[str, Any]) -> None:
    """Print what `bench` measured."""
    console = Console(highlight=False)
    machine, limits = found["machine"], found["limits"]
    console.print(
        f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, "
        f"PyTorch {machine['versions']['torch']}; {machine['precision']} product "
        f"{limits['gflops']:,.0f} GFLOP/s, copy {limits['gigabytes_per_second']:.0f} GB/s",
        markup=False,
        soft_wrap=True,
    )
    for contest in found["training"]:
        floor = contest["floor"]
        least = max(floor.values())
        bound = "arithmetic" if least == floor["arithmetic_ms"] else "memory"
        table = _table("step", "ms", "images/s", "ratio", "least", "most", "floor", "peak MB")
        for row in contest["rows"]:
            ours = not row["name"].startswith("baseline")
            share = f"{row['milliseconds'] / least:.1f}x" if ours else ""
            peak = row["peak_memory_mb"]
            table.add_row(*_speeds(row), share, f"{peak:,.0f}" if peak else "")
        console.print(
            f"\ntraining {contest['arch']}, batch {contest['batch']}; "
            f"floor {least:.1f} ms, set by {bound}"
        )
        console.print(table)
    for contest in found["inference"]:
        table = _table("forward pass", "ms", "images/s", "ratio", "least", "most")
        for row in contest["rows"]:
            table.add_row(*_speeds(row))
        console.print(f"\ninference {contest['arch']}, batch {contest['batch']}")
        console.print(table)
    table = _table("the rest", "seconds")
    for name, seconds in found["rest"].items():
        table.add_row(name, f"{seconds:.2f}")
    console.print()
    console.print(table)


def _speeds(row: dict[str, Any]) -> list[str]:
    """Name, time, speed and the ratio with its range, as cells."""
    ratios = [f"{row[key]:.2f}" for key in ("ratio", "ratio_least", "ratio_most")]
    cells = ["1", "", ""] if row["baseline"] else ratios
    return [row["name"], f"{row['milliseconds']:.1f}", f"{row['images_per_second']:,.0f}", *cells]


def show_inspection(network: dict[str, Any], images: int, data: str) -> None:
    """Print an entry of `inspect`'s JSON."""
    console = Console(highlight=False)
    console.print(
        printable(
            f"{network['name']}, {network['weights']} weights, loss {network['loss']:.4f} on "
            f"{images:,} images; {data}"
        ),
        markup=False,
        soft_wrap=True,
    )
    names = ("response std", "response gradient", "weight gradient", "dead ReLUs")
    table = _table("", "layer", *names, left=0)
    table.columns[1].justify = "left"
    for number, layer in enumerate(network["layers"], start=1):
        dead = layer["dead_relus"]
        table.add_row(
            str(number),
            layer["name"],
            f"{layer['response_std']:.3g}",
            f"{layer['response_gradient']:.3g}",
            f"{layer['weight_gradient']:.3g}",
            "" if dead is None else percent(dead),
        )
    console.print(table)
