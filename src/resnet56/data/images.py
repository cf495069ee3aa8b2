"""Pictures: any file that Pillow reads to 32x32 RGB bytes, and a map laid over one.

Files are taken as hostile or damaged until they have shown otherwise: whatever is wrong with one
is a one-line `ImageError`. Needs numpy and Pillow only, so that a network exported to ONNX runs
without PyTorch.
"""

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from resnet56.errors import ImageError, one_line, shown

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SIZE = 32  # pixels, the network's input on each side
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Pillow goes by content, not by name; without this list a ".png" could start Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Each scan of a progressive JPEG goes over the whole picture, and a few bytes make one: a small
# file could keep a thread busy for long. Encoders write about ten; libtiff, too, stops at 100.
_SCANS = 100
# A JPEG's markers: what follows 0xFF, but for stuffing, restarts and padding (T.81, table B.1).
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_TEM, _EOI, _SOS = b"\x01", b"\xd9", b"\xda"

# The map's colours, from no evidence (clear) to the most (opaque): red, green, blue, alpha.
# fmt: off
_ANCHORS = np.array([(20, 0, 80, 0), (120, 30, 140, 90), (220, 70, 70, 140), (255, 160, 30, 165),
                     (255, 245, 90, 180)])
# fmt: on
_HEAT = np.stack([np.interp(np.linspace(0, 4, 256), range(5), c) for c in _ANCHORS.T], axis=-1)
_HEAT = np.rint(_HEAT).astype(np.uint8)  # (256, 4)


class _Quiet:
    """`warnings.catch_warnings` for several threads at once.

    The filters are the process's: were each thread to save and restore them, one could leave
    another's behind. Here the first thread in sets them and the last one out restores them.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        """Pillow's remarks on odd metadata and sizes are not for the user."""
        with self.lock:
            if self.inside == 0:
                self.stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        """Restore the filters when nobody reads any more."""
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.stack.close()


_quiet = _Quiet()


def read_image(
    source: Path | bytes | BinaryIO, *, name: str | None = None, max_pixels: int | None = None
) -> Image.Image:
    """The picture in a file or in bytes, upright and RGB; safe to call from several threads.

    Args:
        source: PNG, JPEG, BMP, GIF, WebP, TIFF or PPM, told by its content.
        name: what an error calls it; by default the path.
        max_pixels: the largest picture to decode; by default Pillow's bound, 89 million.

    Raises:
        ImageError: it is no such picture, broken, truncated or too large.
    """
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or 0
    name = name or (shown(str(source)) if isinstance(source, Path) else "the image")
    with reading(name), _quiet, _opened(source) as stream:
        if _has_many_scans(stream):
            raise ImageError(f"{name} is a JPEG of more than {_SCANS} scans: save it anew")
        with Image.open(stream, formats=_FORMATS) as image:
            if limit and image.width * image.height > limit:
                raise ImageError(
                    f"{name} has {image.width:,} x {image.height:,} pixels, more than the "
                    f"{limit:,} allowed: make it smaller (it may be a decompression bomb)"
                )
            return upright(image)


@contextlib.contextmanager
def _opened(source: Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    """A stream that can go back; one that was open already stays open."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    elif isinstance(source, bytes):
        yield io.BytesIO(source)
    else:
        yield source if source.seekable() else io.BytesIO(source.read())


def _has_many_scans(stream: BinaryIO) -> bool:
    """Whether it is a JPEG of very many scans.

    Goes from marker to marker as decoders do, up to the end of the image: what lies behind it, as
    phones put a film there, or in a segment, as a thumbnail, is not counted.
    """
    stream.seek(0)  # where Pillow begins
    is_jpeg = stream.read(2) == b"\xff\xd8"
    content = stream.read() if is_jpeg else b""
    scans = at = 0
    while (marker := _MARKER.search(content, at)) and marker[1] != _EOI and scans <= _SCANS:
        at = marker.end()
        if marker[1] != _TEM:  # all others begin a segment, which says how long it is
            at += max(2, int.from_bytes(content[at : at + 2], "big"))
        scans += marker[1] == _SOS
    return scans > _SCANS


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever the block raises becomes an ImageError about `name`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they trip over
        reason = one_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif "cannot identify image file" in reason:  # Pillow adds an object's address
            reason = "it is none that this reads (PNG, JPEG, GIF, WebP, TIFF, BMP, PPM)"
        raise ImageError(f"cannot read {name}: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """Any Pillow image as it is meant to be seen, in RGB at its own size.

    Takes the first frame of an animation, turns it upright by its EXIF orientation and lays
    transparent images on white (what lies under transparent pixels is noise nobody saw). Integers
    wider than a byte are taken as 16-bit greys, 0..65535; floats as greys 0..255. Raises what
    Pillow raises.
    """
    image.seek(0)
    image = _turned(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would cut these off at 255
        grey = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is where that cannot be read, as viewers show it."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF makes Pillow raise whatever it trips over
        pass
    return image


def to_32x32(image: Image.Image) -> Bytes:
    """Any Pillow image as (32, 32, 3) uint8 RGB; one that is 32x32 RGB comes back bit for bit.

    `upright`, then cropped to the central square and resized with antialiasing. Raises what
    Pillow raises.
    """
    fitted = ImageOps.fit(upright(image), (SIZE, SIZE), method=Image.Resampling.BICUBIC)
    return np.array(fitted, dtype=np.uint8)


def prepare(image: Image.Image) -> Bytes:
    """`to_32x32` as the network takes it: (3, 32, 32)."""
    return np.ascontiguousarray(to_32x32(image).transpose(2, 0, 1))


def files_in(folder: Path) -> list[Path]:
    """The image files below `folder`, sorted by path; hidden and other files are passed over."""
    return sorted(
        (
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and file.is_file()
        ),
        key=Path.as_posix,
    )


def overlay(image: Image.Image, evidence: Floats) -> Image.Image:
    """A class activation map over the picture that it is about, at the picture's own size.

    Args:
        image: the picture; what the network did not see of it, outside the central square, is
            darkened.
        evidence: (H, W), the map of that square; only what speaks for the class is shown, in
            shares of its largest value.
    """
    picture = upright(image)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    peak = float(evidence.max())
    share = np.maximum(evidence, 0) / peak if peak > 0 else np.zeros_like(evidence)
    square = Image.fromarray(share.astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    strength = np.rint(np.asarray(square).clip(0, 1) * 255).astype(np.uint8)
    result = Image.blend(picture, Image.new("RGB", picture.size), 0.6)
    seen = picture.crop((left, top, left + side, top + side)).convert("RGBA")
    heat = Image.fromarray(_HEAT[strength])
    result.paste(Image.alpha_composite(seen, heat).convert("RGB"), (left, top))
    return result
