"""What several commands share: flags, remarks, data by name."""

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
    """A remark on stderr: stdout is for results.

    Whatever names it holds, it stays one line and does not move the cursor.
    """
    print(printable(line), file=sys.stderr)


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


def load_data(
    name: str | None,
    *,
    own: str | None = None,
    evaluation: bool = False,
    skip_broken: bool = False,
) -> "Dataset":
    """The data set of that name, downloaded if it must be, or in that folder; says its remarks.

    A folder of a name goes before the name, as a run's goes before a pretrained network's.

    Args:
        name: what the user gave for --data; None for `own`.
        own: what a run's data was loaded from (`Dataset.origin`); None for the digits.
        evaluation: the images are to be measured only.
        skip_broken: leave out images that cannot be read.
    """
    from resnet56.data import readers
    from resnet56.data.download import ARCHIVES

    names = ("digits", *ARCHIVES)
    if name is None:
        name = own or "digits"
        if name == "digits":
            return readers.load_digits()
    elif not name.strip():
        raise UsageError(f"--data is empty; use {', '.join(names)}, or a folder that exists")
    elif name in names and not Path(name).is_dir():
        return (
            readers.load_digits()
            if name == "digits"
            else _say_remarks(readers.load_folder(fetch(name)))
        )
    elif name in names:
        say(f"reading the folder {Path(name).resolve()}, not the data set named {name}")
    elif not Path(name).exists() and not re.search(r"[/\\.]", name):
        raise UsageError(f"unknown data {name!r}; use {', '.join(names)}, or a folder that exists")
    return _say_remarks(
        readers.load_folder(Path(name), evaluation=evaluation, skip_broken=skip_broken)
    )


def for_classes(dataset: "Dataset", classes: tuple[str, ...]) -> "Dataset":
    """The images of a network's classes, with remarks on stderr about the others."""
    said = len(dataset.remarks)
    dataset = dataset.for_classes(classes)
    for remark in dataset.remarks[said:]:
        say(remark)
    return dataset


def _say_remarks(dataset: "Dataset") -> "Dataset":
    from resnet56.distributed import Distributed

    for remark in dataset.remarks if Distributed.from_environment().is_first else ():
        say(remark)
    return dataset
