"""Limits on image files, checked in the headers before decoding.

Pillow iterates over segments, chunks, comments and directories in Python, and allocates buffers of
the size that a header specifies. A small file can contain millions of such elements, or request a
buffer of several gigabytes. The limits are far above what encoders write, so a file that exceeds
one is damaged or malicious. Headers that cannot be parsed here are left to the decoder, whose
errors are more specific.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

# A scan of a progressive JPEG can be a few bytes long, but the decoder processes the entire image
# for each scan. Encoders write about ten. libtiff also stops at 100.
_MAX_SCANS = 100
_MAX_SEGMENTS = 1_000  # of a JPEG; an ICC profile has up to 255, a depth map several hundred
_MAX_PADDING = 4_096  # bytes between the segments of a JPEG, which Pillow reads one by one
_MAX_CHUNKS = 1_000  # of a PNG, without pixel data
_MIN_CHUNK = 256  # bytes of a PNG file per chunk of pixels; encoders write at least 8 KiB
_MAX_BLOCKS = 20_000  # of a GIF before the first frame, at most 255 bytes each
_MAX_TAGS = 1_000  # of a TIFF
_MAX_ROWS = 65_535  # of a TIFF: libtiff reports each damaged row on stderr
_MAX_PLANES = 6  # samples per pixel that Pillow supports
_MAX_TILE = 4_096 * 4_096  # pixels of a TIFF tile that is larger than the image
_MAX_COMMENTS = 1_000  # of a PPM; Pillow copies a megabyte per comment
_MAX_PPM_HEADER = 65_536  # bytes, which Pillow reads one at a time

# JPEG markers: a byte after 0xFF, except for stuffing, restarts and padding (T.81, table B.1).
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_TEM, _EOI, _SOS, _APP1 = b"\x01", b"\xd9", b"\xda", b"\xe1"
_EXIF = b"Exif\0\0"
# Whitespace and comments, then a token. The header contains one per number.
_PPM_TOKEN = rb"(?:\s|#[^\r\n]*+[\r\n])++[^\s#]++"

# TIFF tags, and the sizes of TIFF types in bytes.
_WIDTH, _LENGTH, _SAMPLES, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 277, 322, 323
_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324
_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1)) | {
    16: 8, 17: 8, 18: 8,
}  # fmt: skip


def find_exceeded_limit(stream: BinaryIO) -> str | None:
    """Return a phrase that describes the limit that an image file exceeds, or None."""
    stream.seek(0)
    start = stream.read(8)
    try:
        if start.startswith(b"\xff\xd8"):
            stream.seek(2)
            return _check_jpeg(stream.read())
        if start == b"\x89PNG\r\n\x1a\n":
            return _check_png(stream)
        if start.startswith(b"GIF8"):
            return _check_gif(stream)
        if start[:2] in (b"II", b"MM"):
            return _check_tiff(stream)
        if start[:1] == b"P":
            return _check_ppm(stream)
    except (struct.error, IndexError, OverflowError):
        pass  # truncated or invalid, which the decoder reports
    return None


def _check_jpeg(content: bytes) -> str | None:
    """Check a JPEG without its first two bytes.

    The function follows the markers up to the end of the image, as decoders do. It ignores data
    after the image, such as a video from a phone, and within a segment, such as a thumbnail.
    """
    scans = segments = padding = offset = 0
    exif = []
    while (marker := _MARKER.search(content, offset)) and marker[1] != _EOI:
        padding += 0 if scans else marker.start() - offset
        offset = marker.end()
        if marker[1] != _TEM:  # all others start a segment with its length
            length = max(2, int.from_bytes(content[offset : offset + 2], "big"))
            if marker[1] == _APP1 and content.startswith(_EXIF, offset + 2):
                exif.append(content[offset + 2 + len(_EXIF) : offset + length])
            offset += length
        scans += marker[1] == _SOS
        segments += 1
        if scans > _MAX_SCANS:
            return f"is a JPEG with more than {_MAX_SCANS} scans"
        if segments > _MAX_SEGMENTS:
            return f"is a JPEG with more than {_MAX_SEGMENTS:,} segments"
        if padding > _MAX_PADDING:
            break
    padding += 0 if scans else len(content) - offset if marker is None else 0
    if padding > _MAX_PADDING:
        return f"is a JPEG with more than {_MAX_PADDING:,} bytes between its segments"
    if exif_overlaps(b"".join(exif)):
        return "has overlapping EXIF data"
    return None


def _check_png(stream: BinaryIO) -> str | None:
    chunks = others = profiles = 0
    size = stream.seek(0, 2)
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            break
        chunks += 1
        others += kind not in (b"IDAT", b"fcTL", b"fdAT")
        profiles += kind == b"iCCP"
        if profiles > 1:  # the standard allows one; each can decompress to a megabyte
            return "is a PNG with more than one color profile"
        if others > _MAX_CHUNKS or chunks > _MAX_CHUNKS + size // _MIN_CHUNK:
            return f"is a PNG with more than {max(others, chunks) - 1:,} chunks"
        stream.seek(length + 4, 1)
    return None


def _check_gif(stream: BinaryIO) -> str | None:
    """Check a GIF up to its first frame.

    Later blocks are not checked, because Pillow does not loop over them in Python.
    """
    stream.seek(10)
    flags = stream.read(3)[0]
    if flags & 128:
        stream.seek(3 << (flags & 7) + 1, 1)  # the palette
    blocks = 0
    while (kind := stream.read(1)) not in (b",", b";", b""):
        blocks += 1  # an extension, or a stray byte, which decoders skip
        if kind == b"!":
            stream.seek(1, 1)
            while (length := stream.read(1)[0]) and blocks <= _MAX_BLOCKS:
                stream.seek(length, 1)
                blocks += 1
        if blocks > _MAX_BLOCKS:
            return f"is a GIF with more than {_MAX_BLOCKS:,} blocks before its first frame"
    return None


def _check_ppm(stream: BinaryIO) -> str | None:
    stream.seek(0)
    start = stream.read(_MAX_PPM_HEADER)
    numbers = 2 if start[1:2] in (b"1", b"4") else 3  # width, height and maximum value
    header = re.compile(rb"P[^\s#]*+" + b"(?:%b){%d}" % (_PPM_TOKEN, numbers), re.DOTALL)
    if len(start) == _MAX_PPM_HEADER and not header.match(start):
        return f"is a PPM with a header of more than {_MAX_PPM_HEADER:,} bytes"
    if start[1:2] in (b"1", b"2", b"3"):  # pixels as text, with possible comments
        comments = start.count(b"#")
        while comments <= _MAX_COMMENTS and (block := stream.read(2**20)):
            comments += block.count(b"#")
        if comments > _MAX_COMMENTS:
            return f"is a PPM with more than {_MAX_COMMENTS:,} comments"
    return None


def _check_tiff(stream: BinaryIO) -> str | None:
    size = stream.seek(0, 2)
    tags: dict[int, tuple[int, int]] = {}
    total = 0
    for index, (tag, count, value, length) in enumerate(_entries(stream)):
        if index >= _MAX_TAGS:
            return f"is a TIFF with more than {_MAX_TAGS:,} tags"
        tags[tag] = count, value
        total += length
    if total > size:
        return "is a TIFF with overlapping tags"
    width, rows = (tags.get(tag, (1, 0))[1] for tag in (_WIDTH, _LENGTH))
    if rows > _MAX_ROWS:
        return f"is a TIFF with more than {_MAX_ROWS:,} rows"
    tile_width, tile_length = (tags.get(tag, (1, 0))[1] for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if tile_width * tile_length > max(_MAX_TILE, width * rows):
        return f"is a TIFF with a tile of {tile_width:,} x {tile_length:,} pixels"
    planes = min(max(1, tags.get(_SAMPLES, (1, 1))[1]), _MAX_PLANES)
    strips, tiles = (tags.get(tag, (0, 0))[0] for tag in (_STRIP_OFFSETS, _TILE_OFFSETS))
    max_tiles = -(-width // max(1, tile_width)) * -(-rows // max(1, tile_length))
    if strips > rows * planes or tiles > max_tiles * planes:
        return "is a TIFF with more strips or tiles than its size allows"
    return None


def exif_overlaps(exif: bytes) -> bool:
    """Return whether EXIF tags overlap. Pillow copies the bytes of each tag."""
    total = 0
    try:
        for *_, length in _entries(io.BytesIO(exif.removeprefix(_EXIF))):
            total += length
    except (struct.error, IndexError):  # invalid, which Pillow rejects
        pass
    return total > len(exif)


def _entries(stream: BinaryIO) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, count, first value and external size of each entry in the first TIFF directory.

    The value is 0 unless it is an integer that is stored in the entry itself. The external size is
    the number of bytes outside the entry.
    """
    stream.seek(0)
    start = stream.read(16)
    order = "<" if start[:2] == b"II" else ">"
    big = start[2] == 43
    stream.seek(struct.unpack(order + "Q", start[8:])[0] if big else
                struct.unpack(order + "L", start[4:8])[0])  # fmt: skip
    inline = 8 if big else 4
    [entries] = struct.unpack(order + ("Q" if big else "H"), stream.read(8 if big else 2))
    for _ in range(entries):
        entry = stream.read(20 if big else 12)
        tag, kind, count = struct.unpack(order + ("HHQ" if big else "HHL"), entry[:-inline])
        length = count * _TYPE_BYTES.get(kind, 0)
        code = {1: "B", 3: "H", 4: "L", 16: "Q"}.get(kind)
        value = 0
        if code and length <= inline:
            [value] = struct.unpack_from(order + code, entry, len(entry) - inline)
        yield tag, count, value, length if length > inline else 0
