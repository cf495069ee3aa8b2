"""`resnet56 bench`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.common import Data, load_data, parse, say
from resnet56.errors import UsageError

MANY = Annotated[str, tyro.conf.arg(metavar="A,B,...")]


@dataclass(frozen=True)
class BenchOptions:
    """Measure training and inference, in turns, against the loop that people write.

    Takes some minutes; nothing else should run meanwhile.
    """

    data: Data = None
    """Images: digits (the default; no download), cifar10, cifar100, or a folder."""

    arch: MANY = "resnet56,resnet56-bottleneck"
    """Networks."""

    batch: MANY = "32,128"
    """Batch sizes in training."""

    device: str = "auto"
    """Where: auto, cpu, cuda, cuda:N, mps."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of our side; the usual loop's is fp32."""

    compiled: bool = False
    """Also measure torch.compile; it takes a minute more for each table."""

    rounds: int = 7
    """Turns that each one takes."""

    seconds: float = 1.5
    """How long a turn is."""

    json: Path | None = None
    """Also write everything to this file."""


def run(arguments: list[str]) -> int:
    """resnet56 bench [options]."""
    options = parse(BenchOptions, arguments, "resnet56 bench")
    if options.rounds < 1 or not 0 < options.seconds < math.inf:
        raise UsageError("--rounds must be at least 1 and --seconds above 0")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UsageError(f"--json {options.json}: there is no such folder to write in")
    if options.json and options.json.is_dir():
        raise UsageError(f"--json {options.json} is a folder; choose a file")
    from resnet56 import model
    from resnet56.benchmark.benchmark import bench
    from resnet56.cli.tables import show_bench
    from resnet56.files import write_json

    archs = options.arch.split(",")
    for arch in archs:
        model.Architecture.parse(arch)
    found = bench(
        lambda: load_data(options.data),
        archs=archs,
        batches=_sizes(options.batch),
        device=options.device,
        precision=options.precision,
        compiled=options.compiled,
        rounds=options.rounds,
        seconds=options.seconds,
        say=say,
    )
    show_bench(found)
    if options.json:
        write_json(options.json, found)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch wants whole numbers above 0, as in 32,128; not {text!r}")
    return sizes
