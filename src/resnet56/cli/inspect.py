"""The `resnet56 inspect` command."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Data, Threads, for_classes, load_data
from resnet56.errors import UsageError

if TYPE_CHECKING:
    import torch

    from resnet56.data.dataset import Dataset
    from resnet56.model import ResNet
    from resnet56.runs.sources import Source

IMAGE_SUFFIXES = (".svg", ".png")
QUANTITIES = (  # field of LayerStatistics, panel label, whether the axis is logarithmic
    ("response_gradient", "gradient norm, response", True),
    ("weight_gradient", "gradient norm, weights", True),
    ("response_std", "standard deviation, response", False),
    ("dead_relus", "fraction of dead ReLUs", False),
)


@dataclass(frozen=True)
class InspectOptions:
    """Measure the gradients and responses of each layer on one batch of training images."""

    models: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN|ARCH [...]")
    ]
    """Runs, or architectures such as plain56, which are inspected at initialization. The plot shows
    all given models."""

    pretrained: bool = False
    """Use the pretrained weights of an architecture instead of its initial weights."""

    data: Data = None
    """Data set: a name or a directory. By default, the data set of the first run, or the digits."""

    images: int = 128
    """Number of training images in the batch. The images are not augmented."""

    seed: int = 0
    """Seed for the initial weights and the choice of images."""

    batch_norm: bool = True  # The help below describes --no-batch-norm.
    """Replace each batch norm with the identity. Only for untrained networks."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per idle core."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.svg")] = None
    """Also write a plot to this .svg or .png file."""

    json: bool = False
    """Print all results as JSON."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 inspect`."""
    options = parse(InspectOptions, arguments, "resnet56 inspect")
    if not options.models:
        raise UsageError("no model given; use resnet56 inspect RUN|ARCH ...")
    if options.images < 1:
        raise UsageError(f"--images must be at least 1, not {options.images}")
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, not {options.seed}")
    if options.out is not None and options.out.suffix.lower() not in IMAGE_SUFFIXES:
        raise UsageError(f"--out must end in {' or '.join(IMAGE_SUFFIXES)}, not {options.out}")
    from resnet56.files import to_json
    from resnet56.runtime import resolve_device
    from resnet56.threads import set_threads

    device = resolve_device(options.device)
    if options.threads is not None or device.type == "cpu":
        set_threads(options.threads)
    sources = [(name, _source(name, options)) for name in options.models]
    first = next((source for _, source in sources if source is not None), None)
    if options.data is None and first is not None and first.run is None:
        raise UsageError(f"{options.models[0]} is not a run, so --data is required")
    own = first.run.data_origin() if first is not None and first.run is not None else None
    dataset = load_data(options.data, own=own)
    entries = [_inspect(name, source, dataset, options, device) for name, source in sources]
    result = {
        "data": dataset.source,
        "images": options.images,
        "seed": options.seed,
        "batch_norm": options.batch_norm,
        "models": entries,
    }
    if options.out is not None:
        _draw(entries, options.out)
    if options.json:
        print(to_json(result))
        return 0
    from resnet56.cli.tables import show_inspection

    for entry in entries:
        show_inspection(entry, options.images, dataset.source)
    return 0


def _source(name: str, options: InspectOptions) -> "Source | None":
    """Open a run or pretrained weights, or return None for an architecture at initialization."""
    from resnet56.model import Architecture
    from resnet56.runs import pretrained
    from resnet56.runs.directory import RunDirectory
    from resnet56.runs.sources import open_model

    path = Path(name)
    is_name = re.fullmatch(r"(resnet|plain)\d[\w-]*", name) is not None
    if is_name and not options.pretrained and not RunDirectory(path).checkpoint_file.exists():
        try:
            Architecture.parse(name)
        except UsageError:
            if name in pretrained.names():
                raise UsageError(
                    f"{name} is not an architecture; to inspect the pretrained weights, add "
                    "--pretrained"
                ) from None
            raise
        return None
    if not is_name and not path.exists():
        raise UsageError(
            f"{name!r} is neither a run nor an architecture; architectures are resnet56, "
            "resnet56-b, resnet56-bottleneck, plain56, and other depths"
        )
    if pretrained.is_onnx(path):
        raise UsageError(
            f"{name} is an ONNX file, which has no gradients; inspect the run it was exported from"
        )
    if not options.batch_norm:
        raise UsageError(
            f"--no-batch-norm requires an untrained network; {name} has trained weights"
        )
    return open_model(path if path.exists() else name)


def _inspect(
    name: str,
    source: "Source | None",
    dataset: "Dataset",
    options: InspectOptions,
    device: "torch.device",
) -> dict[str, Any]:
    """Inspect a model and return its entry for the JSON output."""
    import torch

    from resnet56.data.augment import normalize
    from resnet56.data.dataset import channel_statistics
    from resnet56.inference import restore
    from resnet56.inspection import inspect_layers
    from resnet56.model import build

    model: ResNet
    if source is None:
        model = build(name, classes=len(dataset.classes), seed=options.seed).to(device)
        mean, std = channel_statistics(dataset.train.images)
        weights = "initial"
    else:
        net = source.checkpoint.config
        if net.classes != dataset.classes:
            dataset = for_classes(dataset, net.classes)
        model, mean, std = restore(source.checkpoint, device), net.mean, net.std
        weights = "trained"
    if options.images > len(dataset.train):
        raise UsageError(
            f"--images must be at most {len(dataset.train):,}, the number of training images, not "
            f"{options.images:,}"
        )
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(dataset.train), generator=generator)[: options.images]
    scale = (torch.tensor(mean, device=device), torch.tensor(std, device=device))
    images = normalize(dataset.train.images[chosen].to(device), *scale)
    labels = dataset.train.labels[chosen].to(device)
    inspection = inspect_layers(model, images, labels, batch_norm=options.batch_norm)
    return {"name": name, "weights": weights, **asdict(inspection)}


def _draw(entries: list[dict[str, Any]], out: Path) -> None:
    """Write a plot with one panel per quantity and one curve per model."""
    from resnet56.files import write_bytes
    from resnet56.report.plots import Line, Panel, layers

    panels = []
    for field, label, log in QUANTITIES:
        lines = []
        for entry in entries:
            values = [layer[field] for layer in entry["layers"]]
            points = [(i, y) for i, y in enumerate(values, start=1) if y is not None]
            lines.append(Line(entry["name"], [i for i, _ in points], [y for _, y in points]))
        values = [y for line in lines for y in line.y]
        # Without batch norm, responses can also grow by orders of magnitude.
        panels.append(Panel(label, lines, log or 0 < 100 * min(values) < max(values)))
    title = "Gradients and responses by layer"
    chart = layers("layers", title, f"{title} of {len(entries)} models.", panels)
    svg = out.suffix.lower() == ".svg"
    write_bytes(out, chart.svg_file() if svg else chart.png())
