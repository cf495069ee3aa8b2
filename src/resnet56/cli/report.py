"""The `resnet56 report` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Data, say
from resnet56.errors import Error, UsageError


@dataclass(frozen=True)
class ReportOptions:
    """Write a report on a network or sweep, a comparison of networks, or slides about a network.

    The report on a run shows the run's saved results. Other networks are evaluated on the data set
    that --data specifies.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN|NAME|FILE [...]")
    ]
    """Run directories, model hub directories, exported files or names of pretrained models, or the
    directory of a sweep."""

    data: Data = None
    """Data set for networks without saved results: a name or an image directory. In a comparison,
    the default is the data set of the first run."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""

    out: Path | None = None
    """Output file. By default, report.html or slides.html in the run directory. For a network that
    is not a run, NAME-report.html or NAME-slides.html in the current directory. For several
    networks, comparison.html in the current directory."""

    format: Literal["html", "md", "slides"] = "html"
    """One self-contained HTML page, Markdown with separate image files, or ten slides about one
    network in one HTML file."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 report`. Return 1 if a run was skipped."""
    options = parse(ReportOptions, arguments, "resnet56 report")
    if not options.runs:
        raise UsageError("no run given; use resnet56 report RUN [RUN ...]")
    from resnet56.cli.networks import read_networks
    from resnet56.files import check_writable
    from resnet56.report import require_valid, write_report
    from resnet56.report.sweep import is_sweep
    from resnet56.runs.sources import find_run

    require_valid(len(options.runs), options.out, options.format)
    if len(options.runs) == 1 and is_sweep(Path(options.runs[0])):
        if options.data is not None or options.skip_broken:
            raise UsageError(f"{options.runs[0]} is a sweep; omit --data and --skip-broken")
        print(write_report(options.runs, options.out, format=options.format))
        return 0
    if options.out is not None:
        check_writable(options.out.parent)
    elif len(options.runs) > 1 or find_run(options.runs[0]) is None:
        check_writable(Path())
    skipped = 0

    def skip(error: Error) -> None:
        nonlocal skipped
        skipped += 1
        say(f"resnet56: {error}")

    facts = read_networks(
        options.runs, options.data, skip_broken=options.skip_broken, on_error=skip
    )
    print(write_report(facts, options.out, format=options.format))
    if skipped:
        say(f"resnet56: skipped {skipped} of {len(options.runs)} runs")
    return 1 if skipped else 0
