"""Fetch the official CIFAR archives: resumed, checked against their MD5, unpacked safely."""

import errno
import gzip
import hashlib
import os
import re
import socket
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from resnet56.errors import DownloadError
from resnet56.locks import try_lock

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes there will be (None: not known)."""

_PAUSES = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try of one URL
_REPORT_EVERY = 0.2  # seconds between calls of `progress`, and between looks at a held lock
_BLOCK = 1 << 18  # bytes asked of the connection at once
_LARGEST = 1 << 30  # bytes, far above any CIFAR: more is a bomb or an endless answer
_GZIP = b"\x1f\x8b"
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAYS_ON = (
    "ways on: --data digits (needs no download), --data DIR (a folder you have), "
    "or a mirror (--mirror URL or RESNET56_MIRROR)"
)


@dataclass(frozen=True)
class Archive:
    """A data set's official archive, a gzipped tar that holds one folder."""

    name: str
    filename: str
    md5: str  # of the whole file, in lower-case hex
    size: int | None  # bytes of the whole file, where known
    folder: str  # the one folder inside
    url: str


_KRIZ = "https://www.cs.toronto.edu/~kriz/"
# MD5: the table on cifar.html there; sizes: TensorFlow Datasets' url_checksums.
ARCHIVES = {
    "cifar10": Archive(
        name="cifar10",
        filename="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        size=170_052_171,
        folder="cifar-10-batches-bin",
        url=_KRIZ + "cifar-10-binary.tar.gz",
    ),
    "cifar100": Archive(
        name="cifar100",
        filename="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        size=168_513_733,
        folder="cifar-100-binary",
        url=_KRIZ + "cifar-100-binary.tar.gz",
    ),
}


class _UrlError(Exception):
    """One URL did not deliver; `retry` if it may yet, `offline` if it was never reached."""

    def __init__(
        self, reason: str, *, retry: bool = False, offline: bool = False, status: int = 0
    ) -> None:
        super().__init__(reason)
        self.retry = retry
        self.offline = offline
        self.status = status


