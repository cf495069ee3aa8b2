"""Files in folders that others may write: opened without following links, and locked."""

import errno
import os
import secrets
import stat
import sys
from io import BufferedRandom
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _take_lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# O_NONBLOCK: a pipe of the name would wait forever.
_FLAGS = os.O_RDWR | os.O_CREAT
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FLAGS |= getattr(os, _name, 0)


def create_temporary(folder: Path) -> tuple[BufferedRandom, Path]:
    """Make a new file in `folder`, open for writing, whose name nobody can guess.

    A name that can be guessed may be a link that someone else has put there. Unlike `mkstemp`'s,
    the file has the permissions that the user gives new files (umask). Raises OSError.
    """
    path = folder / f".{secrets.token_hex(8)}.tmp"
    return os.fdopen(os.open(path, _FLAGS | os.O_EXCL, 0o666), "r+b"), path


def open_private(path: Path) -> BufferedRandom:
    """Open `path` for reading and writing without following a link; made if it is not there.

    In a folder that others may write, someone can have put a link of this name there, to have a
    file elsewhere overwritten. A link is removed and a new file made. Raises OSError, also for a
    file of another user and for what is no file.
    """
    for _ in range(100):  # whoever puts a link there again and again gets an error
        try:
            return _open_private(path)
        except _LinkError:
            path.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, "in the way, it is a link", str(path))


class _LinkError(Exception):
    """The name is a link: a symbolic one, or another name of a file elsewhere."""


def _open_private(path: Path) -> BufferedRandom:
    if path.is_symlink():  # where O_NOFOLLOW is not known; elsewhere that decides
        raise _LinkError
    try:
        descriptor = os.open(path, _FLAGS, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # how POSIX and FreeBSD say "a link"
            raise _LinkError from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FileExistsError(errno.EEXIST, "in the way, it is not a file", str(path))
        if found.st_nlink > 1:
            raise _LinkError
        if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
            raise PermissionError(
                errno.EACCES,
                "it belongs to another user: remove it, or choose another folder",
                str(path),
            )
        return os.fdopen(descriptor, "r+b")
    except BaseException:
        os.close(descriptor)
        raise


def try_lock(descriptor: int) -> bool:
    """Return False while another process has the lock, and True where none can be had."""
    try:
        _take_lock(descriptor)
    except (BlockingIOError, PermissionError):  # how POSIX and Windows say "held"
        return False
    except OSError:  # a file system without locks
        pass
    return True
