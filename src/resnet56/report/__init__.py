"""Reports on runs in HTML or Markdown, and slides.

A report needs only the files of the run. It needs neither the data set nor a GPU.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from resnet56.errors import Error, UsageError, option

__all__ = ["write_report"]


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    format: Literal["html", "md", "slides"] = "html",
    on_error: Callable[[Error], None] | None = None,
) -> Path:
    """Write a report on one run or sweep, a comparison of several runs, or slides about a run.

    Args:
        runs: one or more directories of training runs or imported networks, or the directory of a
            sweep.
        out: the file to write. The default for one run is report.html, report.md or slides.html in
            the run directory. The default for several runs is comparison.html or comparison.md in
            the current directory. A Markdown report writes its images to a directory next to it,
            such as report-files.
        format: "html" for one self-contained file, "md" for GitHub-flavored Markdown, or "slides"
            for an HTML file with ten slides about one run.
        on_error: called with the error of each unreadable run in a comparison, which then omits
            the run. By default, the error is raised.

    Returns:
        The path of the written file.

    Raises:
        UsageError: `runs` is empty, slides are requested for several runs, `out` is a directory,
            or a recipe.json has invalid values.
        RunError: a run is missing or damaged, or a file cannot be written.
    """
    from resnet56.report import comparison, page, render, slides, sweep
    from resnet56.report.read import read_run

    if not runs:
        raise UsageError("a report needs at least one run directory")
    if out is not None and out.is_dir():
        name = "slides.html" if format == "slides" else f"report.{format}"
        raise UsageError(f"{out} is a directory; choose a file such as {out / name}")
    if len(runs) == 1 and sweep.is_sweep(Path(runs[0])):
        if format == "slides":
            raise UsageError(f"{runs[0]} is a sweep; for slides, choose a run such as a trial")
        out = out or Path(runs[0]) / f"report.{format}"
        content, template = sweep.content(Path(runs[0])), "sweep"
        if format == "html":
            render.write_html(out, template, content)
        else:
            render.write_markdown(out, template, content)
        return out
    if format == "slides":
        if len(runs) > 1:
            html = option("format", "html")
            raise UsageError(f"slides show one run, not {len(runs)}; choose one run or use {html}")
        out = out or Path(runs[0]) / "slides.html"
        render.write_html(out, "slides", slides.content(read_run(Path(runs[0]))), "slides")
        return out
    facts, last = [], None
    for path in runs:
        try:
            facts.append(read_run(Path(path)))
        except Error as error:
            if on_error is None or len(runs) == 1:
                raise
            on_error(error)
            last = error
    if last is not None and not facts:
        raise last
    if len(runs) == 1:
        content, template = page.content(facts[0]), "page"
        out = out or facts[0].path / f"report.{format}"
    else:
        content, template = comparison.content(facts), "comparison"
        out = out or Path(f"comparison.{format}")
    if format == "html":
        render.write_html(out, template, content)
    else:
        render.write_markdown(out, template, content)
    return out
