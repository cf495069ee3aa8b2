"""TrivialAugment: apply one random transform of random magnitude to each image.

The method is from Müller & Hutter 2021 (arXiv:2103.10158). This module implements the wide
augmentation space of 14 transforms, for batches on any device. The results are identical to
Pillow's results.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 30  # levels are integers from -30 to 30, and magnitudes are levels / 30

# Takes uint8 images (N, 3, H, W) and magnitudes (N,) from -1 to 1, and returns transformed images.
Transform = Callable[[Tensor, Tensor], Tensor]


def trivial_augment(images: Tensor, transforms: Tensor, levels: Tensor) -> Tensor:
    """Apply a transform to each image.

    Args:
        images: uint8 images (N, 3, H, W).
        transforms: int64 indices (N,) into TRANSFORMS, on the CPU to avoid synchronization.
        levels: int64 levels (N,) from -LEVELS to LEVELS, on the device of the images.

    Returns:
        A copy of the images, with dtype uint8 and shape (N, 3, H, W).
    """
    result = images.clone()
    for number, transform in enumerate(TRANSFORMS.values()):
        index = (transforms == number).nonzero().flatten().to(images.device)
        if len(index):
            result[index] = transform(images[index], levels[index] / LEVELS)
    return result


def _identity(images: Tensor, _: Tensor) -> Tensor:
    return images


# Geometric transforms use nearest-neighbor sampling. Pixels outside the image are black.


def _shear_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _affine(images, (1, 0.99 * magnitudes, 0), (0, 1, 0))


def _shear_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _affine(images, (1, 0, 0), (0.99 * magnitudes, 1, 0))


def _translate_x(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _affine(images, (1, 0, (32 * magnitudes).trunc()), (0, 1, 0))


def _translate_y(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _affine(images, (1, 0, 0), (0, 1, (32 * magnitudes).trunc()))


def _rotate(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Rotate around the center by at most 135 degrees."""
    angles = math.radians(135) * magnitudes
    cos, sin = angles.cos(), angles.sin()
    _, _, height, width = images.shape
    x, y = width / 2, height / 2
    return _affine(images, (cos, sin, x - x * cos - y * sin), (-sin, cos, y + x * sin - y * cos))


Row = tuple[Tensor | float, Tensor | float, Tensor | float]


def _affine(images: Tensor, x_row: Row, y_row: Row) -> Tensor:
    """Sample output pixel (x, y) at input position (x_row @ (x, y, 1), y_row @ (x, y, 1))."""
    count, _, height, width = images.shape
    # These are the coordinates of the pixel centers.
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5

    def source(row: Row, size: int) -> tuple[Tensor, Tensor]:
        a, b, c = (p[:, None, None] if isinstance(p, Tensor) else p for p in row)
        position = (a * x + b * y + c).floor().long().expand(count, height, width)
        return position.clamp(0, size - 1), (position >= 0) & (position < size)

    (cols, in_cols), (rows, in_rows) = source(x_row, width), source(y_row, height)
    index = torch.arange(count, device=images.device)[:, None, None]
    sampled = images.permute(0, 2, 3, 1)[index, rows, cols].permute(0, 3, 1, 2)
    return torch.where((in_rows & in_cols)[:, None], sampled, 0)


# These color transforms interpolate between a degenerate image and the original, or extrapolate.


def _brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _blend(torch.zeros((), device=images.device), images, magnitudes)


def _color(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _blend(_gray(images), images, magnitudes)


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    mean = _gray(images).float().mean(dim=(1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor(), images, magnitudes)


def _sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend each image with a blurred copy whose border is not blurred."""
    floats = images.float()
    blurred = floats.clone()
    # Each pixel has weight 5, and each of its eight neighbors has weight 1.
    total = F.avg_pool2d(floats, 3, stride=1, divisor_override=1) + 4 * floats[..., 1:-1, 1:-1]
    blurred[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(blurred, images, magnitudes)


def _gray(images: Tensor) -> Tensor:
    """Compute the rounded luma (ITU-R BT.601) in fixed point: (N, 3, H, W) -> (N, 1, H, W) int."""
    red, green, blue = images.int().split(1, dim=1)
    return torch.bitwise_right_shift(19595 * red + 38470 * green + 7471 * blue + 0x8000, 16)


def _blend(degenerate: Tensor, images: Tensor, magnitudes: Tensor) -> Tensor:
    factors = 1 + 0.99 * magnitudes[:, None, None, None]
    return (degenerate + factors * (images - degenerate.float())).clamp(0, 255).byte()


# These color transforms change each value separately. The sign of the magnitude has no effect.


def _posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Keep the two to eight most significant bits, depending on the magnitude."""
    dropped = (6 * magnitudes.abs()).round().byte()
    return (images >> dropped[:, None, None, None]) << dropped[:, None, None, None]


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Invert the values at or above a threshold."""
    threshold = 256 - (256 * magnitudes.abs()).trunc()[:, None, None, None]
    return torch.where(images < threshold, images, 255 - images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the range 0 to 255."""
    values = images.int()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    stretched = 255 * (values - low) // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.byte(), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Equalize the histogram of each channel."""
    values = images.flatten(2).long()
    ones = torch.ones_like(values)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, ones)
    # As in Pillow, `step` excludes the pixels with the largest value.
    largest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - largest) // 255
    before = counts.cumsum(dim=2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255).byte()
    equal = table.gather(2, values).view_as(images)
    return torch.where(step[..., None] > 0, equal, images)


TRANSFORMS: dict[str, Transform] = {
    "identity": _identity,
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
