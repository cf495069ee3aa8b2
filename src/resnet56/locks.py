"""A lock that a process holds on an open file; its end, however abrupt, frees it."""

import sys

if sys.platform == "win32":
    import msvcrt

    def _take_lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(descriptor: int) -> bool:
    """Return False while another process has the lock, and True where none can be had."""
    try:
        _take_lock(descriptor)
    except (BlockingIOError, PermissionError):  # how POSIX and Windows say "held"
        return False
    except OSError:  # a file system without locks
        pass
    return True
