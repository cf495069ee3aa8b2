"""`resnet56 export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.common import parse, say


@dataclass(frozen=True)
class ExportOptions:
    """Write a network for other programs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|NAME")]
    """Directory of a run, or the name of a network that comes with the package."""

    format: Literal["onnx", "hub"] = "onnx"
    """One ONNX file, or a folder with config.json, model.safetensors and README.md."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=("--output",), metavar="PATH")] = None
    """Where to; by default NAME.onnx, or the folder NAME-hub, here."""


def run(arguments: list[str]) -> int:
    """resnet56 export RUN."""
    options = parse(ExportOptions, arguments, "resnet56 export")
    from resnet56 import shipped

    checkpoint, ships = shipped.read_checkpoint(options.run)
    name = Path(options.run).resolve().name

    from resnet56.export import CHECKED, TOLERANCE, write_hub_folder, write_onnx
    from resnet56.rundir import RunDirectory, read_json

    if options.format == "onnx":
        out = options.out or Path(f"{name}.onnx")
        write_onnx(checkpoint, out)
        say(f"the same classes as PyTorch on {CHECKED} images, logits within {TOLERANCE:g}")
    else:
        out = options.out or Path(f"{name}-hub")
        file = RunDirectory(Path(options.run)).evaluation_file
        if ships:
            measured = shipped.card(options.run).get("evaluation")
        else:
            measured = read_json(file) if file.exists() else None
        write_hub_folder(checkpoint, out, measured)
    print(out)
    return 0
