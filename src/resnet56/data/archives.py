"""Unpack a data set's archive: a gzipped tar of one folder, taken as hostile until it has ended."""

import gzip
import tarfile
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import BinaryIO

from resnet56.errors import one_line

LARGEST = 1 << 30  # bytes, far above any CIFAR: more is a bomb or an endless answer
_BLOCK = 1 << 18  # bytes


class UnpackError(Exception):
    """The archive is damaged, or holds something else than the folder."""


def unpack(archive: BinaryIO, root: Path, folder: str) -> Path:
    """Unpack the gzipped tar in `archive` so that `root/folder` appears whole or not at all.

    Args:
        archive: open for reading, at any position.
        root: an existing folder; a temporary folder is made in it, too.
        folder: the name of the one folder that the archive holds.

    Raises:
        UnpackError: the archive is damaged or unsafe; in one line.
        OSError: `root` cannot be written.
    """
    with TemporaryDirectory(prefix=f"{folder}.", dir=root, ignore_cleanup_errors=True) as temporary:
        archive.seek(0)
        try:
            _extract(archive, temporary, folder)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError) as err:
            raise UnpackError(one_line(err)) from err
        except OSError:  # the disk's
            raise
        except Exception as err:  # a damaged head can make `tarfile` raise anything
            raise UnpackError(one_line(err)) from err
        final = root / folder
        try:
            Path(temporary, folder).replace(final)
        except OSError:
            if not final.is_dir():  # else another process was faster
                raise
    return final


def _extract(archive: BinaryIO, temporary: str, folder: str) -> None:
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        # As `filter="data"`, which Python 3.11.0 to 3.11.3 would not know.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        left = LARGEST
        for member in tar:
            _check(member, folder, left)
            left -= member.size
            tar.extract(member, temporary)
        while stream.read(_BLOCK):
            pass  # to the end, where gzip compares a checksum of what was unpacked
    if not Path(temporary, folder).is_dir():
        raise UnpackError(f"no folder {folder!r} inside")


def _check(member: tarfile.TarInfo, folder: str, left: int) -> None:
    """Raise UnpackError unless `member` is a plain file or folder inside `folder`."""
    # Windows' reading is the strictest: it sees either slash, and drives as well as roots.
    parts = PureWindowsPath(member.name).parts
    if parts[:1] != (folder,) or ".." in parts:
        raise UnpackError(f"{member.name!r} is not in the folder {folder!r}")
    if not (member.isreg() or member.isdir()):
        raise UnpackError(f"{member.name!r} is neither a file nor a folder")
    if not 0 <= member.size <= left:
        raise UnpackError(f"it holds more than {LARGEST} bytes")
