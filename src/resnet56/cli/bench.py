"""`resnet56 bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56 import recipe
from resnet56.cli.arguments import integer, parse
from resnet56.cli.common import Data, Threads, load_data, say
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

    threads: Threads = None
    """CPU threads; by default one per core."""

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
    if not (1 <= options.rounds <= 10_000 and 0 < options.seconds <= 3600):
        raise UsageError("--rounds must be from 1 to 10,000, --seconds above 0 and at most 3,600")
    if options.json and not options.json.absolute().parent.is_dir():
        raise UsageError(f"--json {options.json}: there is no such folder to write in")
    if options.json and options.json.is_dir():
        raise UsageError(f"--json {options.json} is a folder; choose a file")
    from resnet56 import model
    from resnet56.benchmark.benchmark import bench
    from resnet56.cli.tables import show_bench
    from resnet56.files import write_json
    from resnet56.threads import set_threads

    if options.threads is not None:
        set_threads(options.threads)
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
        sizes = [integer(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--batch: {error}") from None
    if not all(1 <= size <= recipe.LARGEST for size in sizes):
        raise UsageError(f"--batch must be from 1 to {recipe.LARGEST:,}, as in 32,128")
    return sizes
