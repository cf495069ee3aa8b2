"""The `resnet56 serve` command."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Threads, say
from resnet56.errors import MissingExtraError, UsageError


@dataclass(frozen=True)
class ServeOptions:
    """Classify images over HTTP, with a demo page at /."""

    run: Annotated[str, tyro.conf.arg(metavar="RUN|NAME|FILE")] = "resnet56"
    """Run directory, model hub directory, exported file, or name of a pretrained model."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines connect, without authentication or
    encryption."""

    port: int = 8056
    """Port to listen on. 0 selects a free port."""

    all_formats: bool = False
    """Accept all image formats, not only the formats that browsers display."""

    drain: float = 30.0
    """Time limit in seconds for requests in flight after Ctrl-C or SIGTERM."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per core."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 serve` until Ctrl-C or SIGTERM, then finish the requests in flight."""
    options = parse(ServeOptions, arguments, "resnet56 serve")
    if not 0 <= options.drain <= 3600:  # This also rejects NaN.
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
