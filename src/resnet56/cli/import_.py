"""`resnet56 import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import say
from resnet56.data.class_names import PUBLISHED
from resnet56.errors import UsageError


@dataclass(frozen=True)
class ImportOptions:
    """Make a run of a checkpoint that another program wrote; no code in it is run."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE|FOLDER|NAME")]
    """Checkpoint of torch.save or safetensors, a hub's folder, or what resnet56 export wrote."""

    out: Annotated[Path, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]
    """Run directory to make."""

    arch: str | None = None
    """Network; by default the one that the file's names and shapes fit. Name plain networks: their
    names and shapes are those of residual ones."""

    prefix: str | None = None
    """Where in the file the network is, if it holds several: as in student or model_ema.module."""

    mean: tuple[float, float, float] | None = None
    """Of its training images' channels, 0 to 1; by default as stated, or what its authors used."""

    std: tuple[float, float, float] | None = None
    """Their standard deviations."""

    classes: tuple[str, ...] = ()
    """Names in the order of the outputs, a file of lines, cifar10, cifar100, digits, or a run whose
    classes they are; by default as stated in the file, or CIFAR-10's or CIFAR-100's."""


def run(arguments: list[str]) -> int:
    """resnet56 import FILE --out RUN."""
    options = parse(ImportOptions, arguments, "resnet56 import")
    import torch

    from resnet56.inference import restore
    from resnet56.runs.directory import RunDirectory
    from resnet56.runs.sources import import_network

    directory = RunDirectory(options.out)
    if not all(0 <= value <= 1 for value in options.mean or ()):
        raise UsageError("--mean must be numbers from 0 to 1, as images are scaled to that range")
    if not all(0 < value <= 1 for value in options.std or ()):
        raise UsageError("--std must be numbers above 0 and at most 1")
    directory.refuse_taken()
    imported = import_network(
        options.file,
        options.arch,
        prefix=options.prefix,
        mean=options.mean,
        std=options.std,
        classes=_names(options.classes),
    )
    restore(imported.checkpoint, torch.device("cpu"))  # refuses what gives no answers
    directory.create()
    directory.save(imported.checkpoint)
    for remark in imported.remarks:
        say(remark)
    arch = imported.checkpoint.network.arch
    say(f"{arch}; to measure it: resnet56 evaluate {options.out} --data DIR")
    print(options.out)
    return 0


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """The names themselves, or those that the one argument stands for."""
    if len(given) != 1:
        return given
    if given[0] in PUBLISHED:
        return PUBLISHED[given[0]]
    from resnet56.runs.sources import open_network

    file = Path(given[0])
    try:
        if file.is_dir():
            return open_network(file).checkpoint.network.classes
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"--classes wants names, a text file of them, cifar10, cifar100, digits or a run, not "
            f"{file}"
        ) from None
    return tuple(line.strip() for line in lines if line.strip())
