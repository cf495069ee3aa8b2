"""Check image files against limits before decoding them.

Pillow iterates over segments, chunks, comments and directories in Python. It also allocates buffers
of the size that a header specifies. A small file can contain millions of such elements, or request
a buffer of several gigabytes. The limits are far above the values that encoders write. A file
that exceeds a limit is therefore damaged or malicious. This module accepts headers that it cannot
parse, because the decoder reports more specific errors.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

# JPEG: a scan of a progressive JPEG can be a few bytes long, but the decoder processes the entire
# image for each scan. Encoders write about ten scans. libtiff also stops at 100 scans.
_MAX_SCANS = 100
# An ICC profile spans up to 255 segments, and a depth map spans several hundred.
_MAX_SEGMENTS = 1_000
# Pillow reads the bytes between segments one at a time.
_MAX_PADDING = 4_096
# PNG: the maximum number of chunks that do not contain pixels.
_MAX_CHUNKS = 1_000
# The minimum file size per chunk of pixels, in bytes. Encoders write at least 8 KiB per chunk.
_MIN_CHUNK = 256
# GIF: the maximum number of blocks before the first frame. A block has at most 255 bytes.
_MAX_BLOCKS = 20_000
# TIFF: libtiff reports each damaged row on stderr.
_MAX_TAGS = 1_000
_MAX_ROWS = 65_535
_MAX_PLANES = 6  # the largest number of samples per pixel that Pillow supports
_MAX_TILE = 4_096 * 4_096  # the maximum number of pixels in a tile that is larger than the image
# PPM: Pillow copies a megabyte per comment, and reads the header one byte at a time.
_MAX_COMMENTS = 1_000
_MAX_PPM_HEADER = 65_536  # bytes

# A JPEG marker is a byte after 0xFF, except for stuffing, restarts and padding (T.81, table B.1).
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_TEM, _EOI, _SOS, _APP1 = b"\x01", b"\xd9", b"\xda", b"\xe1"
_EXIF = b"Exif\0\0"
# Whitespace and comments, followed by a number in the header.
_PPM_TOKEN = rb"(?:\s|#[^\r\n]*+[\r\n])++[^\s#]++"

# TIFF tags, and the sizes of TIFF types in bytes.
_WIDTH, _LENGTH, _SAMPLES, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 277, 322, 323
_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324
_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1)) | {
    16: 8, 17: 8, 18: 8,
}  # fmt: skip


def find_exceeded_limit(stream: BinaryIO) -> str | None:
    """Return a phrase that states which limit an image file exceeds, or None."""
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
        pass  # the decoder reports truncated and invalid files
    return None


def _check_jpeg(content: bytes) -> str | None:
    """Check the part of a JPEG that follows its first two bytes.

    Like a decoder, the function follows the markers to the end of the image. It ignores data after
    the image (such as a video from a phone) and inside segments (such as a thumbnail).
    """
    scans = segments = padding = offset = 0
    exif = []
    while (marker := _MARKER.search(content, offset)) and marker[1] != _EOI:
        padding += 0 if scans else marker.start() - offset
        offset = marker.end()
        if marker[1] != _TEM:  # all other markers are followed by the length of a segment
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
        # The standard allows only one profile. Every additional one can decompress to a megabyte.
        if profiles > 1:
            return "is a PNG with more than one color profile"
        if others > _MAX_CHUNKS or chunks > _MAX_CHUNKS + size // _MIN_CHUNK:
            return f"is a PNG with more than {max(others, chunks) - 1:,} chunks"
        stream.seek(length + 4, 1)
    return None


def _check_gif(stream: BinaryIO) -> str | None:
    """Check the blocks that precede the first frame of a GIF.

    Later blocks are not checked, because Pillow does not loop over them in Python.
    """
    stream.seek(10)
    flags = stream.read(3)[0]
    if flags & 128:
        stream.seek(3 << (flags & 7) + 1, 1)  # the palette
    blocks = 0
    while (kind := stream.read(1)) not in (b",", b";", b""):
        blocks += 1  # an extension, or a stray byte that decoders skip
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
    numbers = 2 if start[1:2] in (b"1", b"4") else 3  # width, height and possibly the maximum value
    header = re.compile(rb"P[^\s#]*+" + b"(?:%b){%d}" % (_PPM_TOKEN, numbers), re.DOTALL)
    if len(start) == _MAX_PPM_HEADER and not header.match(start):
        return f"is a PPM with a header of more than {_MAX_PPM_HEADER:,} bytes"
    if start[1:2] in (b"1", b"2", b"3"):  # pixels are text, which can contain comments
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
    """Return whether EXIF tags overlap.

    Pillow copies the bytes of each tag, so overlapping tags could require far more memory than the
    file size.
    """
    total = 0
    try:
        for *_, length in _entries(io.BytesIO(exif.removeprefix(_EXIF))):
            total += length
    except (struct.error, IndexError):  # Pillow rejects invalid EXIF data
        pass
    return total > len(exif)


def _entries(stream: BinaryIO) -> Iterator[tuple[int, int, int, int]]:
    """Yield the tag, count, first value and external size of each entry.

    The function reads the first directory of a TIFF file. The value is 0 unless the entry itself
    stores it as an integer. The external size is the number of bytes that are stored outside the
    entry.
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
