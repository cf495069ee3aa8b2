"""Any picture in, 32x32 bytes out; whatever is wrong with one is one line."""

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
    prepare,
    read_image,
    read_pixels,
)
from resnet56.errors import ImageError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixel(image: Image.Image) -> list[int]:
    return prepare(image)[:, 16, 16].tolist()


@pytest.mark.parametrize(
    ("picture", "seen"),
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
def test_every_mode_is_read(picture: Image.Image, seen: list[int]) -> None:
    assert pixel(read_image(encoded(picture))) == seen


def test_the_first_frame_of_an_animation_is_taken() -> None:
    red, blue = (Image.new("RGB", (34, 34), colour) for colour in ("red", "blue"))
    content = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert pixel(read_image(io.BytesIO(content))) == [255, 0, 0]


def test_a_photo_taken_sideways_is_turned_once() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:4] = 255  # the top, in the file; the right, as it is seen
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(pixels), "TIFF", exif=exif.tobytes())
    seen = prepare(read_image(content))
    assert seen[:, :, -4:].min() == 255
    assert seen[:, :, :-4].max() == 0


@pytest.mark.parametrize("exif", [b"\0\x08\0\x02junk", b"II", b""], ids=repr)
def test_a_whole_picture_with_damaged_exif_is_read(exif: bytes) -> None:
    whole = encoded(Image.new("RGB", (40, 40), (9, 8, 7)))
    header = 8 + 12 + 13  # the signature, and IHDR
    content = whole[:header] + png_chunk(b"eXIf", exif) + whole[header:]
    assert pixel(read_image(content)) == [9, 8, 7]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(side: int) -> bytes:
    """A header that promises `side` x `side` pixels, and hardly any data."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot read .*: it is not an image in a format"),
        (b"some text", "cannot read .*: it is not an image in a format"),
        (encoded(Image.effect_noise((90, 90), 50))[:2000], "cannot read .*truncated"),
        (huge_png(9_500), "9,500 x 9,500 pixels, more than the 89,478,485 allowed"),
        (huge_png(100_000), "decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot read"),
    ],
    ids=["empty", "text", "truncated", "large", "bomb", "postscript"],
)
def test_what_is_no_whole_picture_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.png"
    file.write_bytes(content)
    for source in (content, file):
        with pytest.raises(ImageError, match=says) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # no object's address
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("suffix", ["PNG", "GIF", "TIFF", "JPEG", "WEBP", "BMP", "PPM"])
def test_what_plain_pillow_refuses_is_refused(suffix: str) -> None:
    """A flipped bit or a missing end: no decoder's error is passed over."""
    chance = random.Random(suffix)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    options = {"exif": b"Exif\0\0junk"} if suffix in ("PNG", "JPEG", "WEBP") else {}
    whole = encoded(noise, suffix, **options)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole) // 4, len(whole))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(whole) // 4, len(whole)) :]
        try:
            with Image.open(io.BytesIO(damaged), formats=[suffix]) as image:
                image.load()
        except Exception:  # Pillow raises whatever it trips over
            refused += 1
            with pytest.raises(ImageError):
                read_image(bytes(damaged))
    assert refused >= 10


def test_a_damaged_png_is_refused_like_any_other(tmp_path: Path) -> None:
    """Its getexif() decodes the pixels: that error is not one about EXIF."""
    content = bytearray(encoded(Image.effect_noise((60, 60), 50).convert("RGB")))
    content[len(content) // 2] ^= 4
    with pytest.raises(ImageError, match="cannot read the image"):
        read_image(bytes(content))


def progressive() -> bytes:
    return encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)


def test_a_jpeg_of_scans_without_end_is_refused(tmp_path: Path) -> None:
    content = progressive()
    assert read_image(content).size == (64, 64)
    scan = content[content.rindex(b"\xff\xda") : -2]
    many = content[:-2] + 100 * scan + content[-2:]
    (tmp_path / "it").write_bytes(many)
    for source in (many, tmp_path / "it", io.BytesIO(many)):
        with pytest.raises(ImageError, match="it is a JPEG of more than 100 scans"):
            read_image(source, name="it")
    junk = content[:-2] + 100 * (b"junk\xff\x00\xff\x01\xff\xff" + scan) + content[-2:]
    with pytest.raises(ImageError, match="it is a JPEG of more than 100 scans"):
        read_image(junk, name="it")  # decoders pass over what is between two scans


def test_what_is_no_scan_of_a_jpeg_does_not_count() -> None:
    """Phones put a short film behind the picture, cameras a thumbnail before it."""
    content, film = progressive(), 200 * b"\xff\xda\x00\x08 film"
    notes = b"\xff\xe4" + (len(film) + 2).to_bytes(2, "big") + film
    plain = read_image(content).tobytes()
    assert read_image(content + film).tobytes() == plain
    assert read_image(content[:2] + notes + content[2:]).tobytes() == plain


