"""Bounds on image files, checked in their headers before a decoder runs.

Pillow walks over segments, chunks, comments and directories in Python, and sizes buffers by what
a header claims. A small file can hold millions of these, or claim a buffer of gigabytes. The
bounds lie far above what encoders write; a file beyond them is damaged or an attack. What cannot
be parsed here is left to the decoder, which says better what is wrong.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

# Each scan of a progressive JPEG goes over the whole image, and a few bytes make one. Encoders
# write about ten; libtiff, too, stops at 100.
_SCANS = 100
_SEGMENTS = 1_000  # of a JPEG; an ICC profile has up to 255, a depth map some hundreds
_PADDING = 4_096  # bytes between a JPEG's segments, which Pillow reads one at a time
_CHUNKS = 1_000  # of a PNG, beyond those of pixels
_CHUNK = 256  # bytes of a PNG for each chunk of pixels; encoders write 8 KiB and more
_BLOCKS = 20_000  # of a GIF before the first frame, 255 bytes each
_TAGS = 1_000  # of a TIFF
_ROWS = 65_535  # of a TIFF: libtiff reports each damaged row on stderr
_PLANES = 6  # samples per pixel that Pillow decodes
_TILE = 4_096 * 4_096  # pixels of a TIFF's tile, where the image itself is smaller
_COMMENTS = 1_000  # of a PPM; Pillow copies a megabyte for each
_PPM_HEADER = 65_536  # bytes, which Pillow reads one at a time

# A JPEG's markers: what follows 0xFF, but for stuffing, restarts and padding (T.81, table B.1).
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_TEM, _EOI, _SOS, _APP1 = b"\x01", b"\xd9", b"\xda", b"\xe1"
_EXIF = b"Exif\0\0"
# Blank space and comments, then a token, as often as the format has numbers in its header.
_PPM_TOKEN = rb"(?:\s|#[^\r\n]*+[\r\n])++[^\s#]++"

# A TIFF's tags, and the bytes of its types.
_WIDTH, _LENGTH, _SAMPLES, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 277, 322, 323
_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324
_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1)) | {
    16: 8, 17: 8, 18: 8,
}  # fmt: skip


def excess(stream: BinaryIO) -> str | None:
    """What goes beyond a bound, worded to follow the file's name; None for an ordinary file."""
    stream.seek(0)
    start = stream.read(8)
    try:
        if start.startswith(b"\xff\xd8"):
            stream.seek(2)
            return _jpeg_excess(stream.read())
        if start == b"\x89PNG\r\n\x1a\n":
            return _png_excess(stream)
        if start.startswith(b"GIF8"):
            return _gif_excess(stream)
        if start[:2] in (b"II", b"MM"):
            return _tiff_excess(stream)
        if start[:1] == b"P":
            return _ppm_excess(stream)
    except (struct.error, IndexError, OverflowError):  # cut off, or nonsense: the decoder says so
        pass
    return None


def _jpeg_excess(content: bytes) -> str | None:
    """Of a JPEG, without its first two bytes.

    Goes from marker to marker as decoders do, up to the end of the image: what lies behind it, as
    phones put a film there, or in a segment, as a thumbnail, is not counted.
    """
    scans = segments = padding = at = 0
    exif = []
    while (marker := _MARKER.search(content, at)) and marker[1] != _EOI:
        padding += 0 if scans else marker.start() - at
        at = marker.end()
        if marker[1] != _TEM:  # all others begin a segment, which says how long it is
            length = max(2, int.from_bytes(content[at : at + 2], "big"))
            if marker[1] == _APP1 and content.startswith(_EXIF, at + 2):
                exif.append(content[at + 2 + len(_EXIF) : at + length])
            at += length
        scans += marker[1] == _SOS
        segments += 1
        if scans > _SCANS:
            return f"is a JPEG of more than {_SCANS} scans"
        if segments > _SEGMENTS:
            return f"is a JPEG of more than {_SEGMENTS:,} segments"
        if padding > _PADDING:
            break
    padding += 0 if scans else len(content) - at if marker is None else 0
    if padding > _PADDING:
        return f"is a JPEG with more than {_PADDING:,} bytes between its segments"
    if exif_excess(b"".join(exif)):
        return "has EXIF data whose parts overlap"
    return None


