"""Augment batches of images with random parameters that are sampled in advance.

`sample_params` samples the parameters for an epoch on the CPU. `augment` applies them to a batch on
any device. Batches are therefore the same on every device, in every process and after resuming.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet56.data.trivial_augment import LEVELS, TRANSFORMS, trivial_augment


@dataclass(frozen=True)
class Augmentation:
    """Settings for augmenting training images.

    Attributes:
        padding: number of black pixels to add to each side before a random 32x32 crop.
        flip: flip each image horizontally with probability 1/2.
        alternate_flip: flip each image in every other epoch instead of at random.
        cutout: side length of the square that Cutout erases, in pixels. 0 disables Cutout.
        trivial_augment: apply TrivialAugment.
        sizes: image sizes for the first epochs, in pixels. Later epochs use 32.
        mix: "cutmix", "mixup", "ricap" or "none".
        mix_alpha: parameter of the Beta(alpha, alpha) distribution of the mixing weights.
        mix_probability: probability that a batch is mixed.
        plain_tail_from: zero-based index of the first epoch that uses only crops and flips.
        function: replaces TrivialAugment, the crop, the flip and Cutout. It maps uint8 images
            (B, 3, 32, 32) to images of the same dtype and shape.
    """

    padding: int = 4
    flip: bool = True
    alternate_flip: bool = False
    cutout: int = 0
    trivial_augment: bool = False
    sizes: tuple[int, ...] = ()
    mix: str = "none"
    mix_alpha: float = 1.0
    mix_probability: float = 1.0
    plain_tail_from: int | None = None
    function: Callable[[Tensor], Tensor] | None = None

    def in_epoch(self, epoch: int) -> "Augmentation":
        """Return the settings for `epoch`, a zero-based index."""
        if self.plain_tail_from is None or epoch < self.plain_tail_from:
            return self
        return replace(self, cutout=0, trivial_augment=False, mix="none")

    def before_mixing(self) -> "Augmentation":
        """Return the settings for images that will be mixed.

        These settings disable Cutout, which would erase parts of the mixed image. For RICAP, they
        also disable the padding, because RICAP itself crops the images.
        """
        return replace(self, cutout=0, padding=0 if self.mix == "ricap" else self.padding)


CROP_AND_FLIP = Augmentation()


class AugmentationParams(NamedTuple):
    """Random augmentation parameters for N images."""

    rows: Tensor  # (N,) int64, top row of the crop in the padded image
    cols: Tensor  # (N,) int64, left column of the crop
    flips: Tensor  # (N,) bool
    centers: Tensor  # (N, 2) int64, center (row, column) of the Cutout square
    transforms: Tensor  # (N,) int64, index of the TrivialAugment transform
    levels: Tensor  # (N,) int64, level of the transform, from -LEVELS to LEVELS

    def to(self, device: torch.device) -> "AugmentationParams":
        """Return the parameters on `device`, except `transforms`, which remains on the CPU."""
        return AugmentationParams(*(numbers.to(device) for numbers in self))._replace(
            transforms=self.transforms
        )

    def select(self, index: slice | Tensor) -> "AugmentationParams":
        """Return the parameters for the images at `index`, a slice or an int64 CPU tensor."""
        return AugmentationParams(*(numbers[index] for numbers in self))


def sample_params(
    count: int, augmentation: Augmentation, generator: torch.Generator
) -> AugmentationParams:
    """Sample the parameters for `count` images.

    All (2 * padding + 1)**2 crops have the same probability. The final state of `generator` does
    not depend on which augmentations are enabled.
    """
    offsets = torch.randint(0, 2 * augmentation.padding + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator).bool() & augmentation.flip
    centers = torch.randint(0, 32, (count, 2), generator=generator)
    transforms = torch.randint(0, len(TRANSFORMS), (count,), generator=generator)
    magnitudes = torch.randint(0, LEVELS + 1, (count,), generator=generator)
    signs = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    return AugmentationParams(
        offsets[0], offsets[1], flips, centers, transforms, signs * magnitudes
    )


def crop_and_flip(images: Tensor, params: AugmentationParams, padding: int) -> Tensor:
    """Pad each image with black pixels, crop it, and flip the images that `params` selects.

    Args:
        images: (N, 3, H, W), any dtype.
        params: parameters for the N images.
        padding: number of black pixels on each side, as for `sample_params`. 0 disables the crop.

    Returns:
        Images (N, 3, H, W) of the same dtype, in channels-last memory format.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    shifted = int(padding > 0)
    rows = shifted * params.rows[:, None] + y
    cols = shifted * params.cols[:, None] + torch.where(params.flips[:, None], x.flip(0), x)
    index = torch.arange(count, device=images.device)[:, None, None]
    # Indexing with tensors on both sides of the channel dimension moves this dimension to the end.
    return padded[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize uint8 images (N, 3, H, W) to float32: subtract `mean` and divide by `std`.

    `mean` and `std` have shape (3,) and apply to pixels in [0, 1].
    """
    mean, std = 255 * mean[:, None, None], 255 * std[:, None, None]
    return (images.float() - mean) / std


def cutout(images: Tensor, centers: Tensor, side: int) -> Tensor:
    """Set a square in each normalized image to zero, the mean color (DeVries & Taylor 2017).

    The square is clipped at the edges of the image.

    Args:
        images: (N, 3, H, W), normalized.
        centers: (N, 2), row and column of the center of each square.
        side: side length of the square, in pixels.
    """
    _, _, height, width = images.shape
    top, left = (centers - side // 2).unbind(1)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    in_rows = (y >= top[:, None]) & (y < top[:, None] + side)
    in_cols = (x >= left[:, None]) & (x < left[:, None] + side)
    square = in_rows[:, None, :, None] & in_cols[:, None, None, :]
    return torch.where(square, 0.0, images)  # masked_fill does not preserve channels_last


def shrink(images: Tensor, side: int) -> Tensor:
    """Resize float32 images (N, 3, H, W) to (N, 3, side, side), with antialiasing.

    The interpolation is bilinear. Small images make early epochs faster (see Touvron et al. 2019 on
    training and test resolution).
    """
    if images.shape[-1] == side:
        return images
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor,
    params: AugmentationParams,
    mean: Tensor,
    std: Tensor,
    augmentation: Augmentation,
) -> Tensor:
    """Augment and normalize uint8 images (N, 3, 32, 32). Return float32.

    The steps are TrivialAugment, crop and flip, normalization, and Cutout. `augmentation.function`
    replaces all steps except normalization.
    """
    if augmentation.function is not None:
        images = augmentation.function(images).contiguous(memory_format=torch.channels_last)
        return normalize(images, mean, std)
    if augmentation.trivial_augment:
        images = trivial_augment(images, params.transforms, params.levels)
    images = normalize(crop_and_flip(images, params, augmentation.padding), mean, std)
    return cutout(images, params.centers, augmentation.cutout) if augmentation.cutout else images
