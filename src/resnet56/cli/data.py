"""`resnet56 data`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import fetch
from resnet56.errors import UsageError


@dataclass(frozen=True)
class FetchOptions:
    """Download a data set once, to where training looks for it."""

    name: tyro.conf.Positional[Literal["cifar10", "cifar100"]] = "cifar10"
    """Data set."""

    dir: Path | None = None
    """Folder to keep it in; by default RESNET56_DATA, or the user's cache."""

    mirror: tuple[str, ...] = ()
    """Addresses to try before the university's; also RESNET56_MIRROR."""


def run(arguments: list[str]) -> int:
    """resnet56 data fetch [NAME]."""
    usage = "resnet56 data fetch [cifar10|cifar100] [--dir DIR] [--mirror URL]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n  fetch  download a data set once, to where training finds it")
        return 0
    if arguments[0] != "fetch":
        raise UsageError(f"unknown: resnet56 data {arguments[0]}; usage: {usage}")
    options = parse(FetchOptions, arguments[1:], "resnet56 data fetch")
    print(fetch(options.name, options.dir, options.mirror))
    return 0
