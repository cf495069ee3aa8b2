"""The `resnet56 export` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import say
from resnet56.errors import UsageError


@dataclass(frozen=True)
class ExportOptions:
    """Export a model to ONNX or to a model hub directory."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|NAME|FILE")]
    """Run directory, model hub directory, exported file, or name of a pretrained model."""

    format: Literal["onnx", "hub"] = "onnx"
    """Export an ONNX file, or a directory with config.json, model.safetensors and README.md."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=("--output",), metavar="PATH")] = None
    """Output path. By default, NAME.onnx or NAME-hub in the current directory."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 export`."""
    options = parse(ExportOptions, arguments, "resnet56 export")
    from resnet56.runs import pretrained
    from resnet56.runs.sources import open_model

    source = open_model(options.run)
    checkpoint = source.checkpoint
    path = Path(options.run).resolve()
    name = path.stem if path.is_file() else path.name

    from resnet56.export import CHECK_IMAGES, TOLERANCE, write_hub_directory, write_onnx

    if options.format == "onnx":
        out = options.out or Path(f"{name}.onnx")
        if out.is_dir():
            raise UsageError(f"--out {out} is a directory; choose a file, such as {name}.onnx")
        write_onnx(checkpoint, out)
        say(
            f"matches PyTorch on {CHECK_IMAGES} images: same predicted classes, logits within "
            f"{TOLERANCE:g}"
        )
    else:
        out = options.out or Path(f"{name}-hub")
        evaluation = None
        if source.pretrained is not None:
            evaluation = pretrained.card(source.pretrained).get("evaluation")
        elif source.run is not None:
            evaluation = source.run.read_evaluation(checkpoint.progress.step)
        write_hub_directory(checkpoint, out, evaluation)
    print(out)
    return 0
