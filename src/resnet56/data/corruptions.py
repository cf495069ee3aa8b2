"""Common corruptions of 32x32 images, after Hendrycks & Dietterich 2019 (CIFAR-10-C).

Ten of that benchmark's nineteen: those that need nothing but arithmetic and Pillow. The strengths
are those its authors used for CIFAR-10; the random numbers are drawn from a given seed, so results
repeat, and come close to CIFAR-10-C's without being its very images.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]  # (N, 3, H, W) in [0, 1] -> same


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Electronic noise: the same normal noise everywhere."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return x + scale * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Too little light: the counts of a Poisson process."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper, on each channel by itself."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit = torch.rand(x.shape, generator=generator) < share
    salt = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(hit, salt.float(), x)


def speckle_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Noise that grows with the brightness."""
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return x + scale * x * torch.randn(x.shape, generator=generator)


def gaussian_blur(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """A camera out of focus."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[..., None, :], groups=3), kernel[..., None], groups=3)


def brightness(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """More light: HSV's value is raised, hue and saturation stay."""
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + more).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-9), brighter)


def saturate(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """HSV's saturation is scaled and raised; a grey pixel, whose hue is 0, reddens."""
    factor, more = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    value, least = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    saturation = (value - least) / value.clamp(min=1e-9)
    wanted = (factor * saturation + more).clamp(0, 1)
    coloured = value - (value - x) * wanted / saturation.clamp(min=1e-9)
    red = torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    return torch.where(saturation > 0, coloured, value * (1 - wanted * red))


def contrast(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Every value moves towards its channel's mean over the image."""
    share = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = x.mean(dim=(2, 3), keepdim=True)
    return means + share * (x - means)


def pixelate(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Made smaller and larger again, with box filters."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]

    def through(image: Image.Image) -> Image.Image:
        small = (int(image.width * share), int(image.height * share))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _each(x, through)


def jpeg(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Saved as a JPEG of low quality."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def through(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(x, through)


def _each(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """`change` on each image, which Pillow wants as (H, W, 3) bytes."""
    arrays = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": gaussian_noise,
    "shot noise": shot_noise,
    "impulse noise": impulse_noise,
    "speckle noise": speckle_noise,
    "gaussian blur": gaussian_blur,
    "brightness": brightness,
    "saturate": saturate,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupted copies of images; a pure function of its arguments.

    Args:
        images: (N, 3, H, W) uint8, on the CPU.
        name: of CORRUPTIONS.
        severity: 1 to 5.
        seed: of the noise.

    Returns:
        (N, 3, H, W) uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    out = CORRUPTIONS[name](images.float() / 255, severity, generator)
    # Bytes are cut off, not rounded, as the benchmark's own script does; a hair is added so that
    # what is exactly a byte stays one.
    return (out.clamp(0, 1) * 255 + 1e-3).floor().to(torch.uint8)


def spread(total: int, count: int) -> Tensor:
    """Indices of `count` of `total` images, evenly spaced: a fixed sample without chance."""
    count = min(count, total)
    return torch.tensor([math.floor(i * total / count) for i in range(count)])
