"""`resnet56 export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.common import parse, say
from resnet56.errors import UsageError


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
    from resnet56.runs import pretrained

    checkpoint, ships = pretrained.read_checkpoint(options.run)
    name = Path(options.run).resolve().name

    from resnet56.export import CHECKED, TOLERANCE, write_hub_folder, write_onnx
    from resnet56.runs.directory import RunDirectory

    if options.format == "onnx":
        out = options.out or Path(f"{name}.onnx")
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder; choose a file, as {name}.onnx")
        write_onnx(checkpoint, out)
        say(f"the same classes as PyTorch on {CHECKED} images, logits within {TOLERANCE:g}")
    else:
        out = options.out or Path(f"{name}-hub")
        if ships:
            measured = pretrained.card(options.run).get("evaluation")
        else:
            run = RunDirectory(Path(options.run))
            measured = run.read_evaluation(checkpoint.position.step)
        write_hub_folder(checkpoint, out, measured)
    print(out)
    return 0
