"""Errors that users can cause. Each message states in one line what failed, where, and what to do.

In messages, `option` formats the options: Python users see `resume=True`, and users of the command
line see `--resume`.
"""

import contextlib
from collections.abc import Iterator, Sequence

_flags = False  # whether messages show options as flags


@contextlib.contextmanager
def spell_flags() -> Iterator[None]:
    """Show options as command-line flags in all messages of the process."""
    global _flags
    before, _flags = _flags, True
    try:
        yield
    finally:
        _flags = before


def option(name: str, value: object = None) -> str:
    """Return an option in the syntax of the interface in use.

    | call                      | in Python      | on the command line |
    |---------------------------|----------------|---------------------|
    | `option("val_size")`      | `val_size`     | `--val-size`        |
    | `option("resume", True)`  | `resume=True`  | `--resume`          |
    | `option("flip", False)`   | `flip=False`   | `--no-flip`         |
    | `option("device", "cpu")` | `device="cpu"` | `--device cpu`      |
    """
    dashed = name.replace("_", "-")
    flag = f"--{dashed}"
    if value is None:
        return flag if _flags else name
    if _flags:
        if isinstance(value, bool):
            return flag if value else f"--no-{dashed}"
        return f"{flag} {value}"
    return f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}"


def either(python: str, command_line: str) -> str:
    """Return the text for the interface in use, which is Python or the command line."""
    return command_line if _flags else python


class Error(Exception):
    """Base class of all errors that users can cause. The command prints the error and exits."""

    exit_code = 1


class UsageError(Error):
    """The call is invalid, for example because of an unknown name or an out-of-range value."""

    exit_code = 2


class DataError(Error):
    """Images or labels cannot be read."""


class ImageError(DataError):
    """An image cannot be read: it is broken, truncated, too large, or in an unsupported format."""


class DownloadError(Error):
    """An archive cannot be downloaded or safely unpacked."""


class RunError(Error):
    """A run or a model file is missing, damaged or incompatible, or its path is already in use."""


class MissingExtraError(Error):
    """A dependency of an optional extra is missing."""

    def __init__(self, dependency: str, extra: str) -> None:
        super().__init__(f"{dependency} is not installed; pip install 'resnet56[{extra}]'")


class NotFiniteError(RunError):
    """Weights or model outputs are not finite."""


class TrainingError(Error):
    """Training cannot continue, for example because the loss is not finite."""


def one_line(value: object) -> str:
    """Format `value` for an error message: at most 200 characters on one line.

    For an exception without a message, return the name of its type.
    """
    return escape(" ".join(str(value).split())[:200]) or type(value).__name__


def abbreviate(names: Sequence[object]) -> str:
    """Format the first three names for an error message, followed by "..." if there are more."""
    return ", ".join([*map(one_line, names[:3]), *(["..."] if len(names) > 3 else [])])


def escape(text: str) -> str:
    """Return `text` if it is printable. Otherwise, return `ascii(text)`.

    File names can contain any character. A line feed could imitate a line of output, and an escape
    sequence could clear the terminal. Invalid UTF-8 cannot be printed.
    """
    return text if text.isprintable() else ascii(text)


def escape_line(line: str) -> str:
    """Escape each character of `line` that is not printable.

    Apply this function to a complete line, just before printing it. Apply `escape` to a name within
    a message.
    """
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
