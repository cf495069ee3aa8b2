"""Augmentation: pure functions on batches, with every random number drawn beforehand.

`draw` makes one epoch's random numbers on the CPU, from a generator; `augment` applies them to
a batch on any device. So a batch is the same on every device, in every process, after a resume.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet56.data.trivial_augment import CHANGES, LEVELS, trivial_augment


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image before the network sees it."""

    padding: int = 4  # black pixels on each side before a random 32x32 crop
    flip: bool = True  # mirror half of the images
    alternate_flip: bool = False  # mirror each image in every other epoch, not at random
    cutout: int = 0  # side of the square that Cutout erases, in pixels; 0 for none
    trivial_augment: bool = False
    sizes: tuple[int, ...] = ()  # sides of the first epochs' images, in pixels; 32 afterwards
    mix: str = "none"  # how the images of a batch are mixed: a method of `data.mixing`
    mix_alpha: float = 1.0  # both parameters of the beta distribution of their shares
    mix_probability: float = 1.0  # of mixing a batch
    plain_from: int | None = None  # the epoch from which on there are only crops and flips

    def in_epoch(self, epoch: int) -> "Augmentation":
        """What is left of it in `epoch` (from 0)."""
        if self.plain_from is None or epoch < self.plain_from:
            return self
        return replace(self, cutout=0, trivial_augment=False, mix="none")

    def before_mixing(self) -> "Augmentation":
        """What happens to the images of a batch before they are mixed.

        Cutout would erase what mixing has just put there, and RICAP crops the images itself.
        """
        return replace(self, cutout=0, padding=0 if self.mix == "ricap" else self.padding)


PLAIN_CROPS = Augmentation()


class Draws(NamedTuple):
    """The random numbers of N images."""

    rows: Tensor  # (N,) int64, the crop's top row in the padded image
    cols: Tensor  # (N,) int64, its left column
    flips: Tensor  # (N,) bool
    centers: Tensor  # (N, 2) int64, the center (row, column) of the square that Cutout erases
    changes: Tensor  # (N,) int64, which change TrivialAugment makes
    levels: Tensor  # (N,) int64, how strong it is, with its sign

    def to(self, device: torch.device) -> "Draws":
        """The same numbers on `device`, except `changes`, which the CPU reads."""
        return Draws(*(column.to(device) for column in self))._replace(changes=self.changes)

    def part(self, index: slice | Tensor) -> "Draws":
        """The numbers of the images at `index`, a slice or int64 positions on the CPU."""
        return Draws(*(column[index] for column in self))


def draw(count: int, augmentation: Augmentation, generator: torch.Generator) -> Draws:
    """Random numbers for `count` images: all (2 * padding + 1)**2 crops are equally likely.

    Each draw consumes the same numbers of `generator` whichever augmentations are on.
    """
    offsets = torch.randint(0, 2 * augmentation.padding + 1, (2, count), generator=generator)
    mirrored = torch.randint(0, 2, (count,), generator=generator).bool() & augmentation.flip
    centers = torch.randint(0, 32, (count, 2), generator=generator)
    changes = torch.randint(0, len(CHANGES), (count,), generator=generator)
    strengths = torch.randint(0, LEVELS + 1, (count,), generator=generator)
    signs = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    return Draws(offsets[0], offsets[1], mirrored, centers, changes, signs * strengths)


def crop_and_flip(images: Tensor, draws: Draws, padding: int) -> Tensor:
    """Pad with black, cut each image at its own place, mirror those drawn.

    Args:
        images: (N, 3, H, W), any type.
        draws: the N images' random numbers.
        padding: black pixels on each side, as when `draws` was drawn; or 0, which leaves all
            images where they are.

    Returns:
        (N, 3, H, W) of the same type, in channels_last memory.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    moved = int(padding > 0)
    rows = moved * draws.rows[:, None] + down
    cols = moved * draws.cols[:, None] + torch.where(draws.flips[:, None], across.flip(0), across)
    each = torch.arange(count, device=images.device)[:, None, None]
    # One gather does it all; an index on both sides of the channels puts these last.
    return padded[each, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> float32, zero mean and unit deviation a channel.

    `mean` and `std` are (3,) in units of [0, 1].
    """
    mean, std = 255 * mean[:, None, None], 255 * std[:, None, None]
    return (images.float() - mean) / std


def cutout(images: Tensor, centers: Tensor, side: int) -> Tensor:
    """Set a square to zero, the mean (DeVries & Taylor 2017); the edge of the image clips it.

    Args:
        images: (N, 3, H, W) normalized.
        centers: (N, 2) rows and columns.
        side: of the square, in pixels.
    """
    _, _, height, width = images.shape
    top, left = (centers - side // 2).unbind(1)
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    in_rows = (down >= top[:, None]) & (down < top[:, None] + side)
    in_cols = (across >= left[:, None]) & (across < left[:, None] + side)
    square = in_rows[:, None, :, None] & in_cols[:, None, None, :]
    return torch.where(square, 0.0, images)  # masked_fill would leave channels_last


def shrink(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) float32 -> (N, 3, side, side), by a triangle filter as wide as the step.

    A network for 32x32 learns the coarse first, and on small images it does so for a fraction of
    the work (progressive resizing; Touvron et al. 2019 on train and test resolution).
    """
    if images.shape[-1] == side:
        return images
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor, draws: Draws, mean: Tensor, std: Tensor, augmentation: Augmentation
) -> Tensor:
    """(N, 3, 32, 32) uint8 -> float32, normalized.

    TrivialAugment comes first, then crop and flip, then Cutout.
    """
    if augmentation.trivial_augment:
        images = trivial_augment(images, draws.changes, draws.levels)
    images = normalize(crop_and_flip(images, draws, augmentation.padding), mean, std)
    return cutout(images, draws.centers, augmentation.cutout) if augmentation.cutout else images
