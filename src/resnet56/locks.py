"""Open and lock files in directories that other users can write to. Links are not followed."""

import errno
import os
import secrets
import stat
import sys
from io import BufferedRandom
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Without O_NONBLOCK, opening a named pipe would block forever.
_FLAGS = os.O_RDWR | os.O_CREAT
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FLAGS |= getattr(os, _name, 0)


def create_temporary(directory: Path) -> tuple[BufferedRandom, Path]:
    """Create a file with an unpredictable name in `directory` and open it for writing.

    If the name were predictable, another user could create a link with this name. Unlike `mkstemp`,
    this function respects the user's umask. Raises OSError if the file cannot be created.
    """
    path = directory / f".{secrets.token_hex(8)}.tmp"
    return os.fdopen(os.open(path, _FLAGS | os.O_EXCL, 0o666), "r+b"), path


def open_private(path: Path) -> BufferedRandom:
    """Open `path` for reading and writing, without following links. Create the file if necessary.

    In a shared directory, another user could create a link at `path` to make this process overwrite
    another file. The function therefore replaces a link with a new file.

    Raises:
        OSError: `path` cannot be opened, belongs to another user, or is not a regular file.
    """
    for _ in range(100):  # do not retry forever, because another user can recreate the link
        try:
            return _open_private(path)
        except _LinkError:
            path.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, "it is a link; remove it", str(path))


class _LinkError(Exception):
    """The path is a symbolic link, or a file with several hard links."""


def _open_private(path: Path) -> BufferedRandom:
    if path.is_symlink():  # some platforms do not have O_NOFOLLOW
        raise _LinkError
    try:
        descriptor = os.open(path, _FLAGS, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # a link (FreeBSD reports EMLINK)
            raise _LinkError from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileExistsError(errno.EEXIST, "it is not a regular file; remove it", str(path))
        if status.st_nlink > 1:
            raise _LinkError
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            raise PermissionError(
                errno.EACCES,
                "it belongs to another user; remove it, or choose another directory",
                str(path),
            )
        return os.fdopen(descriptor, "r+b")
    except BaseException:
        os.close(descriptor)
        raise


def try_lock(descriptor: int) -> bool:
    """Lock a file without waiting. Return False if another process holds the lock.

    If the file system does not support locks, return True.
    """
    try:
        _lock(descriptor)
    except (BlockingIOError, PermissionError):  # another process holds the lock (POSIX, Windows)
        return False
    except OSError:  # the file system does not support locks
        pass
    return True
