"""Small image files that take an unprotected decoder minutes of CPU time or gigabytes of memory."""

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
    """Return EXIF tags that all refer to the bytes of the directory itself."""
    length = 10 + 12 * tags
    entries = b"".join(struct.pack("<HHLL", tag, 7, length - 8, 8) for tag in range(1, tags + 1))
    return b"II*\0" + struct.pack("<LH", 8, tags) + entries


def _jpeg_with(inserted: bytes) -> bytes:
    original = _saved("JPEG")
    return original[:2] + inserted + original[2:]


def _png_with(chunks: bytes) -> bytes:
    original = _saved("PNG")
    header = 8 + 12 + 13
    return original[:header] + chunks + original[header:]


def _tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """Return a TIFF with tags (tag, type, count, value) and with `data` after the directory."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + data


def _tiff_with_large_tile() -> bytes:
    side = 46_000
    return _tiff([
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 32773), (262, 3, 1, 1),
        (277, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 200), (325, 4, 1, 64),
    ], bytes(200))  # fmt: skip


def _tiff_with_many_strips(strips: int = 100_000) -> bytes:
    offset = 8 + 2 + 12 * 9 + 4
    return _tiff([
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, strips, offset), (277, 3, 1, 1), (278, 4, 1, 1),
        (279, 4, strips, offset + 4 * strips),
    ], bytes(8 * strips))  # fmt: skip


def _tiff_that_floods_the_log() -> bytes:
    """Return a CCITT fax with many damaged rows. libtiff reports each of them on stderr."""
    rows = 20_000_000
    return _tiff([
        (256, 4, 1, 1), (257, 4, 1, rows), (258, 3, 1, 1), (259, 3, 1, 3), (262, 3, 1, 0),
        (273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, 1, 100_000),
    ], b"\x5a\x13" * 50_000)  # fmt: skip


def _gif_with_many_blocks() -> bytes:
    original = _saved("GIF")
    header = 13 + (3 << (original[10] & 7) + 1 if original[10] & 128 else 0)
    return original[:header] + b"!\xfe" + b"\x01x" * 100_000 + b"\0" + original[header:]


# Functions that create the files, by name.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "JPEG with many scans": lambda: (lambda original: (
        original[:-2] + 200 * original[original.rindex(b"\xff\xda") : -2] + original[-2:]
    ))(_saved("JPEG", progressive=True)),
    "JPEG with many EXIF segments": lambda: _jpeg_with(_segment(b"\xe1", b"Exif\0\0x") * 100_000),
    "JPEG with many comments": lambda: _jpeg_with(_segment(b"\xfe", b"x") * 100_000),
    "JPEG with padding": lambda: _jpeg_with(b"\xff" * 500_000),
    "JPEG with junk": lambda: b"\xff\xd8\xff" + b"junk" * 100_000,
    "JPEG with overlapping EXIF": lambda: _jpeg_with(
        _segment(b"\xe1", b"Exif\0\0" + overlapping_exif(5_000))
    ),
    "PNG with many profiles": lambda: _png_with(
        png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 300
    ),
    "PNG with many text chunks": lambda: _png_with(png_chunk(b"tEXt", b"a\0b") * 20_000),
    "PNG with empty chunks": lambda: _png_with(png_chunk(b"IDAT", b"") * 50_000),
    "GIF with many blocks": _gif_with_many_blocks,
    "TIFF with a large tile": _tiff_with_large_tile,
    "TIFF with many strips": _tiff_with_many_strips,
    "TIFF with overlapping tags": lambda: _tiff([(1, 7, 100_000, 8)] * 900, bytes(100_000)),
    "TIFF with many tags": lambda: _tiff([(1, 3, 1, 1)] * 5_000),
    "TIFF that floods the log": _tiff_that_floods_the_log,
    "PPM with many comments": lambda: b"P3\n9 9\n255\n" + b"1#\n" * 300_000,
    "PPM with a long header": lambda: b"P6\n#" + b"x" * 300_000 + b"\n1 1\n255\nabc",
}  # fmt: skip
