"""Fetch the official CIFAR archives: resumed, checked against their MD5, unpacked safely."""

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

from resnet56.data.archives import LARGEST, UnpackError, unpack
from resnet56.errors import DownloadError, one_line, printable
from resnet56.locks import open_private, try_lock

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes there will be (None: not known)."""

_PAUSES = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try of one URL
_REPORT_EVERY = 0.2  # seconds between calls of `progress`, and between looks at a held lock
_BLOCK = 1 << 18  # bytes asked of the connection at once
_SLOWEST = (1_000, 60.0)  # bytes in so many seconds; a server that sends less has no end
_ANSWER_WITHIN = 4  # times the timeout, from the call to the end of the answer's head
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
        return _without_tilde(chosen)
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        cache = "~/Library/Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _without_tilde(cache) / "resnet56"


def _without_tilde(folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # as in a container whose user is in no list
        raise DownloadError(
            f"no home directory for {folder}: set HOME, or RESNET56_DATA to a folder for data sets"
        ) from None


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
    download, but the checksums notice.) Neither file is written through a link, so `root` may be
    a folder that others can write to.

    Args:
        archive: what to fetch, for example `ARCHIVES["cifar10"]`.
        root: the folder to keep it in, made if missing; see `default_root`.
        mirrors: base or full URLs (http, https, file) to try, in order, before the archive's own;
            if empty, those in $RESNET56_MIRROR, separated by commas or white space. A user and
            password in a URL are sent to its host only, and never shown.
        timeout: seconds to wait for a connection, and for each further piece of the answer. A
            connection that sends less than 1,000 bytes a minute is given up, too.
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
        with open_private(lock) as locked:
            while not try_lock(locked.fileno()):
                report(_size(part), archive.size)
                time.sleep(_REPORT_EVERY)
            if not final.is_dir():  # else the process that held the lock has made it
                _download_and_unpack(archive, urls, part, root, timeout, report)
    except OSError as err:  # the network's were dealt with: this is about files
        why = "the disk is full" if err.errno in _FULL else _why(err)
        where = err.filename or root
        raise DownloadError(_line(f"{archive.filename}: {where}: {why}{_kept(part)}")) from err
    # The folder is there: whoever still waits for the lock will see it, even if its file is gone.
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
    """Make `root/archive.folder`. `part` keeps what a failure leaves, if anything."""
    # One open file for all that follows: a name in a folder of others could be exchanged between
    # the check of its content and its use.
    with open_private(part) as file:
        try:
            _download(archive, urls, file, timeout, report)
            unpack(file, root, archive.folder)
        except UnpackError as err:
            file.truncate(0)  # its checksum was right: no other download would be better
            message = f"{archive.filename} was removed, it cannot be unpacked safely: {err}"
            raise DownloadError(_line(message)) from err
        finally:
            if not _length(file):
                with suppress(OSError):
                    part.unlink()


def _urls(archive: Archive, mirrors: Sequence[str]) -> list[str]:
    """Return the URLs to try, in order, the official one last."""
    named = mirrors or re.split(r"[,\s]+", os.environ.get("RESNET56_MIRROR", ""))
    urls = []
    for mirror in filter(None, named):
        try:
            parts = urlsplit(mirror)
        except ValueError as err:
            raise DownloadError(f"mirror {_public(mirror)}: not a valid URL") from err
        if parts.scheme not in ("http", "https", "file"):
            raise DownloadError(f"mirror {_public(mirror)}: expected an http, https or file URL")
        whole = parts.path.endswith("/" + archive.filename)
        urls.append(mirror if whole else f"{mirror.rstrip('/')}/{archive.filename}")
    return [*urls, archive.url]


def _public(url: str) -> str:
    """The URL without what may be a secret: user, password, query (signatures) and fragment."""
    address = re.split(r"[?#]", url)[0]
    scheme = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|", address)[0]  # type: ignore[index]
    # Up to the last @, wherever it stands: a password that is not quoted may hold slashes.
    return one_line(scheme + address.removeprefix(scheme).rpartition("@")[2])


def _request(url: str) -> Request:
    """A request for the URL; its user and password go into a header, to its own host only."""
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
    reasons = "; ".join(f"{_public(url)}: {failed}" for url, failed in failures)
    offline = all(failed.offline for _, failed in failures)
    lead = "this machine seems to be offline, " if offline else ""
    kept = _kept_bytes(_length(part))
    message = f"{lead}{archive.filename} was not downloaded ({reasons}){kept}; {_WAYS_ON}"
    raise DownloadError(_line(message))


def _receive(
    url: str, archive: Archive, part: BufferedRandom, timeout: float, report: Progress
) -> bool:
    """Add what one connection sends to `part`; return whether its start was there before."""
    done = _length(part)
    if archive.size is not None and done >= archive.size:
        return True
    try:
        with _network():
            request = _request(url)
            if done:
                request.add_header("Range", f"bytes={done}-")
            response = _open(request, timeout)
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
        known = re.fullmatch(r"[0-9]{1,15}", length)  # int() refuses thousands of digits
        total = done + int(length) if known else archive.size
        if archive.size not in (None, total):
            raise _UrlError(f"has {total} bytes, not the official archive's {archive.size}")
        report(done, total)
        if not continued:
            part.truncate(0)
        part.seek(0, os.SEEK_END)
        done += _copy(response, first, part, lambda written: report(done + written, total))
        report(done, total)
    if total is not None and done < total:  # urllib takes an early end for the end
        raise _UrlError(f"stopped after {done} of {total} bytes", retry=True)
    return continued


def _open(request: Request, timeout: float) -> Any:
    """`urlopen` with a limit for the whole answer's head, which a server can send drop by drop."""
    answers: list[Any] = []
    given_up = threading.Event()

    def connect() -> None:
        try:
            answers.append(urlopen(request, timeout=timeout))
        except BaseException as err:
            answers.append(err)
        if given_up.is_set() and not isinstance(answers[0], BaseException):
            answers[0].close()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_ANSWER_WITHIN * timeout)
    if not answers:
        given_up.set()
        raise TimeoutError("timed out before the answer began")
    if isinstance(answers[0], BaseException):
        raise answers[0]
    return answers[0]


