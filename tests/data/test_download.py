"""Downloads from a local web server with configurable faults."""

import base64
import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import socket
import socketserver
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet56.data import archives, download
from resnet56.data.download import ARCHIVES, Archive, default_root, fetch
from resnet56.errors import DownloadError

FILES = {"toy/train.bin": random.Random(0).randbytes(600_000), "toy/readme.txt": b"a toy\n"}
ALTERNATIVES = ('load_data("digits")', "load_data(DIR)", "RESNET56_MIRROR")


class Site(ThreadingHTTPServer):
    """Serves one file at every path. The attributes configure faulty behavior."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.content = content
        self.seen: list[tuple[str, str | None, int]] = []  # path, Range, length of the response
        self.statuses: list[int] = []  # statuses of the first responses
        self.sends: list[float] = []  # fractions of the first responses to send
        self.content_type = "application/gzip"
        self.ranges = True
        self.shift = 0  # offset of the returned range from the requested one
        self.sends_length = True
        self.location = ""  # redirect target (default: the same path)
        self.length = ""  # a false Content-Length
        self.reason: str | None = None  # reason phrase after the status
        self.head_gate = threading.Event()  # delays the response headers
        self.head_gate.set()
        self.drip: float | None = None  # seconds between single bytes
        self.authorizations: list[str | None] = []
        self.gate = threading.Event()  # delays the second half of the response
        self.gate.set()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would look up the host name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors, because tests close connections."""

    def url(self, path: str = "/kriz/toy.tar.gz") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Page(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, requested_range = self.server, self.headers["Range"]
        start = 0
        if requested_range and site.ranges:
            start = int(requested_range.removeprefix("bytes=").rstrip("-"))
        status = site.statuses.pop(0) if site.statuses else 206 if start else 200
        if start >= len(site.content):
            status = 416
        body = site.content[start:] if status < 400 else b""
        site.seen.append((self.path, requested_range, len(body)))
        site.authorizations.append(self.headers["Authorization"])
        site.head_gate.wait(10)
        self.send_response(status, site.reason)
        self.send_header("Content-Type", site.content_type)
        if site.sends_length:
            self.send_header("Content-Length", site.length or str(len(body)))
        if status == 206:
            total = len(site.content)
            self.send_header("Content-Range", f"bytes {start + site.shift}-{total - 1}/{total}")
        if status == 302:
            self.send_header("Location", site.location or self.path)
        self.end_headers()
        body = body[: int(len(body) * (site.sends.pop(0) if site.sends else 1))]
        for byte in body if site.drip is not None else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(site.drip or 0)
        self.wfile.write(body[: len(body) // 2])
        site.gate.wait(10)
        self.wfile.write(body[len(body) // 2 :])


def packed(*members: tuple[tarfile.TarInfo | str, bytes]) -> bytes:
    """Return a gzipped tar. A string stands for a regular file with that name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


CONTENT = packed(*FILES.items())  # packed once, because gzip stores the time
_PAX = tarfile.TarInfo("toy/a")
_PAX.pax_headers, _PAX.mtime = {"comment": "x", "mtime": "1700000000.5"}, 1_700_000_000
SMALL = packed(("toy/readme.txt", b"a toy"), (_PAX, b"a"))


def archive_of(content: bytes, url: str, size: int | None = None) -> Archive:
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Archive("toy", "toy.tar.gz", digest, size, "toy", url)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "*")  # also disables the proxy settings of macOS and Windows
    for name in ("RESNET56_DATA", "RESNET56_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_RETRY_DELAYS", (0.0, 0.0, 0.0))


def serve(content: bytes) -> Iterator[Site]:
    with Site(content) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.01,))
        thread.start()
        yield site
        site.gate.set()
        site.head_gate.set()
        site.shutdown()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    yield from serve(CONTENT)


@pytest.fixture
def mirror() -> Iterator[Site]:
    yield from serve(CONTENT)


@pytest.fixture
def archive(site: Site) -> Archive:
    return archive_of(site.content, site.url())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sets"


@pytest.fixture
def part(root: Path) -> Path:
    root.mkdir(parents=True)
    return root / "toy.tar.gz.part"


@pytest.fixture
def closed() -> str:
    """Return a URL with a closed port."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def failure(archive: Archive, root: Path, **options: Any) -> str:
    """Check that a fetch fails and unpacks nothing, and return its error message."""
    with pytest.raises(DownloadError) as caught:
        fetch(archive, root, **{"timeout": 5.0, **options})
    message = str(caught.value)
    assert "\n" not in message
    if root.is_dir():
        assert {path.name for path in root.iterdir()} <= {"toy.tar.gz.part", "toy.tar.gz.lock"}
    return message


def assert_complete(directory: Path, root: Path) -> None:
    assert directory == root / "toy"
    assert list(root.iterdir()) == [directory]
    assert {f"toy/{path.name}": path.read_bytes() for path in directory.iterdir()} == FILES


def test_fetch_downloads_verifies_unpacks_and_cleans_up(
    site: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_BLOCK", 1000)
    calls: list[tuple[int, int | None]] = []
    directory = fetch(archive, root, progress=lambda *call: calls.append(call))
    assert_complete(directory, root)
    total = len(site.content)
    assert (calls[0], calls[-1]) == ((0, total), (total, total))
    assert len(calls) < 50  # progress is not reported for each of the 600 blocks


def test_an_existing_directory_is_not_downloaded(site: Site, archive: Archive, root: Path) -> None:
    (root / "toy").mkdir(parents=True)
    assert fetch(archive, root) == root / "toy"
    assert site.seen == []


def test_resuming_requests_only_the_remaining_bytes(
    site: Site, archive: Archive, root: Path, part: Path
) -> None:
    part.write_bytes(site.content[:1000])
    calls: list[tuple[int, int | None]] = []
    assert_complete(fetch(archive, root, progress=lambda *call: calls.append(call)), root)
    assert site.seen == [("/kriz/toy.tar.gz", "bytes=1000-", len(site.content) - 1000)]
    assert calls[0] == (1000, len(site.content))


def test_the_download_restarts_if_the_server_ignores_range(
    site: Site, archive: Archive, root: Path, part: Path
) -> None:
    site.ranges = False
    part.write_bytes(site.content[:1000])
    assert_complete(fetch(archive, root), root)
    assert site.seen == [("/kriz/toy.tar.gz", "bytes=1000-", len(site.content))]


@pytest.mark.parametrize("size_known", [True, False])
def test_a_complete_partial_file_is_verified_and_not_downloaded(
    site: Site, root: Path, part: Path, size_known: bool
) -> None:
    part.write_bytes(site.content)
    size = len(site.content) if size_known else None
    assert_complete(fetch(archive_of(site.content, site.url(), size), root), root)
    assert sum(sent for _, _, sent in site.seen) == 0


@pytest.mark.parametrize("stale", [b"\x1f\x8b other", b"x" * 700_000], ids=["short", "too long"])
def test_a_stale_partial_file_is_downloaded_again(
    site: Site, archive: Archive, root: Path, part: Path, stale: bytes
) -> None:
    part.write_bytes(stale)
    assert_complete(fetch(archive, root), root)
    assert site.seen[-1] == ("/kriz/toy.tar.gz", None, len(site.content))


@pytest.mark.parametrize("sends_length", [True, False])
def test_a_dropped_connection_is_resumed(
    site: Site, archive: Archive, root: Path, sends_length: bool
) -> None:
    site.sends, site.sends_length = [0.5], sends_length
    if not sends_length:  # only the size of the archive shows that the end is missing
        archive = archive_of(site.content, site.url(), len(site.content))
    assert_complete(fetch(archive, root), root)
    half = len(site.content) // 2
    assert [seen[1] for seen in site.seen] == [None, f"bytes={half}-"]


def test_repeatedly_dropped_connections_raise_an_error_and_keep_the_partial_file(
    site: Site, archive: Archive, root: Path
) -> None:
    site.sends = [0.5, 0, 0, 0]
    half, total = len(site.content) // 2, len(site.content)
    message = failure(archive, root)
    assert f"{half} bytes are kept for the next attempt" in message
    assert len(site.seen) == 4
    assert (root / "toy.tar.gz.part").read_bytes() == site.content[:half]
    site.sends = [0.5] * 4
    assert f" of {total} bytes" in failure(archive, root)
    assert_complete(fetch(archive, root), root)


def test_ctrl_c_propagates_and_keeps_the_partial_file(
    site: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > 1000:
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "_REPORT_INTERVAL", 0.0)
    monkeypatch.setattr(download, "_BLOCK", 5000)
    with pytest.raises(KeyboardInterrupt):
        fetch(archive, root, progress=interrupt)
    kept = (root / "toy.tar.gz.part").stat().st_size
    assert 1000 < kept < len(site.content)
    assert_complete(fetch(archive, root), root)
    assert site.seen[-1][1] == f"bytes={kept}-"


def test_a_wrong_checksum_is_reported_and_the_download_removed(site: Site, root: Path) -> None:
    archive = archive_of(b"another archive", site.url())
    message = failure(archive, root)
    found = hashlib.md5(site.content, usedforsecurity=False).hexdigest()
    assert f"its MD5 digest is {found}, expected {archive.md5}; the download was removed" in message
    assert not (root / "toy.tar.gz.part").exists()
    assert len(site.seen) == 1


def test_a_wrong_size_is_rejected_before_the_download(site: Site, root: Path) -> None:
    message = failure(archive_of(site.content, site.url(), 999), root)
    assert f"it has {len(site.content)} bytes, but the official archive has 999" in message


def test_an_endless_response_is_stopped(
    site: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    assert "the response exceeds 1000 bytes" in failure(archive, root)


def test_a_wrong_range_is_rejected(site: Site, archive: Archive, root: Path, part: Path) -> None:
    part.write_bytes(site.content[:1000])
    site.shift = 7
    assert "a range that was not requested" in failure(archive, root)
    assert part.read_bytes() == site.content[:1000]


def test_an_empty_response_keeps_the_partial_file(
    site: Site, archive: Archive, root: Path, part: Path
) -> None:
    part.write_bytes(site.content[:1000])
    site.ranges, site.sends = False, [0] * 4
    assert "the response is empty" in failure(archive, root)
    assert part.stat().st_size == 1000


def test_status_404_is_reported_with_the_url_and_not_retried(
    site: Site, archive: Archive, root: Path
) -> None:
    site.statuses = [404]
    message = failure(archive, root)
    assert f"{site.url()}: HTTP status 404" in message
    assert "offline" not in message
    assert all(option in message for option in ALTERNATIVES)


def test_a_busy_server_is_retried(site: Site, archive: Archive, root: Path) -> None:
    site.statuses = [503, 429]
    assert_complete(fetch(archive, root), root)


def test_a_connection_reset_is_retried(
    archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets, connect = [ConnectionResetError(errno.ECONNRESET, "reset")], download.urlopen

    def urlopen(*args: Any, **options: Any) -> Any:
        if resets:
            raise URLError(resets.pop())
        return connect(*args, **options)

    monkeypatch.setattr(download, "urlopen", urlopen)
    assert_complete(fetch(archive, root), root)


def test_a_redirect_loop_causes_a_one_line_error(site: Site, archive: Archive, root: Path) -> None:
    site.statuses = [302] * 20
    assert "HTTP status 302" in failure(archive, root)


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/gzip"])
def test_a_web_page_is_rejected(
    site: Site, archive: Archive, root: Path, part: Path, content_type: str
) -> None:
    part.write_bytes(site.content[:1000])
    site.content, site.content_type, site.ranges = b"<html>Log in</html>", content_type, False
    assert "returned a web page instead of an archive" in failure(archive, root)
    assert part.stat().st_size == 1000


def test_a_web_page_does_not_resume_a_download(
    site: Site, archive: Archive, root: Path, part: Path
) -> None:
    part.write_bytes(site.content[:1000])
    site.content_type = "text/html"
    assert "returned a web page" in failure(archive, root)
    assert part.stat().st_size == 1000


def test_a_stalled_server_times_out(
    site: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_RETRY_DELAYS", ())
    site.gate.clear()
    start = time.monotonic()
    assert "timed out" in failure(archive, root, timeout=0.3)
    assert time.monotonic() - start < 5
    # All bytes that arrived before the timeout.
    assert (root / "toy.tar.gz.part").stat().st_size == len(site.content) // 2


def test_a_slow_connection_is_closed_and_its_bytes_are_kept(
    site: Site, mirror: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_MIN_RATE", (1000, 0.1))
    mirror.drip = 0.01  # each byte arrives well within the timeout
    assert_complete(fetch(archive, root, mirrors=[mirror.url("/")]), root)
    [(_, requested_range, _)] = site.seen
    assert requested_range is None or requested_range != "bytes=0-"
    mirror.seen.clear()
    site.drip = 0.01
    shutil.rmtree(root)
    assert "received only " in failure(archive, root, mirrors=[mirror.url("/")])
    assert (root / "toy.tar.gz.part").stat().st_size > 0


def test_missing_response_headers_time_out(
    site: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_RETRY_DELAYS", ())
    monkeypatch.setattr(download, "_HEADER_TIMEOUTS", 0.01)  # the connection timeout is 5 s
    site.head_gate.clear()
    assert "timed out waiting for the response headers" in failure(archive, root)


@pytest.mark.parametrize("length", ["9" * 5000, "1" * 400, "-5", "0x10", "\xb2", "nan", "1e9"])
def test_an_invalid_content_length_is_ignored(
    site: Site, archive: Archive, root: Path, length: str
) -> None:
    site.length = length
    try:
        assert_complete(fetch(archive, root, timeout=0.5), root)
    except DownloadError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("reason", ["\x1b[2Jgone", "a\x07\x9b31m", "x" * 60_000])
def test_reason_phrases_in_errors_are_printable(
    site: Site, archive: Archive, root: Path, reason: str
) -> None:
    site.statuses, site.reason = [404], reason
    message = failure(archive, root)
    assert message.isprintable()
    assert len(message) < 1000


def test_credentials_are_sent_only_to_their_host(
    site: Site, mirror: Site, archive: Archive, root: Path
) -> None:
    mirror.statuses, mirror.location = [302], site.url("/elsewhere")
    address = f"http://me:s%40cret@127.0.0.1:{mirror.server_address[1]}/pub?token=t0ken"
    assert_complete(fetch(archive, root, mirrors=[address.replace("/pub", "/toy.tar.gz")]), root)
    assert mirror.authorizations == ["Basic " + base64.b64encode(b"me:s@cret").decode()]
    assert site.authorizations == [None]


@pytest.mark.parametrize(
    "mirror",
    [
        "http://me:s3cret@127.0.0.1:PORT/pub",
        "http://me:s3cret@127.0.0.1:PORT/toy.tar.gz?sig=s3cret#s3cret",
        "http://me:pass/s3cret@127.0.0.1:PORT/",
        "http://s3cret@127.0.0.1:port/",
        "http://me:s3cret@127.0.0.1:1/a b?s3cret",
        "http://me:s3cret@[127/",
        "ftp://me:s3cret@127.0.0.1/",
        "me:s3cret@127.0.0.1/pub",
        "http://me:s3cret@\u2100.example/",  # the message of urlsplit contains this URL
    ],
)
def test_errors_do_not_contain_passwords(site: Site, root: Path, mirror: str) -> None:
    site.statuses = [404] * 9
    mirror = mirror.replace("PORT", str(site.server_address[1]))
    message = failure(archive_of(b"", site.url()), root, mirrors=[mirror])
    assert "s3cret" not in message


@pytest.mark.skipif(sys.platform == "win32", reason="creating links requires privileges on Windows")
@pytest.mark.parametrize("name", ["toy.tar.gz.part", "toy.tar.gz.lock"])
@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
def test_links_are_not_followed(
    site: Site, archive: Archive, root: Path, tmp_path: Path, name: str, make: Any
) -> None:
    """Another user can place a link in a shared directory."""
    target = tmp_path / "precious"
    target.write_bytes(b"\x1f\x8b precious")
    root.mkdir(parents=True)
    make(root / name, target)
    assert_complete(fetch(archive, root), root)
    assert target.read_bytes() == b"\x1f\x8b precious"
    assert site.seen[0][1] is None, "the target of the link is not part of a download"


def owned_by_another_user(status: os.stat_result, inode: int) -> os.stat_result:
    fields = list(status)
    if status.st_ino == inode:
        fields[4] += 1
    return os.stat_result(fields)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in the file system")
@pytest.mark.parametrize("name", ["toy.tar.gz.part", "toy.tar.gz.lock"])
def test_a_pipe_or_file_of_another_user_is_reported_and_kept(
    archive: Archive, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir(parents=True)
    os.mkfifo(root / name)  # opening a pipe blocks forever
    with pytest.raises(DownloadError, match=f"{name}: it is not a regular file"):
        fetch(archive, root)
    (root / name).unlink()
    (root / name).write_bytes(b"theirs")
    inode, real = (root / name).stat().st_ino, os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: owned_by_another_user(real(file), inode))
    with pytest.raises(DownloadError, match=f"{name}: it belongs to another user"):
        fetch(archive, root)
    assert (root / name).read_bytes() == b"theirs"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot replace an open file")
def test_a_partial_file_replaced_after_verification_is_not_unpacked(
    site: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = download._verify

    def verify_and_replace(*arguments: Any) -> None:
        verify(*arguments)
        (root / "toy.tar.gz.part").unlink()
        (root / "toy.tar.gz.part").write_bytes(packed(("toy/train.bin", b"evil")))

    monkeypatch.setattr(download, "_verify", verify_and_replace)
    assert_complete(fetch(archive, root), root)


def test_a_missing_home_directory_causes_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(DownloadError, match="set HOME, or set RESNET56_DATA"):
        default_root()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_archives_raise_only_unpack_errors(data: st.DataObject) -> None:
    """The tar is damaged within a valid gzip stream, as a malicious archive can be."""
    content = bytearray(gzip.decompress(SMALL))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with TemporaryDirectory() as root:
        try:
            archives.unpack(io.BytesIO(gzip.compress(bytes(content), 1)), Path(root), "toy")
        except archives.UnpackError as error:
            assert str(error).isprintable()  # noqa: PT017
        assert {path.name for path in Path(root).iterdir()} <= {"toy"}


@pytest.mark.parametrize("fault", ["404", "web page", "drop", "checksum", "closed"])
def test_the_next_mirror_is_tried(
    site: Site, mirror: Site, archive: Archive, root: Path, closed: str, fault: str
) -> None:
    first = mirror.url("/pub/")
    if fault == "404":
        mirror.statuses = [404]
    elif fault == "web page":
        mirror.content = b"<html>"
    elif fault == "drop":
        mirror.sends = [0.5, 0, 0, 0]
    elif fault == "checksum":
        mirror.content = packed(("toy/train.bin", b"other"))
    else:
        first = closed
    assert_complete(fetch(archive, root, mirrors=[first, site.url("/m2")]), root)
    half = len(mirror.content) // 2
    assert [seen[:2] for seen in site.seen] == [
        ("/m2/toy.tar.gz", f"bytes={half}-" if fault == "drop" else None)
    ]
    assert all(seen[0] == "/pub/toy.tar.gz" for seen in mirror.seen)


def test_mirrors_from_the_environment_can_be_full_urls(
    site: Site, mirror: Site, archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.statuses = [404]
    full = mirror.url("/a/toy.tar.gz?download=1")
    monkeypatch.setenv("RESNET56_MIRROR", f" {full},\n{mirror.url('/b')} ")
    assert_complete(fetch(archive, root), root)
    assert [seen[0] for seen in mirror.seen] == ["/a/toy.tar.gz?download=1", "/b/toy.tar.gz"]
    assert site.seen == []


def test_a_mirror_can_be_a_file_url(
    site: Site, archive: Archive, root: Path, part: Path, tmp_path: Path
) -> None:
    (tmp_path / "toy.tar.gz").write_bytes(site.content)
    part.write_bytes(site.content[:1000])
    assert_complete(fetch(archive, root, mirrors=[tmp_path.as_uri()]), root)
    assert site.seen == []


def test_a_missing_file_is_not_reported_as_offline(root: Path, tmp_path: Path) -> None:
    message = failure(archive_of(b"", (tmp_path / "toy.tar.gz").as_uri()), root)
    assert "No such file" in message or "cannot find" in message
    assert "offline" not in message


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/", "C:\\archives", "archives", "http://[oops/", "data:,\nx"]
)
def test_invalid_mirrors_are_rejected(site: Site, archive: Archive, root: Path, url: str) -> None:
    assert "mirror " in failure(archive, root, mirrors=[url])
    assert site.seen == []


@pytest.mark.parametrize("host", ["127.0.0.1:port", "127..1"])
def test_an_invalid_host_raises_an_error(root: Path, host: str) -> None:
    message = failure(archive_of(b"", f"http://{host}/toy.tar.gz"), root)
    assert f"(http://{host}/toy.tar.gz: " in message
    assert "offline" not in message


def test_an_offline_error_lists_alternatives(root: Path, closed: str) -> None:
    message = failure(archive_of(b"", f"{closed}/toy.tar.gz"), root, mirrors=[f"{closed}/m"])
    assert "this machine appears to be offline" in message
    assert "refused" in message
    assert all(option in message for option in ALTERNATIVES)


def test_any_response_means_that_the_machine_is_online(
    site: Site, archive: Archive, root: Path, closed: str
) -> None:
    site.statuses = [404]
    assert "offline" not in failure(archive, root, mirrors=[closed])


def test_unresolved_host_names_are_reported_as_offline(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[str] = []

    def unresolved(host: str, *args: Any, **options: Any) -> Any:
        lookups.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    message = failure(archive_of(b"", "http://toy.invalid/toy.tar.gz"), root)
    assert "appears to be offline" in message
    assert "not known" in message
    assert lookups == ["toy.invalid"]  # the lookup is not repeated


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("toy/../../evil"),
        member("toy/..\\..\\evil"),
        member("/toy/evil"),
        member("C:/toy/evil"),
        member("evil"),
        member("toyevil/x"),
        member("toy/evil", tarfile.SYMTYPE, "train.bin"),
        member("toy/evil", tarfile.SYMTYPE, "/"),
        member("toy/evil", tarfile.LNKTYPE, "toy/train.bin"),
        member("toy/evil", tarfile.FIFOTYPE),
        member("toy/evil", tarfile.CHRTYPE),
    ],
    ids=lambda evil: f"{evil.name} {evil.type.decode()} {evil.linkname}",
)
def test_nothing_is_unpacked_outside_the_directory(
    site: Site, root: Path, tmp_path: Path, evil: tarfile.TarInfo
) -> None:
    site.content = packed(("toy/train.bin", b"fine"), (evil, b""))
    message = failure(archive_of(site.content, site.url()), root)
    assert "cannot be unpacked safely" in message
    assert "evil" in message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["toy.tar.gz.lock"]


@pytest.mark.parametrize(
    "content",
    [
        CONTENT[:-3000],
        gzip.compress(gzip.decompress(CONTENT)[:9000]) + b"more",
        packed(("toy/a", " ".join(map(str, range(9000))).encode()))[:9000] + b"\xff" * 9000,
        CONTENT[:300_000] + b"\xff" * 300_000,
        b"\x1f\x8b\x08\x00 no gzip",
        packed(("toy", b"a file")),
        packed(),
    ],
    ids=["cut", "joined", "damaged", "undecodable", "garbage", "a file", "empty"],
)
def test_invalid_archives_are_rejected(site: Site, root: Path, content: bytes) -> None:
    site.content = content
    assert "cannot be unpacked" in failure(archive_of(content, site.url()), root)
    assert not (root / "toy.tar.gz.part").exists()


def test_a_decompression_bomb_is_rejected(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.content = packed(("toy/a", bytes(30_000)), ("toy/b", bytes(30_000)))
    monkeypatch.setattr(archives, "MAX_BYTES", 50_000)
    message = failure(archive_of(site.content, site.url()), root)
    assert "it unpacks to more than 50000 bytes" in message


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file modes")
def test_unpacked_files_have_no_special_permissions(site: Site, root: Path) -> None:
    info = member("toy/train.bin")
    info.mode = 0o6777
    site.content = packed((info, b""))
    directory = fetch(archive_of(site.content, site.url()), root)
    assert (directory / "train.bin").stat().st_mode & 0o7777 == 0o755


class Full(io.BytesIO):
    """Simulates a file on a full disk."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_during_download_keeps_the_partial_file(
    site: Site, archive: Archive, root: Path, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part.write_bytes(site.content[:1000])
    opened = download.open_private

    def open_full(path: Path) -> Any:
        return Full(part.read_bytes()) if path == part else opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(download, "open_private", open_full)
        message = failure(archive, root)
    assert f"{root}: the disk is full; 1000 bytes are kept" in message
    assert_complete(fetch(archive, root), root)


def test_a_full_disk_during_unpacking_keeps_the_archive(
    site: Site, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(tar: tarfile.TarFile, info: tarfile.TarInfo, path: str) -> None:
        Path(path, "begun").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = archive_of(site.content, site.url(), len(site.content))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", extract)
        assert "the disk is full" in failure(archive, root)
    assert_complete(fetch(archive, root), root)
    assert len(site.seen) == 1


def test_a_read_only_directory_is_reported(
    archive: Archive, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = failure(archive, root)
    assert f"{root}: Permission denied; set RESNET56_DATA" in message


def test_a_file_in_place_of_the_directory_is_reported(
    site: Site, archive: Archive, root: Path
) -> None:
    root.mkdir(parents=True)
    (root / "toy").write_text("mine")
    with pytest.raises(DownloadError, match="it is not a directory"):
        fetch(archive, root)
    assert (root / "toy").read_text() == "mine"
    assert site.seen == []


def test_one_of_two_concurrent_calls_downloads_and_the_other_waits(
    site: Site, archive: Archive, root: Path
) -> None:
    site.gate.clear()
    results: list[Path] = []
    waiting: list[int] = []

    def watch(done: int, total: int | None) -> None:
        waiting.append(done)
        site.gate.set()  # the second call waits, so the first can continue

    started = threading.Event()

    def run(progress: Callable[[int, int | None], None]) -> None:
        results.append(fetch(archive, root, timeout=10, progress=progress))

    first = threading.Thread(target=run, args=(lambda done, total: started.set(),))
    second = threading.Thread(target=run, args=(watch,))
    first.start()
    assert started.wait(10)
    second.start()
    first.join()
    second.join()
    assert results == [root / "toy"] * 2
    assert_complete(results[0], root)
    assert len(site.seen) == 1
    assert waiting


def test_a_directory_created_in_the_meantime_is_used(
    site: Site, archive: Archive, root: Path
) -> None:
    def create_directory(done: int, total: int | None) -> None:
        (root / "toy").mkdir(exist_ok=True)
        (root / "toy" / "theirs").touch()

    assert fetch(archive, root, progress=create_directory) == root / "toy"
    assert [path.name for path in root.rglob("*")] == ["toy", "theirs"]


def test_the_official_archives_have_names_urls_and_checksums() -> None:
    assert list(ARCHIVES) == ["cifar10", "cifar100"]
    for name, archive in ARCHIVES.items():
        assert archive.name == name
        assert archive.url.endswith(f"/{archive.filename}")
        assert len(bytes.fromhex(archive.md5)) == 16


@pytest.mark.parametrize(
    ("platform", "variable", "default"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", None, "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ],
)
def test_the_default_directory_depends_on_the_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, default: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert default_root() == tmp_path / default / "resnet56"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
        assert default_root() == tmp_path / "cache" / "resnet56"
    monkeypatch.setenv("RESNET56_DATA", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
