"""Matplotlib charts, as PNG or as SVG that uses the CSS color variables of the page.

Matplotlib is imported only when a chart is drawn. Text is never parsed as math, because the names
of classes and runs can contain any character.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resnet56.libraries import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Size in inches, at 72 points per inch. The text is legible at a width of 300 pixels.
WIDTH, HEIGHT = 4.0, 2.7
PNG_DPI = 200
FEW = 3  # maximum number of curves for a legend inside the axes
LEGEND_ROW = 0.18  # height of a row in a legend below the axes, in inches
LONGEST_LABEL = 24  # maximum number of characters of a label in a legend with two columns


@dataclass(frozen=True)
class Palette:
    """The colors of a chart."""

    text: str
    grid: str
    series: tuple[str, ...]
    faint: str


# Unique placeholder colors, which `svg` replaces with CSS variables.
CSS = Palette("#010101", "#020202", tuple(f"#0300{i:02x}" for i in range(8)), "#040404")
VARIABLES = {
    CSS.text: "var(--ink-2)",
    CSS.grid: "var(--line)",
    CSS.faint: "var(--faint)",
    **{color: f"var(--s{i})" for i, color in enumerate(CSS.series)},
}
# Colors of the light theme in base.css, for PNG files on a white background.
PAPER = Palette(
    "#4a505a",
    "#dcdee2",
    ("#0b5fa5", "#c2570c", "#00795c", "#8a3f8f", "#806000", "#5f6b7a", "#b3261e", "#1b7f9e"),
    "#c9d9e8",
)
DASHES = ("-", "--", ":", "-.")

Draw = Callable[["Figure", Palette], None]


@dataclass(frozen=True)
class Chart:
    """A chart that is drawn on demand."""

    name: str  # unique identifier on the page, and stem of the PNG file name
    title: str
    alt: str  # alternative text
    draw: Draw
    size: tuple[float, float] = (WIDTH, HEIGHT)

    def svg(self) -> str:
        """Draw the chart as inline SVG for HTML, with unique ids and no XML declaration."""
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with _style(CSS):
            self._figure(CSS).savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
        text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)  # The comments repeat the labels.
        text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", text, count=1)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = text.replace("url(#", f"url(#{self.name}-")
        text = text.replace('xlink:href="#', f'href="#{self.name}-')
        for placeholder, variable in VARIABLES.items():
            text = text.replace(placeholder, variable)
        return text

    def png(self) -> bytes:
        """Draw the chart as a PNG image on a white background."""
        return self._file("png", {"Software": None})

    def svg_file(self) -> bytes:
        """Draw the chart as a self-contained SVG file on a white background."""
        return self._file("svg", dict.fromkeys(("Date", "Creator", "Format", "Type")))

    def figure(self) -> "Figure":
        """Draw the chart as a Matplotlib figure on a white background, without pyplot."""
        with _style(PAPER):
            figure = self._figure(PAPER)
            # Matplotlib creates ticks when it draws a figure, so draw the figure while the style is
            # active.
            figure.draw_without_rendering()
        return figure

    def _file(self, format: str, metadata: Mapping[str, None]) -> bytes:
        buffer = io.BytesIO()
        with _style(PAPER):
            figure = self._figure(PAPER)
            figure.savefig(buffer, format=format, dpi=PNG_DPI, metadata=dict(metadata))
        return buffer.getvalue()

    def _figure(self, palette: Palette) -> "Figure":
        # Import after `_style`, which prepares the import of Matplotlib.
        from resnet56.report.notebook import NotebookFigure

        figure = NotebookFigure(figsize=self.size, layout="constrained")
        self.draw(figure, palette)
        return figure


@contextmanager
def _style(palette: Palette) -> Iterator[None]:
    """Apply the style of the charts, independently of the user's matplotlibrc."""
    matplotlib = import_matplotlib()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Matplotlib draws missing glyphs as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "resnet56",
                "text.parse_math": False,
                "font.family": "sans-serif",
                "font.size": 8.5,
                "text.color": palette.text,
                "axes.labelcolor": palette.text,
                "axes.edgecolor": palette.grid,
                "axes.labelsize": 8.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": palette.grid,
                "grid.linewidth": 0.6,
                "xtick.color": palette.grid,
                "ytick.color": palette.grid,
                "xtick.labelcolor": palette.text,
                "ytick.labelcolor": palette.text,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
                "legend.labelcolor": palette.text,
                "lines.linewidth": 1.6,
            }
        )
        yield


