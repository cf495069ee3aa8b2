"""Small image files that cost a careless decoder minutes of a core or gigabytes of memory."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _saved(format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(stream, format, **options)
    return stream.getvalue()


def _segment(marker: bytes, body: bytes) -> bytes:
    return b"\xff" + marker + struct.pack(">H", len(body) + 2) + body


def overlapping_exif(tags: int) -> bytes:
    """Tags that all claim the same bytes, those of the directory itself."""
    length = 10 + 12 * tags
    entries = b"".join(struct.pack("<HHLL", tag, 7, length - 8, 8) for tag in range(1, tags + 1))
    return b"II*\0" + struct.pack("<LH", 8, tags) + entries


def _jpeg_with(inserted: bytes) -> bytes:
    whole = _saved("JPEG")
    return whole[:2] + inserted + whole[2:]


def _png_with(chunks: bytes) -> bytes:
    whole = _saved("PNG")
    header = 8 + 12 + 13
    return whole[:header] + chunks + whole[header:]


def _tiff(tags: list[tuple[int, int, int, int]], behind: bytes = b"") -> bytes:
    """A TIFF of tag, type, count and value; `behind` lies after the directory."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + behind


def _tiff_of_a_large_tile() -> bytes:
    side = 46_000
    return _tiff([
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 32773), (262, 3, 1, 1),
        (277, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 200), (325, 4, 1, 64),
    ], bytes(200))  # fmt: skip


def _tiff_of_many_strips(strips: int = 100_000) -> bytes:
    behind = 8 + 2 + 12 * 9 + 4
    return _tiff([
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, strips, behind), (277, 3, 1, 1), (278, 4, 1, 1),
        (279, 4, strips, behind + 4 * strips),
    ], bytes(8 * strips))  # fmt: skip


def _tiff_that_floods_the_log() -> bytes:
    """A CCITT fax of very many damaged rows: libtiff reports each on stderr."""
    rows = 20_000_000
    return _tiff([
        (256, 4, 1, 1), (257, 4, 1, rows), (258, 3, 1, 1), (259, 3, 1, 3), (262, 3, 1, 0),
        (273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, 1, 100_000),
    ], b"\x5a\x13" * 50_000)  # fmt: skip


def _gif_of_blocks() -> bytes:
    whole = _saved("GIF")
    head = 13 + (3 << (whole[10] & 7) + 1 if whole[10] & 128 else 0)
    return whole[:head] + b"!\xfe" + b"\x01x" * 100_000 + b"\0" + whole[head:]


# Each by name: a function that makes the file.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "JPEG of scans": lambda: (lambda whole: (
        whole[:-2] + 200 * whole[whole.rindex(b"\xff\xda") : -2] + whole[-2:]
    ))(_saved("JPEG", progressive=True)),
    "JPEG of Exif segments": lambda: _jpeg_with(_segment(b"\xe1", b"Exif\0\0x") * 100_000),
    "JPEG of comments": lambda: _jpeg_with(_segment(b"\xfe", b"x") * 100_000),
    "JPEG of padding": lambda: _jpeg_with(b"\xff" * 500_000),
    "JPEG of junk": lambda: b"\xff\xd8\xff" + b"junk" * 100_000,
    "JPEG of overlapping EXIF": lambda: _jpeg_with(
        _segment(b"\xe1", b"Exif\0\0" + overlapping_exif(5_000))
    ),
    "PNG of profiles": lambda: _png_with(
        png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 300
    ),
    "PNG of text": lambda: _png_with(png_chunk(b"tEXt", b"a\0b") * 20_000),
    "PNG of empty chunks": lambda: _png_with(png_chunk(b"IDAT", b"") * 50_000),
    "GIF of blocks": _gif_of_blocks,
    "TIFF of a large tile": _tiff_of_a_large_tile,
    "TIFF of strips": _tiff_of_many_strips,
    "TIFF of overlapping tags": lambda: _tiff([(1, 7, 100_000, 8)] * 900, bytes(100_000)),
    "TIFF of tags": lambda: _tiff([(1, 3, 1, 1)] * 5_000),
    "TIFF that floods the log": _tiff_that_floods_the_log,
    "PPM of comments": lambda: b"P3\n9 9\n255\n" + b"1#\n" * 300_000,
    "PPM of a long header": lambda: b"P6\n#" + b"x" * 300_000 + b"\n1 1\n255\nabc",
}  # fmt: skip
