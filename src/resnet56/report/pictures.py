"""Images of the data set as PNG files."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def png(image: npt.NDArray[Any], zoom: int = 1) -> bytes:
    """(3, H, W) uint8 -> a PNG file, each pixel `zoom` wide and high."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0), dtype=np.uint8)
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sheet(rows: npt.NDArray[Any], zoom: int = 3, space: int = 2) -> bytes:
    """(K, V, 3, H, W) uint8 -> one PNG with K rows of V images on white."""
    k, v, _, height, width = rows.shape
    page = np.full((3, k * (height + space) - space, v * (width + space) - space), 255, np.uint8)
    for i, j in np.ndindex(k, v):
        top, left = i * (height + space), j * (width + space)
        page[:, top : top + height, left : left + width] = rows[i, j]
    return png(page, zoom)
