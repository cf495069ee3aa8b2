"""What several commands share: flags and their parser, remarks, data by name."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from resnet56.errors import UsageError

if TYPE_CHECKING:
    from resnet56.data.dataset import Dataset

Options = TypeVar("Options")

Data = Annotated[str | None, tyro.conf.arg(aliases=("--data-dir",), metavar="NAME|DIR")]
Out = Annotated[Path | None, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]


def say(line: str) -> None:
    """A remark on stderr: stdout is for results."""
    print(line, file=sys.stderr)


def show(what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A sign of life on stderr."""
    from rich.console import Console

    from resnet56.progress import measuring

    return measuring(what, total, Console(stderr=True, highlight=False))


def fetch(name: str, root: Path | None = None, mirrors: Sequence[str] = ()) -> Path:
    """Download the data set, with a bar; returns its folder."""
    from resnet56.data import download
    from resnet56.progress import DownloadProgress

    archive = download.ARCHIVES[name]
    with DownloadProgress(archive.filename) as progress:
        return download.fetch(
            archive, root or download.default_root(), mirrors=mirrors, progress=progress
        )


def load_data(name: str) -> "Dataset":
    """The data set of that name, downloaded if it must be, or in that folder."""
    from resnet56.data import readers
    from resnet56.data.download import ARCHIVES

    if name == "digits":
        return readers.load_digits()
    if name in ARCHIVES:
        return readers.load_folder(fetch(name))
    if not Path(name).exists() and not re.search(r"[/\\.]", name):
        raise UsageError(
            f"unknown data {name!r}; use digits, cifar10, cifar100, or a folder that exists"
        )
    return readers.load_folder(Path(name))


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    prog: str,
    *,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Flags to `kind`, a dataclass; what is wrong with them becomes one UsageError line."""
    complaint = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            options: Options = tyro.cli(
                kind, args=arguments, prog=prog, description=description, **extra
            )
            return options
    except SystemExit as stopped:
        if not stopped.code:
            raise  # --help was printed
    # Tyro's complaint is a box: a title, the complaint, then after a rule more of its help.
    box = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
    said = re.split(r"\n\W*───", box.partition("\n")[2])[0]
    line = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split()).rstrip(".")
    raise UsageError(f"{line}; see {prog} --help")