def _copy(response: Any, block: bytes, file: BinaryIO, report: Callable[[int], None]) -> int:
    """Write `block` and what follows it in the response to `file`; return the bytes written."""
    least, seconds = _SLOWEST
    written, reported = 0, time.monotonic()
    mark, marked = 0, reported  # the bytes at the last look at the speed, and when that was
    while block:
        file.write(block)
        written += len(block)
        now = time.monotonic()
        if written > LARGEST:
            raise _UrlError(f"sent more than {LARGEST} bytes")
        if now - reported >= _REPORT_EVERY:
            report(written)
            reported = now
        if now - marked >= seconds:
            if written - mark < least:
                raise _UrlError(f"sent only {written - mark} bytes in {now - marked:.0f} s")
            mark, marked = written, now
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
        reason = f"HTTP status {err.code} {one_line(err.reason) if err.reason else ''}".rstrip()
        retry = err.code == 429 or err.code >= 500
        raise _UrlError(reason, retry=retry, status=err.code) from err
    except URLError as err:  # no connection
        offline = (
            isinstance(err.reason, socket.gaierror | ConnectionRefusedError | TimeoutError)
            or getattr(err.reason, "errno", None) in _UNREACHABLE
        )
        retry = isinstance(err.reason, ConnectionError) and not offline
        raise _UrlError(_why(err.reason), retry=retry, offline=offline) from err
    except InvalidURL as err:  # its text shows the URL with all its secrets
        raise _UrlError("not a valid URL") from err
    except ValueError as err:  # what a server sent cannot be parsed
        raise _UrlError(_why(err)) from err
    except (OSError, HTTPException) as err:  # a connection that broke or fell silent
        raise _UrlError(_why(err), retry=True) from err


def _verify(archive: Archive, part: BufferedRandom, continued: bool) -> None:
    """Empty `part` and raise `_UrlError` unless its MD5 is the archive's."""
    part.seek(0)
    found = hashlib.file_digest(part, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != archive.md5:
        part.truncate(0)
        # The bad bytes may be the ones of an earlier try: then this URL gets one from the start.
        raise _UrlError(
            f"MD5 {found} instead of {archive.md5}, the download was removed", retry=continued
        )


def _length(file: BufferedRandom) -> int:
    """Return the bytes in an open file."""
    return file.seek(0, os.SEEK_END)


def _size(path: Path) -> int:
    """Return the bytes in a file, 0 if there is none to be seen."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _kept(part: Path) -> str:
    """Return what to say of the partial download, nothing if there is none."""
    return _kept_bytes(_size(part))


def _kept_bytes(count: int) -> str:
    return f"; {count} bytes are kept for the next try" if count else ""


def _why(err: object) -> str:
    """Return an error's reason without its number, in one line that is not endless."""
    return one_line(getattr(err, "strerror", None) or err)


def _line(text: str) -> str:
    """Return the text as one printable line, whatever a server or a file name put into it."""
    return printable(" ".join(text.split()))
