"""The `resnet56 bench` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56 import recipe
from resnet56.cli.arguments import integer, parse
from resnet56.cli.common import Data, Threads, load_data, say
from resnet56.errors import UsageError

COMMA_SEPARATED = Annotated[str, tyro.conf.arg(metavar="A,B,...")]


@dataclass(frozen=True)
class BenchOptions:
    """Benchmark training and inference against a standard PyTorch loop.

    The benchmark measures the candidates alternately and takes a few minutes. Do not run other
    programs at the same time.
    """

    data: Data = None
    """Data set: digits (the default, no download), cifar10, cifar100 or a
    directory."""

    arch: COMMA_SEPARATED = "resnet56,resnet56-bottleneck"
    """Architectures."""

    batch: COMMA_SEPARATED = "32,128"
    """Training batch sizes."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per core."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision in which this package runs. The standard loop always uses fp32."""

    compiled: bool = False
    """Also benchmark torch.compile. This adds about a minute per table."""

    rounds: int = 7
    """Number of measurements per candidate."""

    seconds: float = 1.5
    """Duration of one measurement in seconds."""

    json: Path | None = None
    """Also write all results to this JSON file."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 bench`."""
    options = parse(BenchOptions, arguments, "resnet56 bench")
    if not (1 <= options.rounds <= 10_000 and 0 < options.seconds <= 3600):
        raise UsageError(
            "--rounds must be from 1 to 10,000, and --seconds must be positive and at most 3,600"
        )
    if options.json and not options.json.absolute().parent.is_dir():
        raise UsageError(f"--json {options.json}: the directory does not exist; create it first")
    if options.json and options.json.is_dir():
        raise UsageError(f"--json {options.json} is a directory; choose a file")
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
    result = bench(
        lambda: load_data(options.data),
        archs=archs,
        batches=_sizes(options.batch),
        device=options.device,
        precision=options.precision,
        compiled=options.compiled,
        rounds=options.rounds,
        seconds=options.seconds,
        log=say,
    )
    show_bench(result)
    if options.json:
        write_json(options.json, result)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [integer(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--batch: {error}") from None
    if not all(1 <= size <= recipe.MAX_VALUE for size in sizes):
        raise UsageError(
            f"--batch requires batch sizes from 1 to {recipe.MAX_VALUE:,}, such as 32,128"
        )
    return sizes
