"""Download the official CIFAR archives, resume interrupted downloads, and verify MD5 digests."""

import base64
import errno
import hashlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from resnet56.data.archives import MAX_BYTES, UnpackError, unpack
from resnet56.errors import DownloadError, either, escape_line, one_line
from resnet56.locks import open_private, try_lock

Progress = Callable[[int, int | None], None]
"""A function that takes the number of downloaded bytes and the total number (None if unknown)."""

_RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt per URL
_REPORT_INTERVAL = 0.2  # seconds between calls to `progress`, and between attempts to lock
_BLOCK = 1 << 18  # bytes to read at once
_MIN_RATE = (1_000, 60.0)  # connections that receive fewer bytes in this many seconds are closed
_HEADER_TIMEOUTS = 4  # the time limit for the response headers is this multiple of the timeout
_GZIP_MAGIC = b"\x1f\x8b"
_UNREACHABLE_ERRNOS = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Archive:
    """The official archive of a data set: a gzipped tar file that contains one directory."""

    name: str
    filename: str
    md5: str  # in lowercase hexadecimal
    size: int | None  # in bytes, None if unknown
    directory: str  # name of the directory in the archive
    url: str


_BASE_URL = "https://www.cs.toronto.edu/~kriz/"
# The MD5 digests are from cifar.html at this URL. The sizes are from url_checksums of TensorFlow
# Datasets.
ARCHIVES = {
    "cifar10": Archive(
        name="cifar10",
        filename="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        size=170_052_171,
        directory="cifar-10-batches-bin",
        url=_BASE_URL + "cifar-10-binary.tar.gz",
    ),
    "cifar100": Archive(
        name="cifar100",
        filename="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        size=168_513_733,
        directory="cifar-100-binary",
        url=_BASE_URL + "cifar-100-binary.tar.gz",
    ),
}


class _UrlError(Exception):
    """A download from one URL failed.

    `retry` is True if another attempt can succeed, and `offline` if the host is unreachable.
    """

    def __init__(
        self, reason: str, *, retry: bool = False, offline: bool = False, status: int = 0
    ) -> None:
        super().__init__(reason)
        self.retry = retry
        self.offline = offline
        self.status = status


def default_root() -> Path:
    """Return the directory for data sets.

    The directory is $RESNET56_DATA, or resnet56/ in the user's cache directory.
    """
    if chosen := os.environ.get("RESNET56_DATA"):
        return _expand_user(chosen)
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expand_user(cache) / "resnet56"


def _expand_user(directory: str) -> Path:
    try:
        return Path(directory).expanduser()
    except RuntimeError:  # HOME is not set, and the password database has no entry
        raise DownloadError(
            f"cannot expand {directory}; set HOME, or set RESNET56_DATA to an absolute path"
        ) from None


def fetch(
    archive: Archive,
    root: Path,
    *,
    mirrors: Sequence[str] = (),
    timeout: float = 30.0,
    progress: Progress | None = None,
) -> Path:
    """Return `root/archive.directory`. If it is missing, download and unpack the archive.

    The directory is created atomically, and then the archive is deleted. After a failure or
    Ctrl-C, the next call resumes from `root/<filename>.part`.

    If several processes call this function, one of them locks the empty file `root/<filename>.lock`
    and downloads the archive. The other processes wait and report the progress of the download. If
    the file system does not support locks, the processes can corrupt each other's download. The
    checksum detects such errors. The function does not follow symbolic links at these two paths, so
    `root` can be a shared directory.

    Args:
        archive: the archive to download, for example `ARCHIVES["cifar10"]`.
        root: directory for data sets, which is created if it does not exist. See `default_root`.
        mirrors: base URLs or full URLs (http, https, file) to try before the official URL, in
            order. By default, the URLs in $RESNET56_MIRROR, separated by commas or whitespace.
            Credentials in a URL are sent only to its host and never shown.
        timeout: seconds to wait for a connection and for each part of the response. A connection
            that delivers fewer than 1,000 bytes per minute is also closed.
        progress: function that is called a few times per second. See `Progress`.

    Raises:
        DownloadError: no URL delivered the archive, the archive cannot be unpacked safely, or
            `root` is not writable. The message is one line.
    """
    final = root / archive.directory
    part = root / f"{archive.filename}.part"
    lock = root / f"{archive.filename}.lock"
    report = progress or (lambda done, total: None)
    try:
        if final.is_dir():
            return final
        if final.exists():
            raise FileExistsError(errno.EEXIST, "it is not a directory; remove it", str(final))
        urls = _urls(archive, mirrors)
        root.mkdir(parents=True, exist_ok=True)
        with open_private(lock) as locked:
            while not try_lock(locked.fileno()):
                report(_size(part), archive.size)
                time.sleep(_REPORT_INTERVAL)
            if not final.is_dir():  # another process may have created the directory
                _download_and_unpack(archive, urls, part, root, timeout, report)
    except OSError as err:  # a file error, because network errors become _UrlError
        reason = "the disk is full" if err.errno in _DISK_FULL_ERRNOS else _reason(err)
        path = err.filename or root
        if err.errno in _READ_ONLY_ERRNOS:
            reason += (
                "; set RESNET56_DATA to a writable directory, or use resnet56 data fetch --dir DIR"
            )
        message = f"{archive.filename}: {path}: {reason}{_resume_note(_size(part))}"
        raise DownloadError(_single_line(message)) from err
    # Other processes may still be waiting for the lock. They will find the directory, so they do
    # not need the lock file.
    for leftover in (part, lock):
        with suppress(OSError):
            leftover.unlink()
    return final


