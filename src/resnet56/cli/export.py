"""`resnet56 export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import say
from resnet56.errors import UsageError


@dataclass(frozen=True)
class ExportOptions:
    """Write a network for other programs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|NAME|FILE")]
    """A run's directory, a network that comes with the package, or a file that export wrote."""

    format: Literal["onnx", "hub"] = "onnx"
    """One ONNX file, or a folder with config.json, model.safetensors and README.md."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=("--output",), metavar="PATH")] = None
    """Where to; by default NAME.onnx, or the folder NAME-hub, here."""


def run(arguments: list[str]) -> int:
    """resnet56 export RUN."""
    options = parse(ExportOptions, arguments, "resnet56 export")
    from resnet56.runs import pretrained
    from resnet56.runs.sources import open_network

    source = open_network(options.run)
    checkpoint = source.checkpoint
    path = Path(options.run).resolve()
    name = path.stem if path.is_file() else path.name

    from resnet56.export import CHECKED, TOLERANCE, write_hub_folder, write_onnx

    if options.format == "onnx":
        out = options.out or Path(f"{name}.onnx")
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder; choose a file, as {name}.onnx")
        write_onnx(checkpoint, out)
        say(f"the same classes as PyTorch on {CHECKED} images, logits within {TOLERANCE:g}")
    else:
        out = options.out or Path(f"{name}-hub")
        measured = None
        if source.pretrained is not None:
            measured = pretrained.card(source.pretrained).get("evaluation")
        elif source.run is not None:
            measured = source.run.read_evaluation(checkpoint.position.step)
        write_hub_folder(checkpoint, out, measured)
    print(out)
    return 0
