"""What a user can get wrong, said in one line: what, where, and what to do."""


class Error(Exception):
    """Base of every error this package raises on purpose; the command prints it and exits."""

    exit_code = 1


class UsageError(Error):
    """The call itself is wrong: an unknown name, a value out of range."""

    exit_code = 2


class DataError(Error):
    """Images or labels that cannot be read as what they claim to be."""


class ImageError(DataError):
    """A picture that cannot be read: broken, truncated, too large, or none at all."""


class DownloadError(Error):
    """An archive that could not be fetched whole and unpacked safely."""


class RunError(Error):
    """A run or a network's file that is missing, damaged, in the way, or another's."""


class MissingExtraError(Error):
    """Something that only an extra of the package installs."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; pip install 'resnet56[{extra}]'")


class NotFiniteError(Error):
    """Weights, or a network's outputs, that are not finite numbers."""


class TrainingError(Error):
    """A training that cannot go on: a loss that is not finite."""


def one_line(value: object) -> str:
    """`value` for an error message: one line, not endless; an exception without words by type."""
    return shown(" ".join(str(value).split())[:200]) or type(value).__name__


def shown(text: str) -> str:
    """`text` as it is where it can be printed, else in escapes: a file's name may hold anything.

    A line feed in it would forge a line, an escape sequence could wipe the terminal, and what is
    no UTF-8 cannot be written at all.
    """
    return text if text.isprintable() else ascii(text)


def printable(line: str) -> str:
    """`line` with an escape in place of each character that is not printable.

    For whole lines at the terminal's door, however foreign names came into them; `shown` is for a
    name in a sentence.
    """
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
