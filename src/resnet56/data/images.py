"""Pictures: any file that Pillow reads to 32x32 RGB bytes, and a map laid over one.

Files are taken as hostile or damaged until they have shown otherwise: whatever is wrong with one
is a one-line `ImageError`. Needs numpy and Pillow only, so that a network exported to ONNX runs
without PyTorch.
"""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from resnet56.data.image_headers import excess, exif_excess
from resnet56.errors import ImageError, one_line, shown

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


def _has_avif() -> bool:
    """Whether this Pillow decodes AVIF (version 11.3 and later, if built with it)."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return bool(AvifImagePlugin.SUPPORTED)


SIZE = 32  # pixels, the network's input on each side
# What browsers show, and more. Pillow goes by content, not by name; without such a list a ".png"
# could start Ghostscript.
BROWSER_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", *(["AVIF"] if _has_avif() else []))
FORMATS = (*BROWSER_FORMATS, "TIFF", "PPM")
# A JPEG of more pixels than Pillow's bound is decoded at an eighth of its size, up to this many
# times the bound: of a progressive one, libjpeg holds all coefficients, 6 bytes per pixel at most.
_REDUCED = 4
_MAX_SAMPLE_VALUE, _BITS_PER_SAMPLE = 281, 258  # tags of a TIFF
_DARK = 15  # of 255: an image of deep greys that comes out no lighter is remarked on

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
    source: Path | bytes | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """The image in a file or in bytes, upright and RGB; safe to call from several threads.

    Args:
        source: an image file, its format told by its content.
        name: what an error calls it; by default the path.
        max_pixels: the largest image to decode. By default Pillow's bound, 89 million (see
            `PIL.Image.MAX_IMAGE_PIXELS`), and a JPEG of up to four times as many pixels is
            decoded at an eighth of its size.
        formats: the formats to accept, by Pillow's names.

    Raises:
        ImageError: it is no such image, broken, truncated or too large.
    """
    name = name or (shown(str(source)) if isinstance(source, Path) else "the image")
    with reading(name, formats), _quiet, _opened(source) as stream:
        if found := excess(stream):
            raise ImageError(f"{name} {found}: save it anew")
        with _open(stream, name, max_pixels, formats) as image:
            result = upright(image)
            if _is_deep(image) and np.asarray(result).max() <= _DARK:
                log.warning("%s is nearly black: do its values span the range of its type?", name)
            return result


def read_pixels(
    source: Path | bytes | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Bytes:
    """`read_image`, as the network takes it: (3, 32, 32)."""
    return fit(read_image(source, name=name, max_pixels=max_pixels, formats=formats))


def _open(
    stream: BinaryIO, name: str, max_pixels: int | None, formats: tuple[str, ...]
) -> Image.Image:
    """A Pillow image that is not decoded yet and not too large."""
    try:
        image = Image.open(stream, formats=formats)
    except Image.DecompressionBombError:  # more than twice Pillow's bound
        stream.seek(0)
        if max_pixels is not None or stream.read(2) != b"\xff\xd8":
            raise _too_large(name, "too many", max_pixels) from None
        stream.seek(0)
        image = JpegImagePlugin.JpegImageFile(stream)
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    pixels = image.width * image.height
    if limit and pixels > limit:
        is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
        if max_pixels is not None or not is_jpeg or pixels > _REDUCED * limit:
            image.close()
            raise _too_large(name, f"{image.width:,} x {image.height:,}", max_pixels)
        image.draft(None, (image.width // 8, image.height // 8))
    return image


def _too_large(name: str, size: str, max_pixels: int | None) -> ImageError:
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    way = "" if max_pixels else ", or allow more (predict --max-pixels, PIL.Image.MAX_IMAGE_PIXELS)"
    return ImageError(
        f"{name} has {size} pixels, more than the {limit:,} allowed: make it smaller{way}; it may "
        "be a decompression bomb"
    )


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


@contextlib.contextmanager
def reading(name: str, formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
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
            reason = f"it is not an image in a format accepted here ({', '.join(formats)})"
        raise ImageError(f"cannot read {name}: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """Any Pillow image as it is meant to be seen, in RGB at its own size.

    Takes the first frame of an animation, turns it upright by its EXIF orientation and lays
    transparent images on white (what lies under transparent pixels is noise nobody saw). Greys
    deeper than a byte are scaled as `_deep_grey` says. Raises what Pillow raises.
    """
    image.seek(0)
    image.load()  # first: getexif() of a PNG decodes it, and damaged EXIF is passed over
    image = _turned(image)
    if _is_deep(image):
        image = _deep_grey(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    """A decoded image turned as its EXIF says; as it is where that cannot be read."""
    try:
        if exif_excess(image.info.get("exif", b"")):
            return image
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF makes Pillow raise whatever it trips over
        pass
    return image


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Greys of more than a byte, scaled to a byte; values beyond the range are cut off.

    Floats are taken as 0..1 if none is above 1, else as 0..255. 16-bit integers span what a TIFF's
    tags say (MaxSampleValue, BitsPerSample), else 0..65535. No file uses the whole range of 32-bit
    integers: they are taken as 0..255 if none is above 255, else as 0..65535.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are not finite numbers")
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray(np.rint(values * np.float32(scale)).clip(0, 255).astype(np.uint8))
    top = 65535
    if image.mode == "I":
        # Pillow has scaled those of a PPM to 16 bits.
        top = 255 if values.max() <= 255 and image.format != "PPM" else top
    else:
        tags = getattr(image, "tag_v2", {})
        [bits, *_] = tags.get(_BITS_PER_SAMPLE, (16,))
        [most, *_] = tags.get(_MAX_SAMPLE_VALUE, (2**bits - 1,))
        top = most if 255 <= most <= top else top
    grey = values.astype(np.int32).clip(0, top)
    return Image.fromarray(((grey * 255 + top // 2) // top).astype(np.uint8))


def to_32x32(image: Image.Image) -> Bytes:
    """Any Pillow image as (32, 32, 3) uint8 RGB; one that is 32x32 RGB comes back bit for bit.

    `upright`, then cropped to the central square and resized with antialiasing. Raises what
    Pillow raises.
    """
    return _central_square(upright(image))


def prepare(image: Image.Image) -> Bytes:
    """`to_32x32` as the network takes it: (3, 32, 32)."""
    return fit(upright(image))


def fit(image: Image.Image) -> Bytes:
    """An upright RGB image, as `read_image` gives it, as the network takes it: (3, 32, 32)."""
    return np.ascontiguousarray(_central_square(image).transpose(2, 0, 1))


def _central_square(image: Image.Image) -> Bytes:
    fitted = ImageOps.fit(image, (SIZE, SIZE), method=Image.Resampling.BICUBIC)
    return np.array(fitted, dtype=np.uint8)


def overlay(image: Image.Image, evidence: Floats) -> Image.Image:
    """A class activation map over the picture that it is about, at the picture's own size.

    Args:
        image: the picture, upright and RGB as `read_image` gives it; what the network did not see
            of it, outside the central square, is darkened.
        evidence: (H, W), the map of that square; only what speaks for the class is shown, in
            shares of its largest value.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    peak = float(evidence.max())
    share = np.maximum(evidence, 0) / peak if peak > 0 else np.zeros_like(evidence)
    square = Image.fromarray(share.astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    strength = np.rint(np.asarray(square).clip(0, 1) * 255).astype(np.uint8)
    result = Image.blend(image, Image.new("RGB", image.size), 0.6)
    seen = image.crop((left, top, left + side, top + side)).convert("RGBA")
    heat = Image.fromarray(_HEAT[strength])
    result.paste(Image.alpha_composite(seen, heat).convert("RGB"), (left, top))
    return result
