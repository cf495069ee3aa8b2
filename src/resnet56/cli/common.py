"""Flags, messages and data loading that several commands share."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from resnet56.errors import escape_line

if TYPE_CHECKING:
    from resnet56.data.dataset import Dataset

Data = Annotated[str | None, tyro.conf.arg(aliases=("--data-dir",), metavar="NAME|DIR")]
Threads = Annotated[int | None, tyro.conf.arg(metavar="N")]
Out = Annotated[Path | None, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]


def say(line: str) -> None:
    """Print a message to stderr on one line, with control characters escaped.

    Commands print results to stdout.
    """
    print(escape_line(line), file=sys.stderr)


def show_progress(
    label: str, total: int
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Show the progress of an evaluation on stderr."""
    from resnet56.progress import image_progress, stream_output

    return image_progress(stream_output(sys.stderr), f"evaluating on {label}", total)


def load_data(
    data: str | None,
    *,
    own: str | None = None,
    evaluation: bool = False,
    skip_broken: bool = False,
) -> "Dataset":
    """Load a data set with `readers.load_data` and print its remarks.

    Args:
        data: the value of --data, or None to load `own`.
        own: the origin of the run's data (`Dataset.origin`), or None for the digits.
        evaluation, skip_broken: as in `readers.load_data`.
    """
    from resnet56.data import readers
    from resnet56.distributed import Distributed

    # A directory named "digits" does not replace the default data set.
    if data is None and (own or "digits") == "digits":
        return readers.load_digits()
    name = data if data is not None else own or "digits"
    dataset = readers.load_data(name, evaluation=evaluation, skip_broken=skip_broken)
    for remark in dataset.remarks if Distributed.from_environment().is_main_process else ():
        say(remark)
    return dataset


def for_classes(dataset: "Dataset", classes: tuple[str, ...]) -> "Dataset":
    """Convert a data set to the classes of a model, and print the remarks that the conversion adds.

    See `Dataset.for_classes`. A data set that already has these classes is returned unchanged.
    """
    if dataset.classes == classes:
        return dataset
    printed = len(dataset.remarks)
    dataset = dataset.for_classes(classes)
    for remark in dataset.remarks[printed:]:
        say(remark)
    return dataset
