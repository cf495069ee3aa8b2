"""The `resnet56 report` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import say
from resnet56.errors import Error, UsageError


@dataclass(frozen=True)
class ReportOptions:
    """Write a report on one run or sweep, a comparison of several runs, or slides about a run."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or the directory of a sweep."""

    out: Path | None = None
    """Output file. By default, report.html or slides.html in the
    run directory, or comparison.html in the current directory."""

    format: Literal["html", "md", "slides"] = "html"
    """One self-contained HTML page, Markdown with separate image
    files, or ten slides about one run in one HTML file."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 report`. Return 1 if a run was skipped."""
    options = parse(ReportOptions, arguments, "resnet56 report")
    if not options.runs:
        raise UsageError("no run given; use resnet56 report RUN [RUN ...]")
    from resnet56.report import write_report

    skipped = 0

    def skip(error: Error) -> None:
        nonlocal skipped
        skipped += 1
        say(f"resnet56: {error}")

    print(write_report(options.runs, options.out, format=options.format, on_error=skip))
    if skipped:
        say(f"resnet56: skipped {skipped} of {len(options.runs)} runs")
    return 1 if skipped else 0
