"""`resnet56 serve`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Threads, say
from resnet56.errors import MissingExtraError, UsageError


@dataclass(frozen=True)
class ServeOptions:
    """Answer over HTTP what is in pictures, for programs and, at /, for people."""

    run: Annotated[str, tyro.conf.arg(metavar="RUN|NAME|FILE")] = "resnet56"
    """Network: a run's directory, one that comes with the package, or a file that export wrote."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, without password or encryption."""

    port: int = 8056
    """Port to listen on; 0 for any free one."""

    all_formats: bool = False
    """Whether to read every image format, not only those that browsers show."""

    drain: float = 30.0
    """Seconds to answer what has begun, after Ctrl-C or SIGTERM."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:N, mps."""

    threads: Threads = None
    """CPU threads; by default one per core."""


def run(arguments: list[str]) -> int:
    """resnet56 serve [--run RUN]; ends with Ctrl-C or SIGTERM, once what has begun is answered."""
    options = parse(ServeOptions, arguments, "resnet56 serve")
    if not 0 <= options.drain <= 3600:  # nor NaN
        raise UsageError(f"--drain must be from 0 to 3600 seconds, not {options.drain:g}")
    try:
        from resnet56.serve.limits import Limits
        from resnet56.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "resnet56":
            raise
        raise MissingExtraError(error.name or "a package", "serve") from None
    from resnet56.data.images import FORMATS
    from resnet56.predict import load

    limits = Limits(drain_seconds=options.drain)
    if options.all_formats:
        limits = dataclasses.replace(limits, formats=FORMATS)
    predictor = load(options.run, options.device, threads=options.threads)
    return serve(predictor, options.host, options.port, say, limits)
