"""Common corruptions of 32x32 images, from Hendrycks & Dietterich 2019 (CIFAR-10-C).

Of the benchmark's nineteen corruptions, this module implements the ten that require only arithmetic
and Pillow. The severities match those of CIFAR-10-C. The images are not identical to those in
CIFAR-10-C, but the accuracies are similar. Results are reproducible for a given seed.
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

# Takes images (N, 3, H, W) in [0, 1], a severity and a generator, and returns corrupted images.
Corruption = Callable[[Tensor, int, torch.Generator], Tensor]


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise with a constant standard deviation, like electronic noise."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return x + scale * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Add shot noise (Poisson noise in photon counts), as in photos taken in low light."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Add salt-and-pepper noise, independently to each channel."""
    fraction = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    corrupted = torch.rand(x.shape, generator=generator) < fraction
    salt = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(corrupted, salt.float(), x)


def speckle_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise whose standard deviation is proportional to the brightness."""
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return x + scale * x * torch.randn(x.shape, generator=generator)


def gaussian_blur(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Blur with a Gaussian kernel, as if the camera were out of focus."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[..., None, :], groups=3), kernel[..., None], groups=3)


def brightness(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Increase the value channel in HSV without changing the hue and saturation."""
    increase = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + increase).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-9), brighter)


def saturate(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Scale the saturation in HSV and add an offset. Gray pixels have hue 0 and turn red."""
    factor, increase = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    value, minimum = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    saturation = (value - minimum) / value.clamp(min=1e-9)
    new_saturation = (factor * saturation + increase).clamp(0, 1)
    colored = value - (value - x) * new_saturation / saturation.clamp(min=1e-9)
    red = torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    return torch.where(saturation > 0, colored, value * (1 - new_saturation * red))


def contrast(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Lower the contrast: move each value toward the mean of its channel in the image."""
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = x.mean(dim=(2, 3), keepdim=True)
    return means + factor * (x - means)


def pixelate(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Downsample and upsample with box filters."""
    scale = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]

    def resample(image: Image.Image) -> Image.Image:
        small = (int(image.width * scale), int(image.height * scale))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _map_images(x, resample)


def jpeg(x: Tensor, severity: int, _: torch.Generator) -> Tensor:
    """Compress with JPEG at low quality."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _map_images(x, compress)


def _map_images(x: Tensor, transform: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Convert each image to a Pillow image, apply `transform`, and convert the result back."""
    arrays = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    transformed = np.stack([np.asarray(transform(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(transformed).permute(0, 3, 1, 2).float() / 255


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
    """Return corrupted copies of images. The result depends only on the arguments.

    Args:
        images: uint8 images (N, 3, H, W), on the CPU.
        name: a key of CORRUPTIONS.
        severity: 1 to 5.
        seed: seed for the noise.

    Returns:
        Corrupted uint8 images (N, 3, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    out = CORRUPTIONS[name](images.float() / 255, severity, generator)
    # Like the benchmark's script, truncate instead of rounding. The offset prevents rounding errors
    # from turning an exact integer into the next smaller integer.
    return (out.clamp(0, 1) * 255 + 1e-3).floor().to(torch.uint8)


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return at most `count` evenly spaced indices below `total`."""
    count = min(count, total)
    return torch.tensor([math.floor(i * total / count) for i in range(count)])
