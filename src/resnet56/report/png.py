"""Encode data set images as PNG files."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def encode(image: npt.NDArray[Any], zoom: int = 1) -> bytes:
    """Encode a uint8 image (3, H, W) as PNG, with pixels enlarged to squares of side `zoom`."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0), dtype=np.uint8)
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def encode_grid(images: npt.NDArray[Any], zoom: int = 3, space: int = 2) -> bytes:
    """Encode uint8 images (rows, columns, 3, H, W) as one PNG with a white background."""
    rows, columns, _, height, width = images.shape
    size = rows * (height + space) - space, columns * (width + space) - space
    canvas = np.full((3, *size), 255, np.uint8)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + space), column * (width + space)
        canvas[:, top : top + height, left : left + width] = images[row, column]
    return encode(canvas, zoom)
