"""The `resnet56 compare` command."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Data
from resnet56.errors import UsageError

if TYPE_CHECKING:
    from resnet56.report.comparison import Difference, Group


@dataclass(frozen=True)
class CompareOptions:
    """Test whether the test accuracies of networks differ significantly.

    Runs that differ only in their seed form a group. This command compares the mean
    accuracies of groups over seeds. For two single runs, or two other networks, this command
    compares the predictions on the same images.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN|NAME|FILE [...]")
    ]
    """Run directories, model hub directories, exported files or
    names of pretrained models. Runs must have been evaluated
    on the same test images."""

    data: Data = None
    """Data set for networks without saved results. By default, the data set of the first run."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of
    stopping."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """Also write the comparison to this file, as an HTML page."""

    json: bool = False
    """Print JSON."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 compare`."""
    options = parse(CompareOptions, arguments, "resnet56 compare")
    if len(options.runs) < 2:
        raise UsageError(
            "a comparison requires at least two runs; use resnet56 compare RUN RUN ..."
        )
    from resnet56.cli.networks import read_networks
    from resnet56.files import to_json
    from resnet56.report import comparison, require_valid, write_report

    require_valid(len(options.runs), options.out, "html")

    facts = read_networks(options.runs, options.data, skip_broken=options.skip_broken)
    entries = comparison.ranked(facts)
    first = entries[0]
    for entry in entries:
        if entry.facts.test is None:
            path = str(entry.facts.path)
            raise UsageError(
                f"{path} has not been evaluated; evaluate it first: "
                f"{shlex.join(['resnet56', 'evaluate', path])}"
            )
        if comparison.data_key(entry) != comparison.data_key(first):
            raise UsageError(
                f"{first.facts.path} and {entry.facts.path} were tested on different images; "
                "compare runs on the same data set"
            )
    groups = comparison.groups(entries)
    if not groups:
        raise UsageError(
            "none of these runs is finished; continue one with resnet56 train --resume"
        )
    differences = comparison.differences(groups)
    title = comparison.title(entries, groups)
    notes = [
        *comparison.states(entries),
        comparison.significance(differences),
        *comparison.conclusions(groups, differences),
    ]
    if options.out is not None:
        write_report(facts, options.out)
    if options.json:
        print(to_json(_json(groups, differences, title, notes)))
        return 0
    from resnet56.cli.tables import show_run_comparison

    show_run_comparison(groups, differences, title, notes)
    if options.out is not None:
        print(options.out)
    return 0


def _json(
    groups: "Sequence[Group]", differences: "Sequence[Difference]", title: str, notes: list[str]
) -> dict[str, Any]:
    """Return the JSON output. Differences refer to groups by their index in `groups`."""
    return {
        "title": title,
        "groups": [
            {
                "runs": [
                    {
                        "run": str(entry.facts.path),
                        "seed": entry.facts.recipe.seed if entry.facts.recipe else None,
                        "test_accuracy": entry.accuracy,
                    }
                    for entry in group.entries
                ],
                "mean": group.mean,
                "standard_deviation": group.deviation,
                "interval": group.interval,
            }
            for group in groups
        ],
        "differences": [
            {
                "better": groups.index(pair.better),
                "other": groups.index(pair.other),
                "test": pair.test,
                **asdict(pair.result),
                "adjusted_p_value": pair.p_value,
                "significant": pair.significant,
            }
            for pair in differences
        ],
        "notes": notes,
    }
