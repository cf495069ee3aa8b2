"""What a data set is: images and labels in memory, and what can be asked of them."""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from resnet56.errors import DataError, UsageError

Triple = tuple[float, float, float]

_BLOCK = 1_000  # images handled at a time, to bound memory


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, 3, 32, 32) uint8 and their class indices (N,) int64, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split over the same classes; labels index `classes`.

    `mirror` says whether a mirrored image still shows its class; `source` is a line for people:
    what was read, from where and how it was split; `origin` loads it again: a folder, or "digits".
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mirror: bool
    source: str
    origin: str

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes, shapes, images and labels: equal for equal data."""
        splits = (self.train, self.test)
        shapes = [list(split.images.shape) for split in splits]
        digest = hashlib.sha256(json.dumps([self.classes, shapes]).encode())
        for split in splits:
            digest.update(np.ascontiguousarray(split.images.numpy()).data)
            digest.update(split.labels.numpy().astype("<i8").data)
        return digest.hexdigest()


def hold_out(split: Split, count: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Split off `count` images: (kept, held out), each in its old order.

    Classes keep their proportions, with at least one image on both sides (a class of one image
    stays whole in the kept part). Depends on nothing but the arguments. Raises UsageError for a
    count that leaves too few images on one side, or a seed outside 0..2**32-1.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is out of range: choose 0 to {2**32 - 1}")
    total = len(split)
    _, classes, sizes = np.unique(split.labels.numpy(), return_inverse=True, return_counts=True)
    most = sizes - 1
    held = np.minimum(1, most)
    low, high = max(1, int(held.sum())), int(most.sum())
    if not low <= count <= high:
        advice = f"choose {low:,} to {high:,}" if high else "no class has two"
        raise UsageError(
            f"cannot hold out {count:,} of {total:,} images: {advice} "
            "(every class needs an image on both sides)"
        )
    for _ in range(count - int(held.sum())):
        deficit = count * sizes - total * held  # in images of the class, times total
        held[np.where(held < most, deficit, -(total**2)).argmax()] += 1
    # RandomState, unlike a Generator, promises the same stream in every numpy to come.
    order = np.random.RandomState(seed).permutation(total)
    chosen = np.zeros(total, dtype=bool)
    for index, size in enumerate(held):
        chosen[order[classes[order] == index][:size]] = True
    mask = torch.from_numpy(chosen)
    return (
        Split(split.images[~mask], split.labels[~mask]),
        Split(split.images[mask], split.labels[mask]),
    )


def training_split(dataset: Dataset, holdout: int) -> tuple[Split, Split | None]:
    """What a run trains on, and the `holdout` images it keeps apart: none of them for 0."""
    if holdout == 0:
        return dataset.train, None
    return hold_out(dataset.train, holdout)


def channel_statistics(images: torch.Tensor) -> tuple[Triple, Triple]:
    """Exact mean and standard deviation per channel of (N, 3, H, W) uint8, in units of [0, 1].

    A constant channel gets the deviation 1.0, since images are divided by it. Sums are integers
    over a histogram of the 256 values, so no wider copy of the images is made.
    Raises DataError when there are no images.
    """
    if not images.numel():
        raise DataError("no images to take the channel statistics of")
    histogram = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(images), _BLOCK):  # bincount widens to 8 bytes a value
        block = images[start : start + _BLOCK]
        for channel in range(3):
            histogram[channel] += np.bincount(block[:, channel].numpy().ravel(), minlength=256)
    (r, r_std), (g, g_std), (b, b_std) = (_mean_std(counts) for counts in histogram.tolist())
    return (r, g, b), (r_std, g_std, b_std)


def _mean_std(counts: list[int]) -> tuple[float, float]:
    """Mean and deviation, over 255, of the values 0..255 that occur `counts` times."""
    total = sum(counts)
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    spread = total * second - first * first  # the variance times total squared, exactly
    return first / (255 * total), math.sqrt(spread) / (255 * total) or 1.0