def _download_and_unpack(
    archive: Archive,
    urls: Sequence[str],
    part: Path,
    root: Path,
    timeout: float,
    report: Progress,
) -> None:
    """Create `root/archive.directory`. On failure, keep the downloaded bytes in `part`."""
    # Keep the file open, so that another user cannot replace it after it has been verified.
    with open_private(part) as file:
        try:
            _download(archive, urls, file, timeout, report)
            unpack(file, root, archive.directory)
        except UnpackError as err:
            file.truncate(0)  # the MD5 digest is correct, so resuming would not help
            message = f"{archive.filename} cannot be unpacked safely and was removed: {err}"
            raise DownloadError(_single_line(message)) from err
        finally:
            if not _length(file):
                with suppress(OSError):
                    part.unlink()


def _urls(archive: Archive, mirrors: Sequence[str]) -> list[str]:
    """Return the URLs to try, in order. The official URL is last."""
    bases = mirrors or re.split(r"[,\s]+", os.environ.get("RESNET56_MIRROR", ""))
    urls = []
    for mirror in filter(None, bases):
        try:
            parts = urlsplit(mirror)
        except ValueError as err:
            raise DownloadError(f"mirror {_redact(mirror)} is not a valid URL") from err
        if parts.scheme not in ("http", "https", "file"):
            raise DownloadError(f"mirror {_redact(mirror)} is not an http, https or file URL")
        is_full = parts.path.endswith("/" + archive.filename)
        urls.append(mirror if is_full else f"{mirror.rstrip('/')}/{archive.filename}")
    return [*urls, archive.url]


def _redact(url: str) -> str:
    """Return a URL without the parts that can contain secrets: credentials, query and fragment."""
    address = re.split(r"[?#]", url)[0]
    scheme = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|", address)[0]  # type: ignore[index]
    # Remove everything up to the last @, even if a slash precedes it, because an unquoted password
    # can contain slashes.
    return one_line(scheme + address.removeprefix(scheme).rpartition("@")[2])


