"""Augmentations that mix the images of a batch: CutMix, mixup and RICAP.

Each image is mixed with other images in its batch. The target becomes a distribution over the
classes of these images. The weight of a class is its fraction of the mixed image. As in the
published methods, all images in a batch use the same weights and positions.

`sample_mix_params` samples the parameters for an epoch. `mix_images` and `mix_labels` apply them on
any device without synchronization.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # height and width of an image


class Patch(NamedTuple):
    """A rectangle to copy from an image to the mixed image."""

    image: int  # index of the source: 0 for the image itself, k for its partner k - 1
    top: int
    left: int
    height: int
    width: int
    from_top: int
    from_left: int


class MixParams(NamedTuple):
    """The parameters for mixing the B images of one batch."""

    partners: Tensor  # (K, B) int64, indices of the partners of each image in the batch
    weights: tuple[float, ...]  # weights of the image and its K partners, with a sum of 1
    patches: tuple[Patch, ...] = ()  # an empty tuple means that the images are blended


def sample_mix_params(
    method: str, alpha: float, probability: float, *, steps: int, batch: int, seed: int
) -> list[MixParams | None]:
    """Sample the mixing parameters for an epoch.

    Args:
        method: "none" or one of `METHODS`.
        alpha: parameter of the Beta(alpha, alpha) distribution of the weights. With a low value,
            each mixed image is close to one of the original images.
        probability: probability that a batch is mixed.
        steps: number of batches.
        batch: batch size.
        seed: seed for the epoch.

    Returns:
        A `MixParams` for each batch, or None for a batch that is not mixed.
    """
    if method == "none":
        return [None] * steps
    sample = METHODS[method]
    generator = np.random.default_rng(seed)
    # Sample parameters for every batch, mixed or not, so that they do not depend on `probability`.
    mixes = [
        (generator.random() < probability, sample(generator, alpha, batch)) for _ in range(steps)
    ]
    return [mix if mixed else None for mixed, mix in mixes]


def _partners(generator: np.random.Generator, count: int, batch: int) -> Tensor:
    return torch.from_numpy(np.stack([generator.permutation(batch) for _ in range(count)]))


def _mixup(generator: np.random.Generator, alpha: float, batch: int) -> MixParams:
    """Zhang et al. 2018 (arXiv:1710.09412): blend the image with a partner."""
    weight = float(generator.beta(alpha, alpha))
    return MixParams(_partners(generator, 1, batch), (weight, 1 - weight))


def _cutmix(generator: np.random.Generator, alpha: float, batch: int) -> MixParams:
    """Yun et al. 2019 (arXiv:1905.04899): paste a rectangle from a partner at the same position.

    The center of the rectangle is uniformly distributed. The rectangle is clipped at the edges. Its
    area after clipping determines the weights.
    """
    side = int(SIDE * math.sqrt(1 - generator.beta(alpha, alpha)))
    row, column = (int(center) for center in generator.integers(0, SIDE, 2))
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    height = min(row + side // 2, SIDE) - top
    width = min(column + side // 2, SIDE) - left
    weight = height * width / SIDE**2
    patch = Patch(1, top, left, height, width, top, left)
    return MixParams(_partners(generator, 1, batch), (1 - weight, weight), (patch,))


def _ricap(generator: np.random.Generator, alpha: float, batch: int) -> MixParams:
    """Takahashi et al. 2018 (arXiv:1811.09030): join random crops of four images at a point.

    The patches are in the order upper left, upper right, lower left, lower right.
    """
    width, height = (round(SIDE * fraction) for fraction in generator.beta(alpha, alpha, 2))
    patches = []
    for image, (top, left) in enumerate([(0, 0), (0, width), (height, 0), (height, width)]):
        # If the point is on an edge, two of the patches are empty.
        high = SIDE - height if image >= 2 else height
        wide = SIDE - width if image % 2 else width
        from_top = int(generator.integers(0, SIDE - high + 1))
        from_left = int(generator.integers(0, SIDE - wide + 1))
        patches.append(Patch(image, top, left, high, wide, from_top, from_left))
    weights = tuple(patch.height * patch.width / SIDE**2 for patch in patches)
    return MixParams(_partners(generator, 3, batch), weights, tuple(patches))


METHODS: dict[str, Callable[[np.random.Generator, float, int], MixParams]] = {
    "cutmix": _cutmix,
    "mixup": _mixup,
    "ricap": _ricap,
}


def mix_images(images: Sequence[Tensor], mix: MixParams) -> Tensor:
    """Mix the images of a batch.

    Args:
        images: float32 tensors (B, 3, 32, 32): the images of the batch, and then their partners in
            the order of `mix.partners`.
        mix: parameters for the batch.

    Returns:
        Mixed float32 images (B, 3, 32, 32), in the memory format of the batch.
    """
    if not mix.patches:
        return sum(weight * image for weight, image in zip(mix.weights, images, strict=True))  # type: ignore[return-value]
    mixed = images[0].clone()
    for image, top, left, height, width, from_top, from_left in mix.patches:
        mixed[..., top : top + height, left : left + width] = images[image][
            ..., from_top : from_top + height, from_left : from_left + width
        ]
    return mixed


def mix_labels(labels: Sequence[Tensor], mix: MixParams, classes: int) -> Tensor:
    """Return the targets of the mixed images.

    Args:
        labels: int64 tensors (B,): the labels of the batch, and then those of the partners.
        mix: parameters for the batch.
        classes: number of classes C.

    Returns:
        (B, C) float32 probabilities.
    """
    one_hot = [F.one_hot(part, classes).float() for part in labels]
    return sum(weight * target for weight, target in zip(mix.weights, one_hot, strict=True))  # type: ignore[return-value]