@dataclass(frozen=True)
class Line:
    """A curve. A curve with only one point is drawn as a dot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int | None = None  # index into the palette. Defaults to the index of the curve.
    style: str | None = None  # Matplotlib line style. Defaults to `line_style`.


def line_style(index: int, lines: int) -> str:
    """Return a line style.

    If there are at most FEW curves, each has a different style. If there are more, curves of the
    same color have different styles.
    """
    return DASHES[index if lines <= FEW else index // len(PAPER.series) % len(DASHES)]


def shortened(label: str) -> str:
    """Shorten a legend label in the middle. A long label would leave no room for the axes."""
    if len(label) <= LONGEST_LABEL:
        return label
    half = LONGEST_LABEL // 2
    return f"{label[: half - 1]}…{label[-half:]}"


def curves(
    name: str, title: str, alt: str, lines: Sequence[Line], label: str, *, percent: bool = False
) -> Chart:
    """Plot curves over epochs. If `percent` is True, convert fractions to percentages."""

    def draw(figure: "Figure", palette: Palette) -> None:
        axes = figure.subplots()
        handles = draw_curves(axes, palette, lines, label, percent=percent)
        labels = [shortened(line.label) for line in lines]
        if 1 < len(lines) <= FEW:
            axes.legend(handles, labels)
        elif len(lines) > FEW:
            figure.legend(handles, labels, loc="outside lower left", ncols=2)

    rows = legend_rows(len(lines)) if len(lines) > FEW else 0
    return Chart(name, title, alt, draw, (WIDTH, HEIGHT + LEGEND_ROW * rows))


def loss_label(custom: Iterable[Mapping[str, object]]) -> str:
    """Return the label of the loss axis, given the custom parts of each run.

    A custom training loss is not necessarily cross-entropy.
    """
    return "loss" if any("loss" in parts for parts in custom) else "cross-entropy, nats"


def curve_panels(panels: Sequence[tuple[str, bool, Sequence[Line]]]) -> Chart:
    """Plot curves over epochs side by side, with a shared legend.

    Args:
        panels: for each panel, the label of its y-axis, whether to convert fractions to
            percentages, and its curves. Curves with the same label must have the same color and
            style.
    """
    labels = dict.fromkeys(line.label for _, _, lines in panels for line in lines)

    def draw(figure: "Figure", palette: Palette) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)
        handles: dict[str, Any] = {}
        for axes, (label, percent, lines) in zip(grid.flat, panels, strict=True):
            drawn = draw_curves(axes, palette, lines, label, percent=percent)
            handles |= {line.label: one for line, one in zip(lines, drawn, strict=True)}
        names = [shortened(label) for label in labels]
        figure.legend([handles[label] for label in labels], names, loc="outside lower left",
                      ncols=2)  # fmt: skip

    size = (WIDTH * len(panels), HEIGHT + LEGEND_ROW * legend_rows(len(labels)))
    return Chart("curves", "", "", draw, size)


def draw_curves(
    axes: "Axes", palette: Palette, lines: Sequence[Line], label: str, *, percent: bool = False
) -> list[Any]:
    """Plot curves over epochs on `axes` and return the drawn lines."""
    from matplotlib.ticker import MaxNLocator

    handles: list[Any] = []
    for i, line in enumerate(lines):
        color = i if line.color is None else line.color
        style = line_style(i, len(lines)) if line.style is None else line.style
        handles += axes.plot(
            line.x,
            [100 * y for y in line.y] if percent else line.y,
            color=palette.series[color % len(palette.series)],
            linestyle=style if len(line.x) > 1 else "",
            marker="o" if len(line.x) == 1 else "",
            markersize=4,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    # Axes for losses, learning rates and throughput start at zero to make heights comparable.
    if not percent and all(y >= 0 for line in lines for y in line.y):
        axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    epochs = {x for line in lines for x in line.x}
    if len(epochs) == 1:
        axes.set_xlim(min(epochs) - 1, min(epochs) + 1)
    return handles


def legend_rows(labels: int) -> int:
    """Return the number of rows of a legend with two columns."""
    return (labels + 1) // 2


@dataclass(frozen=True)
class Panel:
    """One of several plots with a shared x-axis."""

    label: str
    lines: Sequence[Line]
    log: bool = False


def layers(name: str, title: str, alt: str, panels: Sequence[Panel], *, columns: int = 2) -> Chart:
    """Plot quantities against the layer index, in a grid of panels with a shared legend."""
    rows = -(-len(panels) // columns)
    labels = [line.label for line in panels[0].lines]

    def draw(figure: "Figure", palette: Palette) -> None:
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        handles: list[Any] = []
        for axes, panel in zip(grid.flat, panels, strict=False):
            # A logarithmic axis cannot show zeros, which occur if gradients underflow.
            log = panel.log and any(y > 0 for line in panel.lines for y in line.y)
            handles = [
                axes.plot(
                    line.x,
                    line.y,
                    color=palette.series[i % len(palette.series)],
                    linestyle=line_style(i, len(panel.lines)),
                    linewidth=1.2,
                )[0]
                for i, line in enumerate(panel.lines)
            ]
            if log:
                axes.set_yscale("log")
                # The default formatters write powers as math text.
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_ylim(bottom=0)
            axes.set_ylabel(panel.label)
            axes.margins(x=0.02)
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        if len(labels) > 1:
            figure.legend(handles, [*map(shortened, labels)], loc="outside lower left", ncols=2)

    legend = LEGEND_ROW * legend_rows(len(labels))
    size = (0.95 * WIDTH * columns, 0.8 * HEIGHT * rows + legend)
    return Chart(name, title, alt, draw, size)


def errors(name: str, title: str, alt: str, runs: Sequence[tuple[Line, Line | None]]) -> Chart:
    """Plot errors over epochs, in the style of Figure 6 in He et al. 2015.

    Args:
        name: unique identifier on the page.
        title: title of the chart.
        alt: alternative text.
        runs: for each run, the training error (dashed line) and the test or validation error
            (solid line), in [0, 1].
    """
    last = [line.y[-1] for pair in runs for line in pair if line is not None]
    # Clip the errors of the first epochs to keep differences between the final errors visible.
    top = max(20.0, 150 * max(last))

    def draw(figure: "Figure", palette: Palette) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        handles: list[Any] = []
        for i, (training, other) in enumerate(runs):
            color = palette.series[i % len(palette.series)]
            for line, style, width in ((training, "--", 1.0), (other, "-", 1.6)):
                if line is not None:
                    [handle] = axes.plot(
                        line.x,
                        [100 * y for y in line.y],
                        color=color,
                        linestyle=style,
                        linewidth=width,
                        marker="o" if len(line.x) == 1 else "",
                        markersize=4,
                    )
            handles.append(handle)
        axes.set_xlabel("epoch")
        axes.set_ylabel("error, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.margins(x=0.02)
        axes.set_ylim(0, min(100.0, top))
        labels = [training.label for training, _ in runs]
        figure.legend(handles, [*map(shortened, labels)], loc="outside lower left", ncols=2)

    return Chart(name, title, alt, draw, (WIDTH, HEIGHT + LEGEND_ROW * legend_rows(len(runs))))


def reliability(name: str, bins: Sequence[Mapping[str, Any]], alt: str) -> Chart:
    """Plot accuracy against confidence and, in a second panel, the number of images per bin."""
    filled = [item for item in bins if item["count"]]

    def draw(figure: "Figure", palette: Palette) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot((0, 100), (0, 100), color=palette.text, linewidth=0.9, linestyle="--")
        upper.plot(
            [100 * item["confidence"] for item in filled],
            [100 * item["accuracy"] for item in filled],
            color=palette.series[0],
            marker="o",
            markersize=4,
        )
        upper.set_ylabel("accuracy, %")
        upper.set_ylim(0, 103)
        lower.bar(
            [100 * item["from"] for item in filled],
            [item["count"] for item in filled],
            width=[100 * (item["to"] - item["from"]) * 0.92 for item in filled],
            align="edge",
            color=palette.series[0],
        )
        lower.set_ylabel("images")
        lower.set_xlabel("confidence, %")
        lower.set_xlim(0, 102)
        figure.align_ylabels()

    return Chart(name, "Reliability", alt, draw, (WIDTH, 3.6))


def robustness(name: str, corruptions: Mapping[str, Sequence[float]], alt: str) -> Chart:
    """Plot accuracy under each corruption: the mean as a bar, and each severity as a dot."""
    order = sorted(corruptions, key=lambda key: sum(corruptions[key]) / len(corruptions[key]))

    def draw(figure: "Figure", palette: Palette) -> None:
        axes = figure.subplots()
        positions = range(len(order))
        means = [100 * sum(corruptions[key]) / len(corruptions[key]) for key in order]
        axes.barh(positions, means, height=0.62, color=palette.faint)
        for progress, key in zip(positions, order, strict=True):
            values = [100 * value for value in corruptions[key]]
            axes.plot(
                values,
                [progress] * len(values),
                "o",
                color=palette.series[0],
                markersize=3,
                zorder=3,
            )
        axes.set_yticks(list(positions), order)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, %")

    return Chart(name, "Accuracy on corrupted images", alt, draw, (WIDTH, 0.9 + 0.2 * len(order)))


def confusion(
    name: str, matrix: Sequence[Sequence[int]], classes: Sequence[str], *, normalize: bool = False
) -> Chart:
    """Plot the confusion matrix. With more than 20 classes, the labels are class indices.

    Args:
        name: unique identifier on the page.
        matrix: counts, indexed by true class and predicted class.
        classes: class names.
        normalize: if True, show percentages of the true class instead of counts.
    """
    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 20

    def draw(figure: "Figure", palette: Palette) -> None:
        axes: Axes = figure.subplots()
        # The square root makes error rates of a few percent visible.
        axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
        axes.grid(visible=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if few:
            axes.set_xticks(range(len(classes)), classes, rotation=90)
            axes.set_yticks(range(len(classes)), classes)
            for row, column in np.ndindex(*counts.shape):
                share, count = shares[row, column], int(counts[row, column])
                axes.text(
                    column,
                    row,
                    f"{100 * share:.1f}" if normalize else f"{count}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if share > 0.4 else palette.text,
                )

    return Chart(name, "Confusion matrix", "Counts by true and predicted class.", draw, (5.0, 5.0))


@dataclass(frozen=True)
class LabeledImage:
    """An image and the text below it."""

    pixels: Any  # (3, H, W) uint8
    label: str


def gallery(images: Sequence[LabeledImage], columns: int, absent: str) -> Chart:
    """Draw images with labels in a grid, or the text `absent` if there are no images."""
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))

    def draw(figure: "Figure", palette: Palette) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(images) :]:
            axes.set_axis_off()
        for axes, image in zip(grid.flat, images, strict=False):
            axes.imshow(image.pixels.transpose(1, 2, 0), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(image.label, fontsize=7)
            axes.spines[:].set_visible(False)
        if not images:
            grid[0, 0].text(0.5, 0.5, absent, ha="center", va="center", wrap=True)

    size = (1.1 * columns, 1.5 * rows) if images else (WIDTH, 1.0)
    return Chart("gallery", "", "", draw, size)


def data_uri(png: bytes) -> str:
    """Return a PNG image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