def default_root() -> Path:
    """Return where data sets are kept: $RESNET56_DATA, else in the user's cache folder."""
    if chosen := os.environ.get("RESNET56_DATA"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "resnet56"


def fetch(
    archive: Archive,
    root: Path,
    *,
    mirrors: Sequence[str] = (),
    timeout: float = 30.0,
    progress: Progress | None = None,
) -> Path:
    """Return `root/archive.folder`, downloading and unpacking it if it is not there yet.

    The folder appears whole or not at all, and the archive is removed once it is there. What a
    failure or Ctrl-C leaves in `root/<filename>.part` is continued by the next call. Of several
    processes one downloads, by a lock on the empty `root/<filename>.lock`; the others wait for
    it, reporting its progress. (Where the file system knows no locks they may spoil each other's
    download, but the checksums notice.)

    Args:
        archive: what to fetch, for example `ARCHIVES["cifar10"]`.
        root: the folder to keep it in, made if missing; see `default_root`.
        mirrors: base or full URLs (http, https, file) to try, in order, before the archive's own;
            if empty, those in $RESNET56_MIRROR, separated by commas or white space.
        timeout: seconds to wait for a connection, and for each further piece of the answer.
        progress: called a few times a second with the bytes that are there and their total.

    Raises:
        DownloadError: no URL delivered the archive, it cannot be unpacked safely, or `root`
            cannot be written; one line that says which, and what to do.
    """
    final = root / archive.folder
    part = root / f"{archive.filename}.part"
    lock = root / f"{archive.filename}.lock"
    report = progress or (lambda done, total: None)
    try:
        if final.is_dir():
            return final
        if final.exists():
            raise FileExistsError(errno.EEXIST, "in the way, it is not a folder", str(final))
        urls = _urls(archive, mirrors)
        root.mkdir(parents=True, exist_ok=True)
        with lock.open("ab") as file:
            while not try_lock(file.fileno()):
                report(_size(part), archive.size)
                time.sleep(_REPORT_EVERY)
            if not final.is_dir():  # else the process that held the lock has made it
                _download(archive, urls, part, timeout, report)
                _unpack(archive, part, root)
    except OSError as err:  # the network's were dealt with: this is about files
        why = "the disk is full" if err.errno in _FULL else _why(err)
        where = err.filename or root
        raise DownloadError(_line(f"{archive.filename}: {where}: {why}{_kept(part)}")) from err
    # The folder is there: whoever still waits for the lock will see it, even if its file is gone.
    for leftover in (part, lock):
        with suppress(OSError):
            leftover.unlink()
    return final


def _urls(archive: Archive, mirrors: Sequence[str]) -> list[str]:
    """Return the URLs to try, in order, the official one last."""
    named = mirrors or re.split(r"[,\s]+", os.environ.get("RESNET56_MIRROR", ""))
    urls = []
    for mirror in filter(None, named):
        try:
            parts = urlsplit(mirror)
        except ValueError as err:
            raise DownloadError(_line(f"mirror {mirror!r}: {err}")) from err
        if parts.scheme not in ("http", "https", "file"):
            raise DownloadError(_line(f"mirror {mirror!r}: need a http, https or file URL"))
        whole = parts.path.endswith("/" + archive.filename)
        urls.append(mirror if whole else f"{mirror.rstrip('/')}/{archive.filename}")
    return [*urls, archive.url]


def _download(
    archive: Archive, urls: Sequence[str], part: Path, timeout: float, report: Progress
) -> None:
    """Leave the whole, checked archive in `part`, from the first URL that delivers it."""
    failures: list[tuple[str, _UrlError]] = []
    for url in urls:
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            try:
                continued = _receive(url, archive, part, timeout, report)
                _verify(archive, part, continued)
                return
            except _UrlError as err:
                failed = err
            if not failed.retry:
                break
        failures.append((url, failed))
    reasons = "; ".join(f"{url}: {failed}" for url, failed in failures)
    offline = all(failed.offline for _, failed in failures)
    lead = "this machine seems to be offline, " if offline else ""
    message = f"{lead}{archive.filename} was not downloaded ({reasons}){_kept(part)}; {_WAYS_ON}"
    raise DownloadError(_line(message))


def _receive(url: str, archive: Archive, part: Path, timeout: float, report: Progress) -> bool:
    """Add what one connection sends to `part`; return whether its start was there before."""
    done = _size(part)
    if archive.size is not None and done >= archive.size:
        return True
    request = Request(url, headers={"User-Agent": "resnet56"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        with _network():
            response = urlopen(request, timeout=timeout)
    except _UrlError as err:
        if done and err.status == 416:
            return True  # nothing after our last byte: complete, or not what this URL has
        raise
    with response:
        # A server that ignores Range answers 200 with everything; so does a file.
        continued = bool(done) and response.status == 206
        if continued and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise _UrlError("answered with another range than was asked for")
        with _network():
            first = response.read(len(_GZIP))
        # Looked at before `part` is touched: a log-in page must not cost what is there already.
        page = response.headers.get_content_type() == "text/html"
        if page or not (continued or _GZIP.startswith(first)):
            raise _UrlError("answered with a web page, not an archive")
        if not first:
            raise _UrlError("sent nothing", retry=True)
        done = done if continued else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else archive.size
        if archive.size not in (None, total):
            raise _UrlError(f"has {total} bytes, not the official archive's {archive.size}")
        report(done, total)
        with part.open("ab" if continued else "wb") as file:
            done += _copy(response, first, file, lambda written: report(done + written, total))
        report(done, total)
    if total is not None and done < total:  # urllib takes an early end for the end
        raise _UrlError(f"stopped after {done} of {total} bytes", retry=True)
    return continued


def _copy(response: Any, block: bytes, file: BinaryIO, report: Callable[[int], None]) -> int:
    """Write `block` and what follows it in the response to `file`; return the bytes written."""
    written, reported = 0, time.monotonic()
    while block:
        file.write(block)
        written += len(block)
        if written > _LARGEST:
            raise _UrlError(f"sent more than {_LARGEST} bytes")
        if time.monotonic() - reported >= _REPORT_EVERY:
            report(written)
            reported = time.monotonic()
        with _network():
            # `read1` hands over what has come, so that a break or Ctrl-C loses nothing.
            block = response.read1(_BLOCK)
    return written


@contextmanager
def _network() -> Iterator[None]:
    """Turn what the network raises into `_UrlError`, to tell it from the errors of files."""
    try:
        yield
    except HTTPError as err:
        err.close()
        reason, retry = f"HTTP status {err.code} {err.reason}", err.code == 429 or err.code >= 500
        raise _UrlError(reason, retry=retry, status=err.code) from err
    except URLError as err:  # no connection
        offline = (
            isinstance(err.reason, socket.gaierror | ConnectionRefusedError | TimeoutError)
            or getattr(err.reason, "errno", None) in _UNREACHABLE
        )
        retry = isinstance(err.reason, ConnectionError) and not offline
        raise _UrlError(_why(err.reason), retry=retry, offline=offline) from err
    except ValueError as err:  # not a URL after all: a port that is no number, say
        raise _UrlError(_why(err)) from err
    except (OSError, HTTPException) as err:  # a connection that broke or fell silent
        raise _UrlError(_why(err), retry=True) from err


def _verify(archive: Archive, part: Path, continued: bool) -> None:
    """Remove `part` and raise `_UrlError` unless its MD5 is the archive's."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != archive.md5:
        part.unlink()
        # The bad bytes may be the ones of an earlier try: then this URL gets one from the start.
        raise _UrlError(
            f"MD5 {found} instead of {archive.md5}, the download was removed", retry=continued
        )


def _unpack(archive: Archive, part: Path, root: Path) -> None:
    """Unpack into a temporary folder beside the final one, then rename it in one step."""
    with TemporaryDirectory(
        prefix=f"{archive.folder}.", dir=root, ignore_cleanup_errors=True
    ) as temporary:
        unpacked = Path(temporary, archive.folder)
        try:
            with gzip.open(part) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                # As `filter="data"`, which Python 3.11.0 to 3.11.3 would not know.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                left = _LARGEST
                for member in tar:
                    _check(member, archive.folder, left)
                    left -= member.size
                    tar.extract(member, temporary)
                while stream.read(_BLOCK):
                    pass  # to the end, where gzip compares a checksum of what was unpacked
            if not unpacked.is_dir():
                raise tarfile.ReadError(f"no folder {archive.folder!r} inside")
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as err:
            part.unlink()  # its checksum was right: no other download would be better
            message = f"{archive.filename} was removed, it cannot be unpacked safely: {_why(err)}"
            raise DownloadError(_line(message)) from err
        try:
            unpacked.replace(root / archive.folder)
        except OSError:
            if not (root / archive.folder).is_dir():  # else another process was faster
                raise


def _check(member: tarfile.TarInfo, folder: str, left: int) -> None:
    """Raise `tarfile.ReadError` unless `member` is a plain file or folder inside `folder`."""
    # Windows' reading is the strictest: it sees either slash, and drives as well as roots.
    parts = PureWindowsPath(member.name).parts
    if parts[:1] != (folder,) or ".." in parts:
        raise tarfile.ReadError(f"{member.name!r} is not in the folder {folder!r}")
    if not (member.isreg() or member.isdir()):
        raise tarfile.ReadError(f"{member.name!r} is neither a file nor a folder")
    if not 0 <= member.size <= left:
        raise tarfile.ReadError(f"it holds more than {_LARGEST} bytes")


def _size(path: Path) -> int:
    """Return the bytes in a file, 0 if there is none to be seen."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _kept(part: Path) -> str:
    """Return what to say of the partial download, nothing if there is none."""
    return f"; {_size(part)} bytes are kept for the next try" if _size(part) else ""


def _why(err: object) -> str:
    """Return an error's reason without its number."""
    return getattr(err, "strerror", None) or str(err) or type(err).__name__


def _line(text: str) -> str:
    """Return the text as one line, whatever a server or a file name put into it."""
    return " ".join(text.split())