def _png_excess(stream: BinaryIO) -> str | None:
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
        if profiles > 1:  # the standard allows one; each may unpack to a megabyte
            return "is a PNG of more than one color profile"
        if others > _CHUNKS or chunks > _CHUNKS + size // _CHUNK:
            return f"is a PNG of more than {max(others, chunks) - 1:,} chunks"
        stream.seek(length + 4, 1)
    return None


def _gif_excess(stream: BinaryIO) -> str | None:
    """Of a GIF, up to its first frame; after it, the decoder does not go over blocks in Python."""
    stream.seek(10)
    flags = stream.read(3)[0]
    if flags & 128:
        stream.seek(3 << (flags & 7) + 1, 1)  # the palette
    blocks = 0
    while (kind := stream.read(1)) not in (b",", b";", b""):
        blocks += 1  # an extension, or a stray byte, which decoders pass over
        if kind == b"!":
            stream.seek(1, 1)
            while (length := stream.read(1)[0]) and blocks <= _BLOCKS:
                stream.seek(length, 1)
                blocks += 1
        if blocks > _BLOCKS:
            return f"is a GIF of more than {_BLOCKS:,} blocks before its first frame"
    return None


def _ppm_excess(stream: BinaryIO) -> str | None:
    stream.seek(0)
    start = stream.read(_PPM_HEADER)
    numbers = 2 if start[1:2] in (b"1", b"4") else 3  # width and height, and the largest value
    header = re.compile(rb"P[^\s#]*+" + b"(?:%b){%d}" % (_PPM_TOKEN, numbers), re.DOTALL)
    if len(start) == _PPM_HEADER and not header.match(start):
        return f"is a PPM whose header is longer than {_PPM_HEADER:,} bytes"
    if start[1:2] in (b"1", b"2", b"3"):  # plain: pixels as text, with comments between them
        comments = start.count(b"#")
        while comments <= _COMMENTS and (block := stream.read(2**20)):
            comments += block.count(b"#")
        if comments > _COMMENTS:
            return f"is a PPM of more than {_COMMENTS:,} comments"
    return None


def _tiff_excess(stream: BinaryIO) -> str | None:
    size = stream.seek(0, 2)
    found: dict[int, tuple[int, int]] = {}
    total = 0
    for place, (tag, count, value, length) in enumerate(_entries(stream)):
        if place >= _TAGS:
            return f"is a TIFF of more than {_TAGS:,} tags"
        found[tag] = count, value
        total += length
    if total > size:
        return "is a TIFF whose tags overlap"
    width, rows = (found.get(tag, (1, 0))[1] for tag in (_WIDTH, _LENGTH))
    if rows > _ROWS:
        return f"is a TIFF of more than {_ROWS:,} rows"
    tile_width, tile_length = (found.get(tag, (1, 0))[1] for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if tile_width * tile_length > max(_TILE, width * rows):
        return f"is a TIFF with a tile of {tile_width:,} x {tile_length:,} pixels"
    planes = min(max(1, found.get(_SAMPLES, (1, 1))[1]), _PLANES)
    strips, tiles = (found.get(tag, (0, 0))[0] for tag in (_STRIP_OFFSETS, _TILE_OFFSETS))
    fit = -(-width // max(1, tile_width)) * -(-rows // max(1, tile_length))
    if strips > rows * planes or tiles > fit * planes:
        return "is a TIFF of more strips or tiles than it has room for"
    return None


def exif_excess(exif: bytes) -> bool:
    """Whether EXIF data claim more bytes than there are; Pillow copies them for every tag."""
    total = 0
    try:
        for *_, length in _entries(io.BytesIO(exif.removeprefix(_EXIF))):
            total += length
    except (struct.error, IndexError):  # nonsense, which Pillow refuses
        pass
    return total > len(exif)


def _entries(stream: BinaryIO) -> Iterator[tuple[int, int, int, int]]:
    """The first directory of a TIFF: each entry's tag, count, first value, and bytes elsewhere.

    The value is 0 where it does not lie in the entry itself, but for a single integer.
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
        form = {1: "B", 3: "H", 4: "L", 16: "Q"}.get(kind)
        value = 0
        if form and length <= inline:
            [value] = struct.unpack_from(order + form, entry, len(entry) - inline)
        yield tag, count, value, length if length > inline else 0
