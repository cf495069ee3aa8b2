"""The `resnet56 describe` command."""

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from resnet56.cli.arguments import parse


@dataclass(frozen=True)
class DescribeOptions:
    """Print the stages, blocks, layers, parameters and multiply-accumulates of a model."""

    arch: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[ARCH]")] = "resnet56"
    """Architecture: resnet56 (basic blocks, shortcut A), resnet56-b, resnet56-bottleneck, plain56
    (no shortcuts), and other depths."""

    classes: int = 10
    """Number of classes."""

    json: bool = False
    """Print JSON."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 describe`."""
    options = parse(DescribeOptions, arguments, "resnet56 describe")
    from resnet56.files import to_json
    from resnet56.model import describe as describe_architecture

    description = asdict(describe_architecture(options.arch, options.classes))
    if options.json:
        print(to_json(description))
        return 0
    from resnet56.cli.tables import show_description

    show_description(description)
    return 0
