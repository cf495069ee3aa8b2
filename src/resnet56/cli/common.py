"""Flags, messages and data loading that several commands share."""

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from resnet56.errors import UsageError, printable

if TYPE_CHECKING:
    from resnet56.data.dataset import Dataset

Data = Annotated[str | None, tyro.conf.arg(aliases=("--data-dir",), metavar="NAME|DIR")]
Threads = Annotated[int | None, tyro.conf.arg(metavar="N")]
Out = Annotated[Path | None, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]


def say(line: str) -> None:
    """Print a message to stderr. Results go to stdout.

    Control characters are escaped, so the message stays on one line.
    """
    print(printable(line), file=sys.stderr)


def show(label: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Show a progress bar on stderr."""
    from rich.console import Console

    from resnet56.progress import evaluation_progress

    return evaluation_progress(label, total, Console(stderr=True, highlight=False))


def fetch(name: str, root: Path | None = None, mirrors: Sequence[str] = ()) -> Path:
    """Download a data set with a progress bar and return its folder."""
    from resnet56.data import download
    from resnet56.progress import DownloadProgress

    archive = download.ARCHIVES[name]
    with DownloadProgress(archive.filename) as progress:
        return download.fetch(
            archive, root or download.default_root(), mirrors=mirrors, progress=progress
        )


def load_data(
    name: str | None,
    *,
    own: str | None = None,
    evaluation: bool = False,
    skip_broken: bool = False,
) -> "Dataset":
    """Load a data set by name or from a folder, and print remarks about it.

    CIFAR-10 and CIFAR-100 are downloaded if necessary. If a folder has the same name as a data set,
    the folder is used.

    Args:
        name: the value of --data, or None to load `own`.
        own: the origin of the data of the run (`Dataset.origin`), or None for the digits.
        evaluation: load the images for evaluation only.
        skip_broken: skip images that cannot be read.

    Raises:
        UsageError: the name is empty or unknown.
    """
    from resnet56.data import readers
    from resnet56.data.download import ARCHIVES

    names = ("digits", *ARCHIVES)
    if name is None:
        name = own or "digits"
        if name == "digits":
            return readers.load_digits()
    elif not name.strip():
        raise UsageError(f"--data is empty; use {', '.join(names)} or an existing folder")
    elif name in names and not Path(name).is_dir():
        return (
            readers.load_digits()
            if name == "digits"
            else _print_remarks(readers.load_folder(fetch(name)))
        )
    elif name in names:
        say(f"reading the folder {Path(name).resolve()} instead of the data set {name}")
    elif not Path(name).exists() and not re.search(r"[/\\.]", name):
        raise UsageError(f"unknown data {name!r}; use {', '.join(names)} or an existing folder")
    return _print_remarks(
        readers.load_folder(Path(name), evaluation=evaluation, skip_broken=skip_broken)
    )


def for_classes(dataset: "Dataset", classes: tuple[str, ...]) -> "Dataset":
    """Select the images of a model's classes, and print a remark about the others."""
    printed = len(dataset.remarks)
    dataset = dataset.for_classes(classes)
    for remark in dataset.remarks[printed:]:
        say(remark)
    return dataset


def _print_remarks(dataset: "Dataset") -> "Dataset":
    from resnet56.distributed import Distributed

    for remark in dataset.remarks if Distributed.from_environment().is_main_process else ():
        say(remark)
    return dataset
