"""Print metrics and model descriptions as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from resnet56.errors import escape, escape_line
from resnet56.progress import percent

if TYPE_CHECKING:
    from resnet56.report.comparison import Difference, Group
    from resnet56.runs.schema import Comparison, Evaluation, Metrics


def _table(*columns: str, left: int = 1) -> Table:
    """Create a table without borders. Columns after the first `left` are right-aligned."""
    table = Table(*columns, box=None)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def _cell(name: str) -> str:
    """Escape a name for a table cell, where rich would interpret brackets as markup."""
    return escape(name).replace("[", r"\[")


def _percentage(value: float | None) -> str:
    """Format a fraction as a percentage without the percent sign, or None as a dash."""
    return "\N{EN DASH}" if value is None else f"{100 * value:.2f}"


def show_metrics(metrics: "Metrics", title: str) -> None:
    """Print the metrics of one split."""
    console = Console(highlight=False)
    low, high = metrics["accuracy_interval"]
    ece, brier = metrics["calibration"]["ece"], metrics["calibration"]["brier"]
    lines = (
        title,
        f"accuracy {percent(metrics['accuracy'])} (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f}), top-2 {percent(metrics['top2'])}, top-3 {percent(metrics['top3'])}",
        f"loss {metrics['loss']:.4f}, ECE {ece:.4f}, Brier score {brier:.4f}, "
        f"{metrics['n']:,} images",
    )
    for line in lines:
        console.print(escape_line(line), markup=False, soft_wrap=True)
    table = _table("class", "precision", "recall", "F1", "images")
    for name, row in metrics["per_class"].items():
        scores = map(_percentage, (row["precision"], row["recall"], row["f1"]))
        table.add_row(_cell(name), *scores, f"{row['support']:,}")
    console.print(table)
    for pair in metrics["most_confused"][:3]:
        line = f"{pair['count']} {escape(pair['true'])} classified as {escape(pair['predicted'])}"
        console.print(line, markup=False, soft_wrap=True)


def show_extras(result: "Evaluation") -> None:
    """Print the robustness and the inference speed, if they were measured."""
    console = Console(highlight=False)
    if robustness := result.get("robustness"):
        severities = robustness["severities"]
        table = _table(
            f"accuracy on {robustness['images']:,} images at severity", *map(str, severities)
        )
        for name, accuracies in robustness["corruptions"].items():
            table.add_row(name, *(f"{100 * value:.1f}" for value in accuracies))
        console.print(table)
    if speed := result.get("speed"):
        for batch, row in (("1", speed["batch_1"]), ("256", speed["batch_256"])):
            console.print(
                f"batch {batch}: {row['ms_per_image']:.2f} ms per image, "
                f"{row['images_per_second']:,.0f} images/s"
            )


def show_accuracies(metrics: Mapping[str, "Metrics"]) -> None:
    """Print a table with one row per test set."""
    table = _table("images", "accuracy", "interval", "loss", "n")
    for name, row in metrics.items():
        low, high = row["accuracy_interval"]
        interval = f"{100 * low:.2f} to {100 * high:.2f}"
        table.add_row(
            _cell(name), percent(row["accuracy"]), interval, f"{row['loss']:.4f}", f"{row['n']:,}"
        )
    Console(highlight=False).print(table)


def show_comparison(comparison: "Comparison") -> None:
    """Print a comparison of two devices, precisions or runtimes."""
    print(f"{comparison['a']}: accuracy {percent(comparison['accuracy_a'])}")
    print(f"{comparison['b']}: accuracy {percent(comparison['accuracy_b'])}")
    print(
        f"difference between logits: median {comparison['median_difference']:.2g}, "
        f"maximum {comparison['largest_difference']:.2g}"
    )
    print(comparison["verdict"])


def show_description(description: dict[str, Any]) -> None:
    """Print the result of `describe`."""
    console = Console(highlight=False)
    shortcut = description["shortcut"]
    console.print(
        f"{description['arch']}: {description['depth']} layers, {description['block']} blocks of "
        f"{description['layers_per_block']} layers, "
        f"{'no shortcuts' if shortcut == 'none' else f'shortcut option {shortcut}'}"
    )
    table = _table("part", "layers", "blocks", "output", "parameters", "MACs", left=2)
    for part in description["parts"]:
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
        "total",
        str(description["depth"]),
        "",
        "",
        f"{description['parameters']:,}",
        f"{description['macs']:,}",
    )
    console.print(table)


def show_bench(result: dict[str, Any]) -> None:
    """Print the result of `bench`."""
    console = Console(highlight=False)
    machine, limits = result["machine"], result["limits"]
    console.print(
        f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, "
        f"PyTorch {machine['versions']['torch']}; {machine['precision']} matrix product "
        f"{limits['gflops']:,.0f} GFLOP/s, copy {limits['gigabytes_per_second']:.0f} GB/s",
        markup=False,
        soft_wrap=True,
    )
    for comparison in result["training"]:
        times = comparison["roofline"]
        roofline_ms = max(times.values())
        bound = "compute" if roofline_ms == times["compute_ms"] else "memory"
        table = _table("step", "ms", "images/s", "ratio", "min", "max", "roofline", "peak MB")
        for row in comparison["rows"]:
            is_baseline = row["name"].startswith("baseline")
            multiple = "" if is_baseline else f"{row['ms'] / roofline_ms:.1f}x"
            peak = row["peak_memory_mb"]
            table.add_row(*_timing_cells(row), multiple, f"{peak:,.0f}" if peak else "")
        console.print(
            f"\ntraining {comparison['arch']}, batch {comparison['batch']}; "
            f"roofline {roofline_ms:.1f} ms ({bound}-bound)"
        )
        console.print(table)
    for comparison in result["inference"]:
        table = _table("forward pass", "ms", "images/s", "ratio", "min", "max")
        for row in comparison["rows"]:
            table.add_row(*_timing_cells(row))
        console.print(f"\ninference {comparison['arch']}, batch {comparison['batch']}")
        console.print(table)
    table = _table("other", "seconds")
    for name, seconds in result["other"].items():
        table.add_row(name, f"{seconds:.2f}")
    console.print()
    console.print(table)


def _timing_cells(row: dict[str, Any]) -> list[str]:
    """Return a table row: the name, the time, the throughput, and the ratio with its range."""
    ratios = [f"{row[key]:.2f}" for key in ("ratio", "ratio_min", "ratio_max")]
    cells = ["1", "", ""] if row["baseline"] else ratios
    return [row["name"], f"{row['ms']:.1f}", f"{row['images_per_second']:,.0f}", *cells]


def show_inspection(inspection: dict[str, Any], images: int, data: str) -> None:
    """Print the gradients and responses of one model."""
    console = Console(highlight=False)
    console.print(
        escape_line(
            f"{inspection['name']}, {inspection['weights']} weights, loss "
            f"{inspection['loss']:.4f} on {images:,} images; {data}"
        ),
        markup=False,
        soft_wrap=True,
    )
    names = ("response std", "response gradient", "weight gradient", "dead ReLUs")
    table = _table("", "layer", *names, left=0)
    table.columns[1].justify = "left"
    for number, layer in enumerate(inspection["layers"], start=1):
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


def show_run_comparison(
    groups: "Sequence[Group]", differences: "Sequence[Difference]", title: str, notes: list[str]
) -> None:
    """Print the comparison of runs: a table of groups, a table of differences, and notes."""
    from resnet56.report import words

    console = Console(highlight=False)
    console.print(escape_line(title), markup=False, soft_wrap=True)
    table = _table("group", "runs", "seeds", "test accuracy", "mean", "95 % interval", left=2)
    for group in groups:
        interval = group.interval
        table.add_row(
            str(group.rank),
            _cell(group.runs),
            ", ".join(map(str, group.seeds)) or "\N{EN DASH}",
            ", ".join(map(_percentage, group.accuracies)),
            _percentage(group.mean),
            f"{_percentage(interval[0])} to {_percentage(interval[1])}" if interval else "",
        )
    console.print(table)
    if differences:
        table = _table("difference in points", "", "95 % interval", "test", "p", "adjusted p")
        for pair in differences:
            low, high = pair.result.interval
            table.add_row(
                _cell(f"{pair.better.label} minus {pair.other.label}"),
                f"{100 * pair.result.difference:+.2f}",
                f"{100 * low:+.2f} to {100 * high:+.2f}",
                pair.test,
                words.p_value(pair.result.p_value),
                words.p_value(pair.p_value),
            )
        console.print(table)
    for note in notes:
        console.print(escape_line(note), markup=False, soft_wrap=True)
