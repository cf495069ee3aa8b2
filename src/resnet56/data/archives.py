"""Extract data set archives without trusting their content.

An archive is a gzipped tar file with a single top-level directory.
"""

import gzip
import tarfile
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import BinaryIO

from resnet56.errors import one_line

# This limit stops decompression bombs and endless responses. CIFAR archives are far smaller.
MAX_BYTES = 1 << 30
_BLOCK = 1 << 18  # bytes


class UnpackError(Exception):
    """The archive is damaged or unsafe, or lacks the expected directory."""


def unpack(archive: BinaryIO, root: Path, directory: str) -> Path:
    """Unpack an archive to `root/directory` atomically.

    Args:
        archive: the archive file, open for reading at any position.
        root: an existing directory. The function creates a temporary directory in `root`.
        directory: name of the top-level directory in the archive.

    Raises:
        UnpackError: the archive is damaged or unsafe. The message is one line.
        OSError: `root` is not writable.
    """
    prefix = f"{directory}."
    with TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as temporary:
        archive.seek(0)
        try:
            _extract(archive, temporary, directory)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError) as err:
            raise UnpackError(one_line(err)) from err
        except OSError:  # the disk failed, so the archive may be valid
            raise
        except Exception as err:  # `tarfile` can raise any exception for a damaged header
            raise UnpackError(one_line(err)) from err
        final = root / directory
        try:
            Path(temporary, directory).replace(final)
        except OSError:
            if not final.is_dir():  # another process may have created the directory
                raise
    return final


def _extract(archive: BinaryIO, temporary: str, directory: str) -> None:
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        # This is equivalent to `filter="data"`, which Python 3.11.0 to 3.11.3 do not support.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        remaining = MAX_BYTES
        for member in tar:
            _check_member(member, directory, remaining)
            remaining -= member.size
            tar.extract(member, temporary)
        while stream.read(_BLOCK):
            pass  # gzip verifies the checksum at the end of the stream
    if not Path(temporary, directory).is_dir():
        raise UnpackError(f"it does not contain the directory {directory!r}")


def _check_member(member: tarfile.TarInfo, directory: str, max_size: int) -> None:
    """Raise UnpackError unless `member` is a regular file or a directory inside `directory`."""
    # Use Windows rules on all systems. They are the strictest: slashes and backslashes separate
    # directories, and a drive counts as a root.
    parts = PureWindowsPath(member.name).parts
    if parts[:1] != (directory,) or ".." in parts:
        raise UnpackError(f"{member.name!r} is outside the directory {directory!r}")
    if not (member.isreg() or member.isdir()):
        raise UnpackError(f"{member.name!r} is neither a regular file nor a directory")
    if not 0 <= member.size <= max_size:
        raise UnpackError(f"it unpacks to more than {MAX_BYTES} bytes")
