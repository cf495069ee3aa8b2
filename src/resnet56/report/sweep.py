"""Content of the report on a sweep. The report shows only validation accuracies."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet56.errors import MissingExtraError
from resnet56.report import plots, words
from resnet56.report.plots import Chart
from resnet56.runs.schema import Sweep, SweepTrial
from resnet56.significance import mean_interval
from resnet56.sweep.importance import importance
from resnet56.sweep.results import FILE, read_sweep
from resnet56.sweep.space import format_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST = 10  # number of rows in the table of the best configurations


def is_sweep(directory: Path) -> bool:
    """Return whether a directory contains a sweep."""
    return (directory / FILE).is_file()


def content(directory: Path) -> dict[str, Any]:
    """Return the content of the report. Raises RunError if the sweep cannot be read."""
    sweep = read_sweep(directory)
    complete = sorted(
        (trial for trial in sweep["trials"] if trial["state"] == "complete"),
        key=lambda trial: (-trial["value"], trial["number"]),
    )
    shares: dict[str, float] = {}
    absent = "This analysis requires at least four complete trials with different accuracies."
    try:
        shares = importance(sweep)
    except MissingExtraError as error:
        absent = f"The importance was not computed: {error}."
    return {
        "title": title(sweep, complete),
        "name": sweep["study"],
        "data": sweep["data"],
        "state": states(sweep),
        "fields": list(sweep["space"]),
        "best": [row(trial, len(sweep["seeds"])) for trial in complete[:BEST]],
        "several_seeds": len(sweep["seeds"]) > 1,
        "seeds": ", ".join(map(str, sweep["seeds"])),
        "uncertainty": uncertainty(sweep, complete),
        "command": sweep.get("command"),
        "trials": [
            {
                "number": trial["number"],
                "settings": [format_setting(trial["settings"][name]) for name in sweep["space"]],
                "value": trial.get("value"),
                "outcome": outcome(trial),
                "epochs": len(trial["epochs"]),
            }
            for trial in sweep["trials"]
        ],
        "importance": importance_chart(shares) if shares else None,
        "absent": absent,
        "pruned": any(trial["state"] == "pruned" for trial in sweep["trials"]),
        "charts": charts(sweep) if complete else [],
    }


def title(sweep: Sweep, complete: Sequence[SweepTrial]) -> str:
    """Return the headline: the number of trials and the best result."""
    trials = words.plural(len(sweep["trials"]), "trial")
    if not complete:
        return f"{trials}, none of them complete"
    return f"{trials}: the best reaches {words.percent(complete[0]['value'])} validation accuracy"


def states(sweep: Sweep) -> list[str]:
    """Explain the accuracies, and count the trials by outcome."""
    counts = {
        state: sum(trial["state"] == state for trial in sweep["trials"])
        for state in ("complete", "pruned", "failed", "unfinished")
    }
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    return [
        f"All accuracies are validation accuracies, measured on {sweep['recipe']['val_size']:,} "
        "training images. The test images were not used.",
        f"Trials: {', '.join(parts) or 'none'}.",
    ]


def row(trial: SweepTrial, seeds: int) -> dict[str, Any]:
    """Return a row for the table of the best configurations."""
    values = trial["accuracies"]
    return {
        "number": trial["number"],
        "value": trial["value"],
        "interval": mean_interval(values) if seeds > 1 else None,
        "settings": [format_setting(value) for value in trial["settings"].values()],
    }


def uncertainty(sweep: Sweep, complete: Sequence[SweepTrial]) -> str:
    """Explain how uncertain the accuracies are."""
    if not complete:
        return ""
    images, best = sweep["recipe"]["val_size"], complete[0]["value"]
    if len(sweep["seeds"]) > 1:
        return (
            "The intervals are 95 % confidence intervals for the mean over the seeds, based on "
            "the t-distribution. They do not account for selecting the best of many trials."
        )
    width = 1.96 * math.sqrt(best * (1 - best) / images)
    return (
        f"Each trial uses one seed. With {images:,} images, the 95 % interval of an accuracy of "
        f"{words.percent(best)} extends about {words.points(width)} to each side. Accuracy also "
        "varies between seeds. Train the best configurations with several seeds before relying on "
        "smaller differences."
    )


def outcome(trial: SweepTrial) -> str:
    """Return the outcome of a trial."""
    if "error" in trial:
        return "diverged"
    if trial["state"] == "pruned":
        return f"pruned after epoch {len(trial['epochs'])}"
    return trial["state"]


# Charts


def importance_chart(shares: Mapping[str, float]) -> Chart:
    """Plot the importance of each setting as a bar."""
    names = sorted(shares, key=lambda name: shares[name])

    def draw(figure: "Figure", palette: plots.Palette) -> None:
        axes = figure.subplots()
        axes.barh(names, [100 * shares[name] for name in names], color=palette.series[0])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of the variance in accuracy, %")

    alt = ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in reversed(names))
    size = (plots.WIDTH, 0.9 + 0.3 * len(names))
    return Chart("importance", "Importance of the settings", f"{alt}.", draw, size)


def charts(sweep: Sweep) -> list[Chart]:
    """Return the charts of all trials."""
    return [slices(sweep), parallel(sweep), history(sweep)]


def slices(sweep: Sweep) -> Chart:
    """Plot the accuracy of the trials against each setting."""
    names = list(sweep["space"])
    columns = min(3, len(names))
    rows = -(-len(names) // columns)

    def draw(figure: "Figure", palette: plots.Palette) -> None:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            for state, color in (("pruned", palette.faint), ("complete", palette.series[0])):
                trials = [t for t in sweep["trials"] if t["state"] == state and t["epochs"]]
                axes.plot(
                    [_position(sweep, name, trial) for trial in trials],
                    [100 * trial.get("value", trial["epochs"][-1]) for trial in trials],
                    "o",
                    color=color,
                    markersize=3.5,
                )
            _label_axis(axes, sweep, name)
            axes.set_xlabel(name)
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy, %")

    size = (2.1 * columns + 0.4, 2.2 * rows)
    alt = "Validation accuracy against each setting. The dots of pruned trials are faint."
    return Chart("slices", "Accuracy by setting", alt, draw, size)


def parallel(sweep: Sweep) -> Chart:
    """Plot each complete trial as a line over parallel axes, one per setting."""
    names = list(sweep["space"])
    trials = sorted((t for t in sweep["trials"] if t["state"] == "complete"), key=_value)
    values = [trial["value"] for trial in trials]
    low, high = min(values), max(values)
    highlighted = max(1, len(trials) // 4)

    def draw(figure: "Figure", palette: plots.Palette) -> None:
        axes = figure.subplots()
        for index, trial in enumerate(trials):
            best = index >= len(trials) - highlighted
            heights = [_height(sweep, name, trial) for name in names]
            heights.append((trial["value"] - low) / (high - low) if high > low else 0.5)
            axes.plot(
                range(len(heights)),
                heights,
                color=palette.series[0] if best else palette.faint,
                linewidth=1.4 if best else 0.8,
            )
        axes.set_xticks(range(len(names) + 1), [*names, "accuracy"])
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.spines["left"].set_visible(False)
        for index, name in enumerate(names):
            for height, text in _marks(sweep, name):
                axes.text(index, height, f" {text}", fontsize=7, va="center")
        for height, value in ((0, low), (1, high)):
            axes.text(len(names), height, f" {100 * value:.2f} %", fontsize=7, va="center")

    size = (1.3 * (len(names) + 1) + 0.8, plots.HEIGHT)
    complete = words.plural(len(trials), "complete trial")
    alt = f"{complete}, one line each. The lines of the best quarter are dark."
    return Chart("parallel", "Settings of the complete trials", alt, draw, size)


def history(sweep: Sweep) -> Chart:
    """Plot the accuracy of all trials over epochs. A cross marks the end of a pruned trial."""

    def draw(figure: "Figure", palette: plots.Palette) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for trial in sweep["trials"]:
            complete = trial["state"] == "complete"
            accuracies = [100 * value for value in trial["epochs"]]
            if accuracies:
                axes.plot(
                    range(1, len(accuracies) + 1),
                    accuracies,
                    color=palette.series[0] if complete else palette.series[1],
                    linewidth=1.0,
                    marker="" if complete else "x",
                    markevery=[len(accuracies) - 1],
                    markersize=5,
                )
        axes.set_xlabel("epoch" if len(sweep["seeds"]) == 1 else "epoch, one seed after the other")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))

    alt = "Validation accuracy after each epoch. A cross marks the end of a pruned trial."
    return Chart("history", "Accuracy of each trial over epochs", alt, draw)


def _value(trial: SweepTrial) -> float:
    return trial["value"]


def _position(sweep: Sweep, name: str, trial: SweepTrial) -> float:
    """Return the position of a setting on its axis: its value, or its index in the choices."""
    values, found = sweep["space"][name], trial["settings"][name]
    return float(values["choices"].index(found) if "choices" in values else found)


def _height(sweep: Sweep, name: str, trial: SweepTrial) -> float:
    """Return the position of a setting on its axis, scaled to [0, 1]."""
    values, position = sweep["space"][name], _position(sweep, name, trial)
    if "choices" in values:
        return position / max(1, len(values["choices"]) - 1)
    low, high = values["low"], values["high"]
    if values["log"]:
        low, high, position = math.log(low), math.log(high), math.log(position)
    return float((position - low) / (high - low))


def _marks(sweep: Sweep, name: str) -> list[tuple[float, str]]:
    """Return the positions and labels of the ticks on the axis of a setting."""
    values = sweep["space"][name]
    if "choices" not in values:
        return [(0, format_setting(values["low"])), (1, format_setting(values["high"]))]
    last = max(1, len(values["choices"]) - 1)
    return [(i / last, format_setting(value)) for i, value in enumerate(values["choices"])]


def _label_axis(axes: "Axes", sweep: Sweep, name: str) -> None:
    """Label the axis of a setting."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    values = sweep["space"][name]
    if "choices" in values:
        choices = values["choices"]
        axes.set_xticks(range(len(choices)), [plots.shortened(format_setting(c)) for c in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif values["log"]:
        low, high = values["low"], values["high"]
        axes.set_xscale("log")
        axes.set_xlim(low * 0.9, high * 1.1)
        # The default formatters write powers as math text.
        axes.xaxis.set_major_locator(FixedLocator([low, math.sqrt(low * high), high]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
