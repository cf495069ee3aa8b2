"""The `resnet56 data` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.errors import UsageError


@dataclass(frozen=True)
class FetchOptions:
    """Download a data set for training."""

    name: tyro.conf.Positional[Literal["cifar10", "cifar100"]] = "cifar10"
    """Data set to download."""

    dir: Path | None = None
    """Directory for data sets. By default, $RESNET56_DATA, or resnet56/ in the user's cache
    directory."""

    mirror: tuple[str, ...] = ()
    """URLs to try before the official URL. By default, $RESNET56_MIRROR."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 data fetch [NAME]`."""
    usage = "resnet56 data fetch [cifar10|cifar100] [--dir DIR] [--mirror URL]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n  fetch  download a data set for training")
        return 0
    if arguments[0] != "fetch":
        raise UsageError(f"unknown command: resnet56 data {arguments[0]}; usage: {usage}")
    options = parse(FetchOptions, arguments[1:], "resnet56 data fetch")
    from resnet56.data.readers import fetch

    print(fetch(options.name, options.dir, options.mirror))
    return 0
