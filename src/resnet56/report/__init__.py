"""HTML and Markdown reports on runs, and slides.

A report requires only the files of the run. Neither the data set nor a GPU is required.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resnet56.errors import UsageError, option
from resnet56.files import StrPath

if TYPE_CHECKING:
    from resnet56.report.read import RunFacts

__all__ = ["require_valid", "write_report"]

Format = Literal["html", "md", "slides"]
_FILES = {"html": "report.html", "md": "report.md", "slides": "slides.html"}


def write_report(
    runs: Sequence["StrPath | RunFacts"],
    out: Path | None = None,
    *,
    format: Format = "html",
) -> Path:
    """Write a report on one run or sweep, a comparison of several runs, or slides about a run.

    Args:
        runs: one or more directories of training runs or imported networks, facts about other
            networks, or the directory of one sweep.
        out: the file to write. For one run, the default is report.html, report.md or slides.html in
            the run directory. For a network that is not a run, the default is
            NAME-report.html, NAME-report.md or NAME-slides.html in the current directory. For
            several runs, the default is comparison.html or comparison.md in the current directory.
            The images of a Markdown report are written to a directory next to the report, such as
            report-files.
        format: "html" for one self-contained file, "md" for GitHub-flavored Markdown, or "slides"
            for an HTML file with ten slides about one run.

    Returns:
        The path of the written file.

    Raises:
        UsageError: `runs` is empty, slides are requested for several runs, `out` is a directory,
            or a recipe.json contains invalid values.
        RunError: a run is missing or damaged, or a file cannot be written.
    """
    from resnet56.report import comparison, page, render, slides, sweep
    from resnet56.report.read import RunFacts, read_run

    require_valid(len(runs), out, format)
    first = runs[0]
    if len(runs) == 1 and not isinstance(first, RunFacts) and sweep.is_sweep(Path(first)):
        if format == "slides":
            raise UsageError(f"{first} is a sweep; for slides, choose one of its trials")
        out = out or Path(first) / f"report.{format}"
        content, template = sweep.content(Path(first)), "sweep"
    else:
        facts = [run if isinstance(run, RunFacts) else read_run(Path(run)) for run in runs]
        if len(facts) > 1:
            content, template = comparison.content(facts), "comparison"
            out = out or Path(f"comparison.{format}")
        else:
            write = slides.content if format == "slides" else page.content
            content, template = write(facts[0]), "slides" if format == "slides" else "page"
            out = out or _default_file(facts[0], format)
    if format == "md":
        render.write_markdown(out, template, content)
    else:
        render.write_html(out, template, content, "slides" if format == "slides" else "page")
    return out


def require_valid(runs: int, out: Path | None, format: Format) -> None:
    """Raise UsageError if `write_report` does not accept these arguments."""
    if not runs:
        raise UsageError("a report requires at least one run directory")
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a directory; choose a file such as {out / _FILES[format]}")
    if format == "slides" and runs > 1:
        html = option("format", "html")
        raise UsageError(f"slides show one run, not {runs}; choose one run or use {html}")


def _default_file(facts: "RunFacts", format: Format) -> Path:
    """Return the default path of a report on a run, or on a network that has no run directory."""
    if facts.stored:
        return facts.path / _FILES[format]
    stem = facts.path.stem if facts.path.is_file() else facts.name
    return Path(f"{stem}-{_FILES[format]}")
