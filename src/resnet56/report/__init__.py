"""A report from run directories: one HTML file, or Markdown with a folder of pictures.

Reads what a training and an evaluation left on disk; needs neither the data set nor a GPU.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resnet56.errors import UsageError

__all__ = ["write_report"]


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    format: Literal["html", "md"] = "html",
) -> Path:
    """Write the report of one run, or the comparison of several.

    Args:
        runs: run directories; at least one.
        out: the file to write. By default report.html (or .md) in the run's own directory, and
            for several runs comparison.html (or .md) in the current one. Markdown's pictures go
            into a folder beside it, named after it: report-files.
        format: "html" is one file that needs nothing else; "md" is GitHub-flavoured Markdown.

    Returns:
        The file written.

    Raises:
        UsageError: no runs, a folder as `out`, or a recipe.json that says what no recipe can say.
        RunError: a run that is missing or damaged, or a file that cannot be written.
    """
    from resnet56.report import comparison, page, render
    from resnet56.report.read import read_run

    if not runs:
        raise UsageError("a report needs at least one run directory")
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a folder; choose a file, as {out / f'report.{format}'}")
    facts = [read_run(Path(path)) for path in runs]
    if len(facts) == 1:
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
