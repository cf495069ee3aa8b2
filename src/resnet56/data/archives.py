"""Unpack a data set archive: a gzipped tar with one folder. The archive is not trusted."""

import gzip
import tarfile
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import BinaryIO

from resnet56.errors import one_line

MAX_BYTES = (
    1 << 30
)  # far above the size of a CIFAR archive, to stop decompression bombs and endless responses
_BLOCK = 1 << 18  # bytes


class UnpackError(Exception):
    """The archive is damaged or contains something other than the expected folder."""


def unpack(archive: BinaryIO, root: Path, folder: str) -> Path:
    """Unpack the gzipped tar in `archive` to `root/folder` atomically.

    Args:
        archive: open for reading, at any position.
        root: an existing folder. A temporary folder is also created in it.
        folder: name of the only folder in the archive.

    Raises:
        UnpackError: the archive is damaged or unsafe. The message is one line.
        OSError: `root` is not writable.
    """
    with TemporaryDirectory(prefix=f"{folder}.", dir=root, ignore_cleanup_errors=True) as temporary:
        archive.seek(0)
        try:
            _extract(archive, temporary, folder)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError) as err:
            raise UnpackError(one_line(err)) from err
        except OSError:  # raised by the disk, not by the archive
            raise
        except Exception as err:  # `tarfile` can raise anything on a damaged header
            raise UnpackError(one_line(err)) from err
        final = root / folder
        try:
            Path(temporary, folder).replace(final)
        except OSError:
            if not final.is_dir():  # otherwise, another process has created it
                raise
    return final


def _extract(archive: BinaryIO, temporary: str, folder: str) -> None:
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        # Same as `filter="data"`, which Python 3.11.0 to 3.11.3 do not support.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        remaining = MAX_BYTES
        for member in tar:
            _check_member(member, folder, remaining)
            remaining -= member.size
            tar.extract(member, temporary)
        while stream.read(_BLOCK):
            pass  # gzip verifies its checksum at the end of the stream
    if not Path(temporary, folder).is_dir():
        raise UnpackError(f"it does not contain the folder {folder!r}")


def _check_member(member: tarfile.TarInfo, folder: str, max_size: int) -> None:
    """Raise UnpackError unless `member` is a regular file or a folder inside `folder`."""
    # Windows rules are the strictest: both slashes separate, and drives count as roots.
    parts = PureWindowsPath(member.name).parts
    if parts[:1] != (folder,) or ".." in parts:
        raise UnpackError(f"{member.name!r} is outside the folder {folder!r}")
    if not (member.isreg() or member.isdir()):
        raise UnpackError(f"{member.name!r} is neither a regular file nor a folder")
    if not 0 <= member.size <= max_size:
        raise UnpackError(f"it unpacks to more than {MAX_BYTES} bytes")
