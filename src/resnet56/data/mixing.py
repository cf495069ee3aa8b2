"""Augmentations that mix images: CutMix, mixup and RICAP, a whole batch at a time.

Each image of a batch is mixed with others of the same batch, and its target becomes the
probabilities of their classes, in the shares in which it shows them. As in the published methods,
one draw of shares and places holds for all images of a batch.

`draw_mixes` makes one epoch's random numbers; `mix_images` and `mix_labels` apply them on any
device, without waiting for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels of an image


class Patch(NamedTuple):
    """A rectangle of one image that covers a rectangle of the mixed image."""

    image: int  # 0 for the image itself, k for its partner k - 1
    top: int
    left: int
    height: int
    width: int
    from_top: int
    from_left: int


class Mix(NamedTuple):
    """How the B images of one batch are mixed."""

    partners: Tensor  # (K, B) int64: each image's partners, by their positions in the batch
    shares: tuple[float, ...]  # of the image itself and its K partners; they sum to 1
    patches: tuple[Patch, ...] = ()  # the rest is the image itself; without any, images are blended


def draw_mixes(
    method: str, alpha: float, probability: float, *, steps: int, batch: int, seed: int
) -> list[Mix | None]:
    """One epoch's random numbers.

    Args:
        method: "none" or one of `METHODS`.
        alpha: both parameters of the beta distribution of the shares; the lower it is, the
            closer mixed images are to one of the originals.
        probability: of mixing a batch at all.
        steps: batches.
        batch: images in each.
        seed: of the epoch.

    Returns:
        For each batch a `Mix`, or None where it stays as it is.
    """
    if method == "none":
        return [None] * steps
    draw = METHODS[method]
    generator = np.random.default_rng(seed)
    # Drawn for every batch, so that a batch does not depend on which others are mixed.
    mixes = [
        (generator.random() < probability, draw(generator, alpha, batch)) for _ in range(steps)
    ]
    return [mix if mixed else None for mixed, mix in mixes]


def _partners(generator: np.random.Generator, count: int, batch: int) -> Tensor:
    return torch.from_numpy(np.stack([generator.permutation(batch) for _ in range(count)]))


def _mixup(generator: np.random.Generator, alpha: float, batch: int) -> Mix:
    """Zhang et al. 2018 (arXiv:1710.09412): the image and a partner, blended."""
    share = float(generator.beta(alpha, alpha))
    return Mix(_partners(generator, 1, batch), (share, 1 - share))


def _cutmix(generator: np.random.Generator, alpha: float, batch: int) -> Mix:
    """Yun et al. 2019 (arXiv:1905.04899): a partner's rectangle, at the place where it was.

    Its center is uniform and the edge clips it; the shares are those of the clipped rectangle.
    """
    side = int(SIDE * math.sqrt(1 - generator.beta(alpha, alpha)))
    row, column = (int(center) for center in generator.integers(0, SIDE, 2))
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    height = min(row + side // 2, SIDE) - top
    width = min(column + side // 2, SIDE) - left
    share = height * width / SIDE**2
    patch = Patch(1, top, left, height, width, top, left)
    return Mix(_partners(generator, 1, batch), (1 - share, share), (patch,))


def _ricap(generator: np.random.Generator, alpha: float, batch: int) -> Mix:
    """Takahashi et al. 2018 (arXiv:1811.09030): random crops of four images around one point.

    They fill the upper left, upper right, lower left and lower right.
    """
    width, height = (round(SIDE * share) for share in generator.beta(alpha, alpha, 2))
    patches = []
    for image, (top, left) in enumerate([(0, 0), (0, width), (height, 0), (height, width)]):
        # Where the point lies on an edge, two of the four are empty.
        high = SIDE - height if image >= 2 else height
        wide = SIDE - width if image % 2 else width
        from_top = int(generator.integers(0, SIDE - high + 1))
        from_left = int(generator.integers(0, SIDE - wide + 1))
        patches.append(Patch(image, top, left, high, wide, from_top, from_left))
    shares = tuple(patch.height * patch.width / SIDE**2 for patch in patches)
    return Mix(_partners(generator, 3, batch), shares, tuple(patches))


METHODS: dict[str, Callable[[np.random.Generator, float, int], Mix]] = {
    "cutmix": _cutmix,
    "mixup": _mixup,
    "ricap": _ricap,
}


def mix_images(images: Sequence[Tensor], mix: Mix) -> Tensor:
    """Mix a batch.

    Args:
        images: the batch, and each image's partners in the order of `mix.partners`; each
            (B, 3, 32, 32) float32.
        mix: how.

    Returns:
        (B, 3, 32, 32) float32, in the memory format of the first.
    """
    if not mix.patches:
        return sum(share * image for share, image in zip(mix.shares, images, strict=True))  # type: ignore[return-value]
    mixed = images[0].clone()
    for image, top, left, height, width, from_top, from_left in mix.patches:
        mixed[..., top : top + height, left : left + width] = images[image][
            ..., from_top : from_top + height, from_left : from_left + width
        ]
    return mixed


def mix_labels(labels: Sequence[Tensor], mix: Mix, classes: int) -> Tensor:
    """The mixed images' targets.

    Args:
        labels: of the batch, and of the partners; each (B,) int64.
        mix: how.
        classes: C.

    Returns:
        (B, C) float32 probabilities.
    """
    one_hot = [F.one_hot(each, classes).float() for each in labels]
    return sum(share * each for share, each in zip(mix.shares, one_hot, strict=True))  # type: ignore[return-value]
