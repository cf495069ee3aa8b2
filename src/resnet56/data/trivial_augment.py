"""TrivialAugment: one change of place or colour for each image, of random kind and strength.

After Müller & Hutter 2021 (arXiv:2103.10158), in their wide space of fourteen changes, which are
Pillow's. They are computed on bytes, for many images at once, on any device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 30  # a change is as strong as -30 to 30 thirtieths of its range

# (N, 3, H, W) uint8 and strengths (N,) from -1 to 1 -> (N, 3, H, W) uint8
Change = Callable[[Tensor, Tensor], Tensor]


def trivial_augment(images: Tensor, changes: Tensor, levels: Tensor) -> Tensor:
    """Change each image in its own way.

    Args:
        images: (N, 3, H, W) uint8.
        changes: (N,) int64, indices into CHANGES; on the CPU, so that no device is waited for.
        levels: (N,) int64 from -LEVELS to LEVELS, on the images' device.

    Returns:
        (N, 3, H, W) uint8, a copy.
    """
    changed = images.clone()
    for number, change in enumerate(CHANGES.values()):
        index = (changes == number).nonzero().flatten().to(images.device)
        if len(index):
            changed[index] = change(images[index], levels[index] / LEVELS)
    return changed


def _identity(images: Tensor, _: Tensor) -> Tensor:
    return images


# Place. What comes in from outside is black; the nearest pixel is taken.


def _shear_x(images: Tensor, strengths: Tensor) -> Tensor:
    return _moved(images, (1, 0.99 * strengths, 0), (0, 1, 0))


def _shear_y(images: Tensor, strengths: Tensor) -> Tensor:
    return _moved(images, (1, 0, 0), (0.99 * strengths, 1, 0))


def _translate_x(images: Tensor, strengths: Tensor) -> Tensor:
    return _moved(images, (1, 0, (32 * strengths).trunc()), (0, 1, 0))


def _translate_y(images: Tensor, strengths: Tensor) -> Tensor:
    return _moved(images, (1, 0, 0), (0, 1, (32 * strengths).trunc()))


def _rotate(images: Tensor, strengths: Tensor) -> Tensor:
    """About the centre, by 135 degrees at most."""
    angles = math.radians(135) * strengths
    cos, sin = angles.cos(), angles.sin()
    _, _, height, width = images.shape
    x, y = width / 2, height / 2
    return _moved(images, (cos, sin, x - x * cos - y * sin), (-sin, cos, y + x * sin - y * cos))


Row = tuple[Tensor | float, Tensor | float, Tensor | float]


def _moved(images: Tensor, across: Row, down: Row) -> Tensor:
    """Where each pixel comes from: the rows of an affine map of x, y and 1, in pixels."""
    count, _, height, width = images.shape
    # A pixel's middle is half a pixel from its corner.
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5

    def source(row: Row, size: int) -> tuple[Tensor, Tensor]:
        a, b, c = (p[:, None, None] if isinstance(p, Tensor) else p for p in row)
        place = (a * x + b * y + c).floor().long().expand(count, height, width)
        return place.clamp(0, size - 1), (place >= 0) & (place < size)

    (cols, in_cols), (rows, in_rows) = source(across, width), source(down, height)
    each = torch.arange(count, device=images.device)[:, None, None]
    found = images.permute(0, 2, 3, 1)[each, rows, cols].permute(0, 3, 1, 2)
    return torch.where((in_rows & in_cols)[:, None], found, 0)


# Colour, by mixing with an image that has lost something; beyond 1 there is more of it.


def _brightness(images: Tensor, strengths: Tensor) -> Tensor:
    return _blended(torch.zeros((), device=images.device), images, strengths)


def _color(images: Tensor, strengths: Tensor) -> Tensor:
    return _blended(_grey(images), images, strengths)


def _contrast(images: Tensor, strengths: Tensor) -> Tensor:
    mean = _grey(images).float().mean(dim=(1, 2, 3), keepdim=True)
    return _blended((mean + 0.5).floor(), images, strengths)


def _sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    """The lost image is blurred, but for its border."""
    exact = images.float()
    blurred = exact.clone()
    # A pixel counts five times beside its eight neighbours.
    around = F.avg_pool2d(exact, 3, stride=1, divisor_override=1) + 4 * exact[..., 1:-1, 1:-1]
    blurred[..., 1:-1, 1:-1] = (around / 13 + 0.5).floor()
    return _blended(blurred, images, strengths)


def _grey(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 1, H, W) int: ITU-R 601's luma in units of 1 / 65536, rounded."""
    red, green, blue = images.int().split(1, dim=1)
    return torch.bitwise_right_shift(19595 * red + 38470 * green + 7471 * blue + 0x8000, 16)


def _blended(lost: Tensor, images: Tensor, strengths: Tensor) -> Tensor:
    factors = 1 + 0.99 * strengths[:, None, None, None]
    return (lost + factors * (images - lost.float())).clamp(0, 255).byte()


# Colour, by a function of each value; the sign of the strength means nothing.


def _posterize(images: Tensor, strengths: Tensor) -> Tensor:
    """Keep the upper bits: all eight to two."""
    lost = (6 * strengths.abs()).round().byte()  # a half to the even neighbour
    return (images >> lost[:, None, None, None]) << lost[:, None, None, None]


def _solarize(images: Tensor, strengths: Tensor) -> Tensor:
    """Invert what is at or above a threshold."""
    threshold = 256 - (256 * strengths.abs()).trunc()[:, None, None, None]
    return torch.where(images < threshold, images, 255 - images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to all of 0 to 255."""
    values = images.int()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    stretched = 255 * (values - low) // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.byte(), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Make each channel's values about equally frequent."""
    values = images.flatten(2).long()
    ones = torch.ones_like(values)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, ones)
    # The brightest value's pixels do not count towards the step between neighbours.
    brightest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    before = counts.cumsum(dim=2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255).byte()
    equal = table.gather(2, values).view_as(images)
    return torch.where(step[..., None] > 0, equal, images)


CHANGES: dict[str, Change] = {
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
