"""Read image files as 32x32 RGB arrays, and overlay class activation maps.

Files are untrusted. For every damaged or malicious file, the functions raise an `ImageError` with a
one-line message. This module requires only NumPy and Pillow, because models exported to ONNX run
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

from resnet56.data.image_headers import exif_overlaps, find_exceeded_limit
from resnet56.errors import ImageError, either, escape, one_line

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


def _has_avif() -> bool:
    """Return whether Pillow supports AVIF. Some builds of Pillow 11.3 and later support it."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return bool(AvifImagePlugin.SUPPORTED)


SIZE = 32  # height and width of the model's input
# Formats that browsers display, and all formats that this package accepts. Pillow detects formats
# by content, so without this restriction, a ".png" file could start Ghostscript.
BROWSER_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", *(["AVIF"] if _has_avif() else []))
FORMATS = (*BROWSER_FORMATS, "TIFF", "PPM")
# JPEGs that exceed Pillow's pixel limit by at most this factor are decoded at 1/8 scale. For
# progressive JPEGs, libjpeg still keeps all coefficients in memory, which takes at most 6 bytes per
# pixel.
_REDUCED_LIMIT = 4
_MAX_SAMPLE_VALUE, _BITS_PER_SAMPLE = 281, 258  # TIFF tags
_DARK = 15  # a high-bit-depth image causes a warning if all its pixels are at most this value

# RGBA colors of class activation maps, from zero (transparent) to the maximum.
# fmt: off
_COLORS = np.array([(20, 0, 80, 0), (120, 30, 140, 90), (220, 70, 70, 140), (255, 160, 30, 165),
                     (255, 245, 90, 180)])
# fmt: on
_COLORMAP = np.stack([np.interp(np.linspace(0, 4, 256), range(5), c) for c in _COLORS.T], axis=-1)
_COLORMAP = np.rint(_COLORMAP).astype(np.uint8)  # (256, 4)


class _IgnoreWarnings:
    """A thread-safe version of `warnings.catch_warnings` that ignores all warnings.

    All threads share the warning filters. If each thread saved and restored the filters, a thread
    could restore the filters of another thread. Instead, the first thread to enter sets the
    filters, and the last thread to leave restores the previous filters.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = 0
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        """Ignore warnings, such as Pillow's warnings about unusual metadata."""
        with self.lock:
            if self.active == 0:
                self.stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self.active += 1

    def __exit__(self, *_: object) -> None:
        """Restore the filters if this is the last active thread."""
        with self.lock:
            self.active -= 1
            if self.active == 0:
                self.stack.close()


_ignore_warnings = _IgnoreWarnings()


