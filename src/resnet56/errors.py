"""What a user can get wrong, said in one line: what, where, and what to do."""


class Error(Exception):
    """Base of every error this package raises on purpose; the command prints it and exits."""

    exit_code = 1


class UsageError(Error):
    """The call itself is wrong: an unknown name, a value out of range."""

    exit_code = 2


class DataError(Error):
    """Images or labels that cannot be read as what they claim to be."""


class DownloadError(Error):
    """An archive that could not be fetched whole and unpacked safely."""


class RunError(Error):
    """A run directory that is missing, damaged, in the way, or another run's."""


class TrainingError(Error):
    """A training that cannot go on: a loss that is not finite."""
