"""`resnet56 report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import say
from resnet56.errors import Error, UsageError


@dataclass(frozen=True)
class ReportOptions:
    """Write a page about one run, or one that compares several."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of runs."""

    out: Path | None = None
    """File to write; by default report.html in the run, or comparison.html here."""

    format: Literal["html", "md"] = "html"
    """One self-contained page, or Markdown with pictures beside it."""


def run(arguments: list[str]) -> int:
    """resnet56 report RUN [RUN ...]; 1 if a run is left out of the comparison."""
    options = parse(ReportOptions, arguments, "resnet56 report")
    if not options.runs:
        raise UsageError("which run? resnet56 report RUN [RUN ...]; see resnet56 report --help")
    from resnet56.report import write_report

    left_out = 0

    def leave_out(error: Error) -> None:
        nonlocal left_out
        left_out += 1
        say(f"resnet56: {error}")

    print(write_report(options.runs, options.out, format=options.format, leave_out=leave_out))
    if left_out:
        say(f"resnet56: {left_out} of {len(options.runs)} runs are left out")
    return 1 if left_out else 0
