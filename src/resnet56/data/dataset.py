"""What a data set is: images and labels in memory, and what can be asked of them."""

import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from resnet56.errors import DataError, UsageError, shown

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
    what was read, from where and how it was split; `origin` loads it again: a folder, or "digits";
    `remarks` are lines on what was passed over or looks odd. `divided` is false where the images
    lay in class folders alone, so that nothing but this package calls some of them test images.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mirror: bool
    source: str
    origin: str
    remarks: tuple[str, ...] = ()
    divided: bool = True

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes, shapes, images and labels: equal for equal data."""
        splits = (self.train, self.test)
        shapes = [list(split.images.shape) for split in splits]
        digest = hashlib.sha256(json.dumps([self.classes, shapes]).encode())
        for split in splits:
            digest.update(np.ascontiguousarray(split.images.numpy()).data)
            digest.update(split.labels.numpy().astype("<i8").data)
        return digest.hexdigest()

    def for_classes(self, classes: Sequence[str]) -> "Dataset":
        """The images of those `classes` of another data set or network, labeled as its are.

        Classes go by their names, see `match_classes`; images of other classes are left out with
        a remark. All images of a set that is not `divided` are test images of the result.
        Raises UsageError when no class is among `classes`.
        """
        known, remarks = match_classes(self.classes, classes)
        if not known:
            raise UsageError(
                f"no class of the data ({_some(self.classes)}) is one of the network's "
                f"({_some(classes)}); choose --data"
            )
        others = [name for name in self.classes if name not in known]
        if others:
            remarks.append(
                f"the network does not have the class{'es' * (len(others) > 1)} {_some(others)}: "
                "their images are left out"
            )
        index = [classes.index(known[name]) if name in known else -1 for name in self.classes]
        labels = torch.tensor(index, dtype=torch.int64)
        train, test = self.train, self.test
        if not self.divided:
            images = torch.cat((train.images, test.images))
            test = Split(images, torch.cat((train.labels, test.labels)))
            train = Split(images[:0], test.labels[:0])
        return replace(
            self,
            classes=tuple(classes),
            train=_relabel(train, labels),
            test=_relabel(test, labels),
            remarks=(*self.remarks, *remarks),
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (", ..." if len(names) > 3 else "")


def _relabel(split: Split, new: torch.Tensor) -> Split:
    labels = new[split.labels]
    kept = labels >= 0
    if bool(kept.all()):
        return Split(split.images, labels)
    return Split(split.images[kept], labels[kept])


def class_name(name: str) -> str:
    """A class's name in the one form that is kept: composed (NFC), without outer blanks.

    A folder's name is decomposed where macOS wrote it. Raises DataError for a name that no file or
    terminal can show: one with control characters, of no Unicode, or empty.
    """
    composed = unicodedata.normalize("NFC", name).strip()
    kinds = {unicodedata.category(character) for character in composed}
    if not composed or kinds & {"Cc", "Cs", "Zl", "Zp"}:
        raise DataError(
            f"{name!a} cannot name a class: it is empty, not Unicode, or has control "
            "characters; rename it"
        )
    return composed


def match_classes(names: Sequence[str], classes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Which of `classes` each of `names` is, where it is one; and remarks on loose matches.

    Names are compared in their NFC form without outer blanks; where that finds none, without
    regard to case, if exactly one is equal then.
    """

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).strip()

    exact = {plain(name): name for name in reversed(classes)}
    loose: dict[str, list[str]] = {}
    for name in classes:
        loose.setdefault(plain(name).casefold(), []).append(name)
    known: dict[str, str] = {}
    remarks = []
    for name in names:
        same = loose.get(plain(name).casefold(), [])
        if plain(name) in exact:
            known[name] = exact[plain(name)]
        elif len(same) == 1:
            known[name] = same[0]
            remarks.append(
                f"{shown(name)} is taken as the class {shown(same[0])}: they differ in upper and "
                "lower case only"
            )
    return known, remarks


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
