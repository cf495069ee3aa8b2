"""Small files that would take a decoder minutes or gigabytes are rejected based on the header."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hostile_images import HOSTILE, overlapping_exif, png_chunk
from PIL import Image

from resnet56.data.image_headers import exif_overlaps, find_exceeded_limit
from resnet56.data.images import read_image
from resnet56.errors import ImageError


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_exceed_a_limit_are_not_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("a decoder was called")

    monkeypatch.setattr(Image, "open", decode)
    with pytest.raises(ImageError, match="^it (is|has) .*; save it again$"):
        read_image(HOSTILE[name](), name="it")


def gif_with_many_comments() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (9, 9)).save(stream, "GIF", comment=b"comment " * 20_000)
    return stream.getvalue()


def saved(mode: str, size: tuple[int, int], format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: saved("RGB", (300, 900), "TIFF", tiffinfo={278: 1}), id="strips"),
        pytest.param(lambda: saved("RGB", (900, 900), "TIFF", big_tiff=True), id="BigTIFF"),
        pytest.param(lambda: saved("RGB", (99, 9), "JPEG", icc_profile=bytes(9**6)), id="profile"),
        pytest.param(lambda: saved("RGB", (99, 9), "JPEG", comment=b"x" * 60_000), id="comment"),
        pytest.param(lambda: saved("RGB", (999, 999), "PNG", compress_level=0), id="chunks"),
        pytest.param(gif_with_many_comments, id="GIF"),
        pytest.param(lambda: b"P3 # one\n# two\n2 1 #\n255\n1 2 3 # four\n4 5 6\n", id="PPM"),
        pytest.param(lambda: b"P4 800 800\n" + b"#" * 80_000, id="PBM"),
    ],
)
def test_ordinary_files_are_read(content: Callable[[], bytes]) -> None:
    assert read_image(content())


def test_truncated_headers_do_not_raise() -> None:
    """The decoder reports invalid headers."""
    for make in HOSTILE.values():
        content = make()[:3000]
        for length in range(0, len(content), 7):
            find_exceeded_limit(io.BytesIO(content[:length]))
            exif_overlaps(content[:length])


def test_overlapping_exif_data_are_ignored_or_rejected() -> None:
    exif = overlapping_exif(20_000)
    assert exif_overlaps(b"Exif\0\0" + exif)
    original = saved("RGB", (8, 8), "PNG")
    header = 8 + 12 + 13
    content = original[:header] + png_chunk(b"eXIf", exif) + original[header:]
    assert np.asarray(read_image(content)).max() == 0
    assert not exif_overlaps(b"")
    assert not exif_overlaps(Image.Exif().tobytes())