def test_a_jpeg_beyond_the_bound_is_decoded_at_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.linear_gradient("L").resize((400, 320)).convert("RGB"), "JPEG")
    whole = read_pixels(content)
    for bound, pillow_refuses in ((100_000, False), (40_000, True)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        if pillow_refuses:
            with pytest.raises(Image.DecompressionBombError):
                Image.open(io.BytesIO(content))
        assert read_image(content).size == (50, 40)
        assert np.abs(read_pixels(content).astype(int) - whole).max() <= 8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ImageError, match="more than the 50,000 allowed"):  # a bound of one's own
        read_image(content, max_pixels=50_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # more than four times as many
    with pytest.raises(ImageError, match=r"more than the 30,000 allowed: .*--max-pixels"):
        read_image(content)


def test_formats_can_be_limited() -> None:
    content = encoded(Image.new("RGB", (9, 9)), "TIFF")
    assert read_image(content).size == (9, 9)
    with pytest.raises(ImageError, match=r"not an image in a format accepted here \(PNG, JPEG"):
        read_image(content, formats=BROWSER_FORMATS)


@pytest.mark.parametrize("format", BROWSER_FORMATS)
def test_every_format_is_read(format: str) -> None:
    content = encoded(Image.new("RGB", (40, 40), (200, 30, 90)), format)
    seen = pixel(read_image(content, formats=BROWSER_FORMATS))
    assert np.abs(np.array(seen) - [200, 30, 90]).max() <= 6


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
    ids=["0..1", "0..255", "int32 of a byte", "int32 of 16 bits", "16 bits", "12 bits"],
)
def test_greys_of_any_scale_keep_their_brightness(
    image: Image.Image, options: dict[str, object]
) -> None:
    expected = np.rint(np.linspace(0, 255, 32 * 32)).reshape(32, 32)
    seen = read_pixels(encoded(image, "TIFF", **options)).astype(int)
    assert np.abs(seen - expected).max() <= 1


def test_greys_that_come_out_black_or_are_no_numbers_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_image(encoded(ramp("uint16", 3000), "TIFF"), name="deep.tif")
    assert caplog.messages == [
        "deep.tif is nearly black: do its values span the range of its type?"
    ]
    read_image(encoded(ramp("uint16", 60_000), "TIFF"))
    assert len(caplog.messages) == 1
    values = np.zeros((9, 9), np.float32)
    values[3, 3] = np.nan
    with pytest.raises(ImageError, match="some of its pixels are not finite numbers"):
        read_image(encoded(Image.fromarray(values), "TIFF"))


def test_a_file_is_turned_upright_once(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = []
    upright = images.upright
    monkeypatch.setattr(images, "upright", lambda image: turned.append(1) or upright(image))
    content = encoded(Image.new("RGB", (40, 40)))
    read_pixels(content)
    overlay(read_image(content), np.zeros((8, 8), np.float32))
    assert len(turned) == 2  # of two readings


def test_a_stream_that_cannot_go_back_is_read() -> None:
    content = progressive()
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert read_image(stream).tobytes() == read_image(content).tobytes()


def test_a_smaller_bound_can_be_set_and_a_missing_file_is_named(tmp_path: Path) -> None:
    content = encoded(Image.new("RGB", (20, 20)))
    assert read_image(content, max_pixels=400).size == (20, 20)
    with pytest.raises(ImageError, match="it has 20 x 20 pixels, more than the 399 allowed"):
        read_image(content, name="it", max_pixels=399)
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        read_image(tmp_path / "none.png")


def test_reading_in_threads_leaves_the_warning_filters_as_they_were() -> None:
    content = encoded(Image.effect_noise((64, 64), 50))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(read_image, [content] * 200))
    assert warnings.filters == before
    assert len({image.tobytes() for image in seen}) == 1


def test_the_map_lies_on_the_central_square_and_the_rest_is_darkened() -> None:
    evidence = np.full((8, 8), -1.0, np.float32)
    evidence[:, 6:] = 2.0  # the square's right quarter
    picture = Image.new("RGB", (160, 80), (100, 100, 100))
    result = np.asarray(overlay(picture, evidence)).astype(int)
    assert result.shape == (80, 160, 3)
    assert (result[:, :40] < 50).all()  # outside
    assert (result[:, 120:] < 50).all()
    assert (result[:, 45:80] == 100).all()  # seen, but no evidence
    assert (result[5:75, 112:118, 0] > 180).all()
    flat = np.asarray(overlay(picture, np.full((8, 8), -1.0, np.float32)))
    assert (flat[:, 40:120] == 100).all()