def read_image(
    source: Path | bytes | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """Read an image file as an upright RGB image. This function is thread-safe.

    Args:
        source: an image file. The format is detected from the content.
        name: name of the image for error messages. The default is its path.
        max_pixels: maximum number of pixels. The default is Pillow's limit of 89 million (see
            `PIL.Image.MAX_IMAGE_PIXELS`). With the default, JPEGs with up to four times as many
            pixels are decoded at 1/8 scale.
        formats: accepted formats, by their names in Pillow.

    Raises:
        ImageError: the image is broken, truncated, too large or not in an accepted format.
    """
    name = name or (escape(str(source)) if isinstance(source, Path) else "the image")
    with image_errors(name, formats), _ignore_warnings, _open_stream(source) as stream:
        if problem := find_exceeded_limit(stream):
            raise ImageError(f"{name} {problem}; save it again")
        with _open(stream, name, max_pixels, formats) as image:
            result = to_upright_rgb(image)
            if _is_high_bit_depth(image) and np.asarray(result).max() <= _DARK:
                log.warning(
                    "%s is nearly black; check that its values use the full range of their type",
                    name,
                )
            return result


def read_pixels(
    source: Path | bytes | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> UInt8Array:
    """Read an image file as a uint8 model input (3, 32, 32). See `read_image` for the arguments."""
    return to_model_input(read_image(source, name=name, max_pixels=max_pixels, formats=formats))


def _open(
    stream: BinaryIO, name: str, max_pixels: int | None, formats: tuple[str, ...]
) -> Image.Image:
    """Open an image without decoding it. Raises ImageError if the image is too large."""
    try:
        image = Image.open(stream, formats=formats)
    except Image.DecompressionBombError:  # more than twice Pillow's limit
        stream.seek(0)
        if max_pixels is not None or stream.read(2) != b"\xff\xd8":
            raise _too_large(name, "too many", max_pixels) from None
        stream.seek(0)
        image = JpegImagePlugin.JpegImageFile(stream)
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    pixels = image.width * image.height
    if limit and pixels > limit:
        is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
        if max_pixels is not None or not is_jpeg or pixels > _REDUCED_LIMIT * limit:
            image.close()
            raise _too_large(name, f"{image.width:,} x {image.height:,}", max_pixels)
        image.draft(None, (image.width // 8, image.height // 8))
    return image


def _too_large(name: str, size: str, max_pixels: int | None) -> ImageError:
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    remedy = "use a smaller image"
    if not max_pixels:
        limits = either("PIL.Image.MAX_IMAGE_PIXELS", "--max-pixels of resnet56 predict")
        remedy += f" or raise the limit, {limits}"
    return ImageError(
        f"{name} has {size} pixels, more than the {limit:,} allowed, and may be a decompression "
        f"bomb; {remedy}"
    )


@contextlib.contextmanager
def _open_stream(source: Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    """Open `source` as a seekable stream. If `source` is a stream, it stays open."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    elif isinstance(source, bytes):
        yield io.BytesIO(source)
    else:
        yield source if source.seekable() else io.BytesIO(source.read())


@contextlib.contextmanager
def image_errors(name: str, formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    """Convert any exception in the block, except MemoryError, to an ImageError about `name`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders can raise any exception
        reason = one_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif "cannot identify image file" in reason:  # this message contains a memory address
            reason = f"it is not an image in a supported format ({', '.join(formats)})"
        raise ImageError(f"cannot read {name}: {reason}") from error


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to an upright RGB image of the same resolution.

    The function uses the first frame of an animation and applies the EXIF orientation. It
    composites transparent images onto white, because the colors of transparent pixels are
    arbitrary. It scales grayscale images with more than 8 bits (see `_to_8_bit`). It can raise any
    exception that Pillow raises.
    """
    image.seek(0)
    image.load()  # decode before `getexif`, because errors from `getexif` are ignored
    image = _apply_orientation(image)
    if _is_high_bit_depth(image):
        image = _to_8_bit(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a decoded image. Ignore damaged EXIF data."""
    try:
        if exif_overlaps(image.info.get("exif", b"")):
            return image
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # Pillow can raise any exception for damaged EXIF data
        pass
    return image


def _is_high_bit_depth(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a grayscale image to 8 bits, and clip values outside the range.

    The range depends on the type of the values:

    - Floats: 0..1 if no value is above 1, and 0..255 otherwise.
    - 16-bit integers: from the TIFF tags MaxSampleValue and BitsPerSample, or 0..65535 without
      them.
    - 32-bit integers: 0..255 if no value is above 255, and 0..65535 otherwise, because 32-bit
      files rarely use all 32 bits.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ValueError("some pixels are not finite")
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray(np.rint(values * np.float32(scale)).clip(0, 255).astype(np.uint8))
    maximum = 65535
    if image.mode == "I":
        # Pillow scales the values of a PPM to 16 bits.
        maximum = 255 if values.max() <= 255 and image.format != "PPM" else maximum
    else:
        tags = getattr(image, "tag_v2", {})
        [bits, *_] = tags.get(_BITS_PER_SAMPLE, (16,))
        [sample_max, *_] = tags.get(_MAX_SAMPLE_VALUE, (2**bits - 1,))
        maximum = sample_max if 255 <= sample_max <= maximum else maximum
    gray = values.astype(np.int32).clip(0, maximum)
    return Image.fromarray(((gray * 255 + maximum // 2) // maximum).astype(np.uint8))


def to_model_input(image: Image.Image) -> UInt8Array:
    """Convert an upright RGB image from `read_image` to a uint8 model input (3, 32, 32).

    The function crops the image to the center square and resizes this square with antialiasing. A
    32x32 image does not change.
    """
    resized = ImageOps.fit(image, (SIZE, SIZE), method=Image.Resampling.BICUBIC)
    return np.array(resized, dtype=np.uint8).transpose(2, 0, 1).copy()


def overlay(image: Image.Image, class_map: FloatArray) -> Image.Image:
    """Overlay a class activation map on its image, at the resolution of the image.

    Args:
        image: upright RGB image from `read_image`. The function darkens the area outside the
            center square, which is not part of the model's input.
        class_map: (H, W), the map of the center square. Positive values are divided by the
            maximum. Other values are transparent.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    peak = float(class_map.max())
    normalized = np.maximum(class_map, 0) / peak if peak > 0 else np.zeros_like(class_map)
    resized = Image.fromarray(normalized.astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    strength = np.rint(np.asarray(resized).clip(0, 1) * 255).astype(np.uint8)
    result = Image.blend(image, Image.new("RGB", image.size), 0.6)
    square = image.crop((left, top, left + side, top + side)).convert("RGBA")
    colored = Image.fromarray(_COLORMAP[strength])
    result.paste(Image.alpha_composite(square, colored).convert("RGB"), (left, top))
    return result
