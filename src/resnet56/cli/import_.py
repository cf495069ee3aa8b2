"""`resnet56 import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resnet56.cli.common import parse, say
from resnet56.errors import UsageError


@dataclass(frozen=True)
class ImportOptions:
    """Make a run of a checkpoint that another program wrote; no code in it is run."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """State dict, plain or wrapped, as torch.save or safetensors write it."""

    out: Annotated[Path, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]
    """Run directory to make."""

    arch: str | None = None
    """Network; by default the one that the file's names and shapes fit."""

    mean: tuple[float, float, float] | None = None
    """Of its training images' channels, from 0 to 1; by default what its authors used."""

    std: tuple[float, float, float] | None = None
    """Their standard deviations."""

    classes: tuple[str, ...] = ()
    """Names in the order of the outputs, or a file of lines; CIFAR-10's by default."""


def run(arguments: list[str]) -> int:
    """resnet56 import FILE --out RUN."""
    options = parse(ImportOptions, arguments, "resnet56 import")
    from resnet56.runs import convert
    from resnet56.runs.directory import RunDirectory

    directory = RunDirectory(options.out)
    directory.refuse_taken()
    imported = convert.read(
        options.file,
        options.arch,
        mean=options.mean,
        std=options.std,
        classes=_names(options.classes),
    )
    directory.create()
    directory.save(imported.checkpoint)
    for remark in imported.remarks:
        say(remark)
    arch = imported.checkpoint.network.arch
    say(f"{arch}; to measure it: resnet56 evaluate {options.out} --data DIR")
    print(options.out)
    return 0


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """The names themselves, or the lines of the one file that is given."""
    if len(given) != 1:
        return given
    file = Path(given[0])
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"--classes wants names, or a text file of them, not {file}") from None
    return tuple(line.strip() for line in lines if line.strip())
