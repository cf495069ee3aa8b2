"""Conversion of image files to 32x32 RGB, and errors about invalid files."""

import io
import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet56.data import images
from resnet56.data.images import (
    BROWSER_FORMATS,
    overlay,
    read_image,
    read_pixels,
    to_model_input,
    to_upright_rgb,
)
from resnet56.errors import ImageError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixel(image: Image.Image) -> list[int]:
    return to_model_input(to_upright_rgb(image))[:, 16, 16].tolist()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (40, 40), (200, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (40, 40), (7, 255)), [7, 7, 7]),
        (Image.new("L", (50, 40), 90), [90, 90, 90]),
        (Image.new("P", (9, 9), 0), [0, 0, 0]),
        (Image.new("1", (9, 9), 1), [255, 255, 255]),
        (Image.fromarray(np.full((40, 40), 257 * 99, np.uint16)), [99, 99, 99]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_is_read(image: Image.Image, expected: list[int]) -> None:
    assert pixel(read_image(encoded(image))) == expected


def test_the_first_frame_of_an_animation_is_used() -> None:
    red, blue = (Image.new("RGB", (34, 34), color) for color in ("red", "blue"))
    content = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert pixel(read_image(io.BytesIO(content))) == [255, 0, 0]


def test_the_exif_orientation_is_applied_once() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:4] = 255  # shown at the right, because of the orientation
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(pixels), "TIFF", exif=exif.tobytes())
    result = to_model_input(to_upright_rgb(read_image(content)))
    assert result[:, :, -4:].min() == 255
    assert result[:, :, :-4].max() == 0