def _request(url: str) -> Request:
    """Create a request. Move credentials from the URL to a header.

    The header is sent only to the host of the URL, not to the targets of redirects.
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)), headers={"User-Agent": "resnet56"})
    if at:
        encoded = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def _download(
    archive: Archive, urls: Sequence[str], part: BufferedRandom, timeout: float, report: Progress
) -> None:
    """Download the archive to `part` from the first URL that works, and verify it."""
    failures: list[tuple[str, _UrlError]] = []
    for url in urls:
        for delay in (0.0, *_RETRY_DELAYS):
            time.sleep(delay)
            try:
                resumed = _receive(url, archive, part, timeout, report)
                _verify(archive, part, resumed)
                return
            except _UrlError as err:
                error = err
            if not error.retry:
                break
        failures.append((url, error))
    reasons = "; ".join(f"{_redact(url)}: {error}" for url, error in failures)
    offline = all(error.offline for _, error in failures)
    cause = "; this machine appears to be offline" if offline else ""
    resume = _resume_note(_length(part))
    message = f"cannot download {archive.filename} ({reasons}){cause}{resume}; {_alternatives()}"
    raise DownloadError(_single_line(message))


def _alternatives() -> str:
    return either(
        'alternatives: load_data("digits"), load_data(DIR) with an existing directory, or a mirror '
        "in RESNET56_MIRROR",
        "alternatives: --data digits (no download), --data DIR (an existing directory), or a "
        "mirror (--mirror URL or RESNET56_MIRROR)",
    )


def _receive(
    url: str, archive: Archive, part: BufferedRandom, timeout: float, report: Progress
) -> bool:
    """Append one response to `part`. Return whether the response resumed an earlier download."""
    done = _length(part)
    if archive.size is not None and done >= archive.size:
        return True
    try:
        with _network_errors():
            request = _request(url)
            if done:
                request.add_header("Range", f"bytes={done}-")
            response = _open(request, timeout)
    except _UrlError as err:
        if done and err.status == 416:
            return True  # there are no more bytes: `part` is complete, or it is a different file
        raise
    with response:
        # For a file URL, or if the server ignores Range, the response is the entire file.
        resumed = bool(done) and response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise _UrlError("the server returned a range that was not requested")
        with _network_errors():
            first = response.read(len(_GZIP_MAGIC))
        # Check the content before changing `part`, so that a login page does not erase the file.
        is_page = response.headers.get_content_type() == "text/html"
        if is_page or not (resumed or _GZIP_MAGIC.startswith(first)):
            raise _UrlError("the server returned a web page instead of an archive")
        if not first:
            raise _UrlError("the response is empty", retry=True)
        done = done if resumed else 0
        length = response.headers.get("Content-Length", "")
        # `int` rejects strings with thousands of digits.
        is_valid = re.fullmatch(r"[0-9]{1,15}", length)
        total = done + int(length) if is_valid else archive.size
        if archive.size not in (None, total):
            raise _UrlError(f"it has {total} bytes, but the official archive has {archive.size}")
        report(done, total)
        if not resumed:
            part.truncate(0)
        part.seek(0, os.SEEK_END)
        done += _copy(response, first, part, lambda written: report(done + written, total))
        report(done, total)
    if total is not None and done < total:  # `urllib` does not detect truncated responses
        raise _UrlError(f"the connection closed after {done} of {total} bytes", retry=True)
    return resumed


def _open(request: Request, timeout: float) -> Any:
    """Call `urlopen` with a time limit for all headers together.

    The timeout of `urlopen` applies to each read, so a server that sends the headers one byte at a
    time would never exceed it.
    """
    results: list[Any] = []
    abandoned = threading.Event()

    def connect() -> None:
        try:
            results.append(urlopen(request, timeout=timeout))
        except BaseException as err:
            results.append(err)
        if abandoned.is_set() and not isinstance(results[0], BaseException):
            results[0].close()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_HEADER_TIMEOUTS * timeout)
    if not results:
        abandoned.set()
        raise TimeoutError("timed out waiting for the response headers")
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _copy(response: Any, block: bytes, file: BinaryIO, report: Callable[[int], None]) -> int:
    """Write `block` and the rest of the response to `file`. Return the number of bytes written."""
    min_bytes, interval = _MIN_RATE
    written, reported_at = 0, time.monotonic()
    checked, checked_at = 0, reported_at  # number of bytes and time at the last check of the rate
    while block:
        file.write(block)
        written += len(block)
        now = time.monotonic()
        if written > MAX_BYTES:
            raise _UrlError(f"the response exceeds {MAX_BYTES} bytes")
        if now - reported_at >= _REPORT_INTERVAL:
            report(written)
            reported_at = now
        if now - checked_at >= interval:
            if written - checked < min_bytes:
                raise _UrlError(
                    f"received only {written - checked} bytes in {now - checked_at:.0f} s"
                )
            checked, checked_at = written, now
        with _network_errors():
            # `read1` returns all bytes that have arrived, so an interruption does not lose any.
            block = response.read1(_BLOCK)
    return written


@contextmanager
def _network_errors() -> Iterator[None]:
    """Convert network errors to `_UrlError`, which distinguishes them from file errors."""
    try:
        yield
    except HTTPError as err:
        err.close()
        reason = f"HTTP status {err.code} {one_line(err.reason) if err.reason else ''}".rstrip()
        retry = err.code == 429 or err.code >= 500
        raise _UrlError(reason, retry=retry, status=err.code) from err
    except URLError as err:  # the connection failed
        offline = (
            isinstance(err.reason, socket.gaierror | ConnectionRefusedError | TimeoutError)
            or getattr(err.reason, "errno", None) in _UNREACHABLE_ERRNOS
        )
        retry = isinstance(err.reason, ConnectionError) and not offline
        raise _UrlError(_reason(err.reason), retry=retry, offline=offline) from err
    except InvalidURL as err:  # do not show the message, which can contain secrets
        raise _UrlError("it is not a valid URL") from err
    except ValueError as err:  # the response cannot be parsed
        raise _UrlError(_reason(err)) from err
    except (OSError, HTTPException) as err:  # the connection broke or timed out
        raise _UrlError(_reason(err), retry=True) from err


def _verify(archive: Archive, part: BufferedRandom, resumed: bool) -> None:
    """Check the MD5 digest of `part`. If it is wrong, empty the file and raise `_UrlError`."""
    part.seek(0)
    found = hashlib.file_digest(part, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != archive.md5:
        part.truncate(0)
        # If the download was resumed, an earlier attempt may have received the wrong bytes.
        raise _UrlError(
            f"its MD5 digest is {found}, expected {archive.md5}; the download was removed",
            retry=resumed,
        )


def _length(file: BufferedRandom) -> int:
    """Return the length of an open file in bytes."""
    return file.seek(0, os.SEEK_END)


def _size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if the file cannot be accessed."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _resume_note(count: int) -> str:
    return f"; {count} bytes are kept for the next attempt" if count else ""


def _reason(err: object) -> str:
    """Return the message of an error as one line, without the error number."""
    return one_line(getattr(err, "strerror", None) or err)


def _single_line(text: str) -> str:
    """Return `text`, which may come from a server or a file name, as one printable line."""
    return escape_line(" ".join(text.split()))