@pytest.mark.parametrize("exif", [b"\0\x08\0\x02junk", b"II", b""], ids=repr)
def test_an_image_with_damaged_exif_is_read(exif: bytes) -> None:
    original = encoded(Image.new("RGB", (40, 40), (9, 8, 7)))
    header = 8 + 12 + 13  # length of the signature and the IHDR chunk
    content = original[:header] + png_chunk(b"eXIf", exif) + original[header:]
    assert pixel(read_image(content)) == [9, 8, 7]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(side: int) -> bytes:
    """Return a PNG with a header for `side` x `side` pixels and little data."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .*: it is not an image in a supported format"),
        (b"some text", "cannot read .*: it is not an image in a supported format"),
        (encoded(Image.effect_noise((90, 90), 50))[:2000], "cannot read .*truncated"),
        (huge_png(9_500), "9,500 x 9,500 pixels, more than the 89,478,485 allowed"),
        (huge_png(100_000), "decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot read"),
    ],
    ids=["empty", "text", "truncated", "large", "bomb", "postscript"],
)
def test_invalid_images_raise_one_line_errors(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.png"
    file.write_bytes(content)
    for source in (content, file):
        with pytest.raises(ImageError, match=message) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # the message contains no address of an object
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("suffix", ["PNG", "GIF", "TIFF", "JPEG", "WEBP", "BMP", "PPM"])
def test_images_that_pillow_rejects_are_rejected(suffix: str) -> None:
    """Decoder errors about flipped bits or a missing end are not ignored."""
    rng = random.Random(suffix)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    options = {"exif": b"Exif\0\0junk"} if suffix in ("PNG", "JPEG", "WEBP") else {}
    original = encoded(noise, suffix, **options)
    rejected = 0
    for _ in range(60):
        damaged = bytearray(original)
        damaged[rng.randrange(len(original) // 4, len(original))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(original) // 4, len(original)) :]
        try:
            with Image.open(io.BytesIO(damaged), formats=[suffix]) as image:
                image.load()
        except Exception:  # Pillow can raise anything
            rejected += 1
            with pytest.raises(ImageError):
                read_image(bytes(damaged))
    assert rejected >= 10


def test_a_damaged_png_is_rejected(tmp_path: Path) -> None:
    """getexif() decodes a PNG, so it can also raise errors about the image."""
    content = bytearray(encoded(Image.effect_noise((60, 60), 50).convert("RGB")))
    content[len(content) // 2] ^= 4
    with pytest.raises(ImageError, match="cannot read the image"):
        read_image(bytes(content))


def progressive() -> bytes:
    return encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)


def test_a_jpeg_with_many_scans_is_rejected(tmp_path: Path) -> None:
    content = progressive()
    assert read_image(content).size == (64, 64)
    scan = content[content.rindex(b"\xff\xda") : -2]
    many = content[:-2] + 100 * scan + content[-2:]
    (tmp_path / "it").write_bytes(many)
    for source in (many, tmp_path / "it", io.BytesIO(many)):
        with pytest.raises(ImageError, match="it is a JPEG with more than 100 scans"):
            read_image(source, name="it")
    junk = content[:-2] + 100 * (b"junk\xff\x00\xff\x01\xff\xff" + scan) + content[-2:]
    with pytest.raises(ImageError, match="it is a JPEG with more than 100 scans"):
        read_image(junk, name="it")  # decoders skip data between scans


def test_data_outside_the_image_are_not_counted_as_scans() -> None:
    """Phones append a short video to the image, and cameras prepend a thumbnail."""
    content, extra = progressive(), 200 * b"\xff\xda\x00\x08 film"
    segment = b"\xff\xe4" + (len(extra) + 2).to_bytes(2, "big") + extra
    expected = read_image(content).tobytes()
    assert read_image(content + extra).tobytes() == expected
    assert read_image(content[:2] + segment + content[2:]).tobytes() == expected


def test_large_jpegs_are_decoded_at_one_eighth_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.linear_gradient("L").resize((400, 320)).convert("RGB"), "JPEG")
    original = read_pixels(content)
    for limit, pillow_raises in ((100_000, False), (40_000, True)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if pillow_raises:
            with pytest.raises(Image.DecompressionBombError):
                Image.open(io.BytesIO(content))
        assert read_image(content).size == (50, 40)
        assert np.abs(read_pixels(content).astype(int) - original).max() <= 8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ImageError, match="more than the 50,000 allowed"):  # an explicit limit
        read_image(content, max_pixels=50_000)
    # The image has more than four times as many pixels.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(ImageError, match=r"more than the 30,000 allowed, .*MAX_IMAGE_PIXELS$"):
        read_image(content)


def test_formats_can_be_restricted() -> None:
    content = encoded(Image.new("RGB", (9, 9)), "TIFF")
    assert read_image(content).size == (9, 9)
    with pytest.raises(ImageError, match=r"not an image in a supported format \(PNG, JPEG"):
        read_image(content, formats=BROWSER_FORMATS)


@pytest.mark.parametrize("format", BROWSER_FORMATS)
def test_every_format_is_supported(format: str) -> None:
    content = encoded(Image.new("RGB", (40, 40), (200, 30, 90)), format)
    actual = pixel(read_image(content, formats=BROWSER_FORMATS))
    assert np.abs(np.array(actual) - [200, 30, 90]).max() <= 6


def ramp(dtype: str, top: float) -> Image.Image:
    values = np.linspace(0, top, 32 * 32).reshape(32, 32)
    return Image.fromarray(values.astype(dtype))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (ramp("float32", 1), {}),
        (ramp("float32", 255), {}),
        (ramp("int32", 255), {}),
        (ramp("int32", 65535), {}),
        (ramp("uint16", 65535), {}),
        (ramp("uint16", 4095), {"tiffinfo": {281: 4095}}),
    ],
    ids=["0..1", "0..255", "int32, 8 bits", "int32, 16 bits", "16 bits", "12 bits"],
)
def test_grayscale_of_any_range_keeps_its_brightness(
    image: Image.Image, options: dict[str, object]
) -> None:
    expected = np.rint(np.linspace(0, 255, 32 * 32)).reshape(32, 32)
    actual = read_pixels(encoded(image, "TIFF", **options)).astype(int)
    assert np.abs(actual - expected).max() <= 1


def test_nearly_black_images_cause_a_warning_and_nan_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_image(encoded(ramp("uint16", 3000), "TIFF"), name="deep.tif")
    assert caplog.messages == [
        "deep.tif is nearly black; check that its values use the full range of their type"
    ]
    read_image(encoded(ramp("uint16", 60_000), "TIFF"))
    assert len(caplog.messages) == 1
    values = np.zeros((9, 9), np.float32)
    values[3, 3] = np.nan
    with pytest.raises(ImageError, match="some pixels are not finite"):
        read_image(encoded(Image.fromarray(values), "TIFF"))


def test_upright_is_called_once_per_file(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    upright = images.to_upright_rgb
    monkeypatch.setattr(images, "to_upright_rgb", lambda image: calls.append(1) or upright(image))
    content = encoded(Image.new("RGB", (40, 40)))
    read_pixels(content)
    overlay(read_image(content), np.zeros((8, 8), np.float32))
    assert len(calls) == 2


def test_a_stream_without_seek_is_read() -> None:
    content = progressive()
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert read_image(stream).tobytes() == read_image(content).tobytes()


def test_a_lower_pixel_limit_and_a_missing_file_raise_image_errors(tmp_path: Path) -> None:
    content = encoded(Image.new("RGB", (20, 20)))
    assert read_image(content, max_pixels=400).size == (20, 20)
    with pytest.raises(ImageError, match="it has 20 x 20 pixels, more than the 399 allowed"):
        read_image(content, name="it", max_pixels=399)
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        read_image(tmp_path / "none.png")


def test_reading_in_threads_restores_the_warning_filters() -> None:
    content = encoded(Image.effect_noise((64, 64), 50))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read_image, [content] * 200))
    assert warnings.filters == before
    assert len({image.tobytes() for image in results}) == 1


def test_the_overlay_covers_the_central_square_and_darkens_the_rest() -> None:
    evidence = np.full((8, 8), -1.0, np.float32)
    evidence[:, 6:] = 2.0  # only the right quarter supports the class
    image = Image.new("RGB", (160, 80), (100, 100, 100))
    result = np.asarray(overlay(image, evidence)).astype(int)
    assert result.shape == (80, 160, 3)
    assert (result[:, :40] < 50).all()  # outside the square
    assert (result[:, 120:] < 50).all()
    assert (result[:, 45:80] == 100).all()  # inside the square, without evidence
    assert (result[5:75, 112:118, 0] > 180).all()
    without_evidence = np.asarray(overlay(image, np.full((8, 8), -1.0, np.float32)))
    assert (without_evidence[:, 40:120] == 100).all()
