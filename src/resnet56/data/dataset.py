"""Data sets in memory: images, labels, splits and channel statistics."""

import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from resnet56.errors import DataError, UsageError, abbreviate, escape
from resnet56.notebook import table

Triple = tuple[float, float, float]

_BLOCK = 1_000  # number of images to process at once, to limit memory use
_SHOWN_CLASSES = 10  # maximum number of classes in the table for notebooks


@dataclass(frozen=True, eq=False)
class Split(torch_data.Dataset[tuple[Tensor, int]]):
    """Uint8 images (N, 3, 32, 32) and their int64 class indices (N,), on one device.

    A split is a map-style PyTorch data set: `split[i]` is a uint8 image (3, 32, 32) and its label.
    You can use a split with `DataLoader`, `Subset` and `random_split`. `Batches` augments and
    normalizes the images.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __repr__(self) -> str:
        return f"Split({len(self):,} images on {self.images.device})"

    def select(self, index: slice | Sequence[int] | Tensor) -> "Split":
        """Return a split with the images that `index` selects.

        Args:
            index: a slice, a sequence or tensor of positions, or a Boolean mask (N,).
        """
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its images and labels on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with the same classes. Labels are indices into `classes`.

    Attributes:
        allow_flip: whether a horizontal flip preserves the class.
        source: one-line description of the data and the split, for users.
        origin: the directory that the data were loaded from, or "digits".
        remarks: one-line messages about skipped or unusual data.
        predefined_split: whether the data set defines its test images. If False, this package
            selects them.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    allow_flip: bool
    source: str
    origin: str
    remarks: tuple[str, ...] = ()
    predefined_split: bool = True

    def __repr__(self) -> str:
        return (
            f"Dataset({escape(self.name)}: {len(self.train):,} training and {len(self.test):,} "
            f"test images, {len(self.classes):,} classes)"
        )

    def _repr_html_(self) -> str:
        counts = [
            split.labels.bincount(minlength=len(self.classes)).tolist()
            for split in (self.train, self.test)
        ]
        rows = [
            (name, f"{train:,}", f"{test:,}")
            for name, train, test in zip(self.classes, *counts, strict=True)
        ]
        hidden = len(rows) - _SHOWN_CLASSES
        more = [(f"{hidden:,} more classes", "", "")] if hidden > 0 else []
        total = ("total", f"{len(self.train):,}", f"{len(self.test):,}")
        return table(
            [*rows[:_SHOWN_CLASSES], *more, total],
            columns=("class", "training images", "test images"),
            caption="; ".join((self.source, *self.remarks)),
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 digest of the classes, shapes, images and labels, in hexadecimal."""
        splits = (self.train, self.test)
        shapes = [list(split.images.shape) for split in splits]
        digest = hashlib.sha256(json.dumps([self.classes, shapes]).encode())
        for split in splits:
            digest.update(np.ascontiguousarray(split.images.numpy()).data)
            digest.update(split.labels.numpy().astype("<i8").data)
        return digest.hexdigest()

    def for_classes(self, classes: Sequence[str]) -> "Dataset":
        """Return a data set whose labels are indices into `classes`, the classes of a model.

        Classes are matched by name (see `match_classes`). Images of other classes are skipped, and
        a remark names these classes. Without a predefined split, all images become test images.

        Raises:
            UsageError: no class of this data set is in `classes`.
        """
        matches, remarks = match_classes(self.classes, classes)
        if not matches:
            raise UsageError(
                "the data and the model have no classes in common (data: "
                f"{abbreviate(self.classes)}; model: {abbreviate(classes)}); choose "
                "another data set"
            )
        others = [name for name in self.classes if name not in matches]
        if others:
            remarks.append(
                f"skipped the images of {abbreviate(others)}: the model does not have "
                f"{'these classes' if len(others) > 1 else 'this class'}"
            )
        index = [classes.index(matches[name]) if name in matches else -1 for name in self.classes]
        labels = torch.tensor(index, dtype=torch.int64)
        train, test = self.train, self.test
        if not self.predefined_split:
            images = torch.cat((train.images, test.images))
            test = Split(images, torch.cat((train.labels, test.labels)))
            train = test.select(slice(0))
        return replace(
            self,
            classes=tuple(classes),
            train=_relabel(train, labels),
            test=_relabel(test, labels),
            remarks=(*self.remarks, *remarks),
        )


def _relabel(split: Split, new: Tensor) -> Split:
    labels = new[split.labels]
    valid = labels >= 0
    if bool(valid.all()):
        return Split(split.images, labels)
    return Split(split.images, labels).select(valid)


def normalize_class_name(name: str) -> str:
    """Return a class name in NFC form without leading or trailing whitespace.

    Directory names created on macOS can be in decomposed Unicode form (NFD).

    Raises DataError if the name is empty, is not valid Unicode, or contains control characters.
    """
    composed = unicodedata.normalize("NFC", name).strip()
    categories = {unicodedata.category(character) for character in composed}
    if not composed or categories & {"Cc", "Cs", "Zl", "Zp"}:
        raise DataError(
            f"{name!a} is not a valid class name: it is empty, is not Unicode, or contains "
            "control characters; rename it"
        )
    return composed


def match_classes(names: Sequence[str], classes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Match names to `classes`. Return the class of each matched name, and a list of remarks.

    Names are compared in NFC form without surrounding whitespace. If a name has no exact match,
    case is ignored, and the name must match exactly one class.
    """

    def normalized(name: str) -> str:
        return unicodedata.normalize("NFC", name).strip()

    exact = {normalized(name): name for name in reversed(classes)}
    case_insensitive: dict[str, list[str]] = {}
    for name in classes:
        case_insensitive.setdefault(normalized(name).casefold(), []).append(name)
    matches: dict[str, str] = {}
    remarks = []
    for name in names:
        candidates = case_insensitive.get(normalized(name).casefold(), [])
        if normalized(name) in exact:
            matches[name] = exact[normalized(name)]
        elif len(candidates) == 1:
            matches[name] = candidates[0]
            remarks.append(
                f"treating {escape(name)} as the class {escape(candidates[0])}, which differs only "
                "in case"
            )
    return matches, remarks


def stratified_split(split: Split, count: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Split off a stratified sample of `count` images. Return the remaining images and the sample.

    Both parts preserve the original order. Each part contains at least one image of every class. A
    class with a single image is an exception: its image remains in the first part. The result
    depends only on the arguments.

    Raises:
        UsageError: `count` leaves too few images in one part, or `seed` is not in 0..2**32-1.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is out of range; choose a value from 0 to {2**32 - 1}")
    total = len(split)
    _, classes, sizes = np.unique(split.labels.numpy(), return_inverse=True, return_counts=True)
    maximum = sizes - 1
    selected = np.minimum(1, maximum)
    low, high = max(1, int(selected.sum())), int(maximum.sum())
    if not low <= count <= high:
        advice = f"choose {low:,} to {high:,}" if high else "no class has two images"
        raise UsageError(
            f"cannot split off {count:,} of {total:,} images: {advice} "
            "(each part needs an image of every class)"
        )
    for _ in range(count - int(selected.sum())):
        # The number of images that each class lacks to reach its proportional share, multiplied by
        # `total`.
        deficit = count * sizes - total * selected
        selected[np.where(selected < maximum, deficit, -(total**2)).argmax()] += 1
    # For a given seed, RandomState produces the same output in all versions of NumPy. Generator
    # does not guarantee this.
    order = np.random.RandomState(seed).permutation(total)
    mask = np.zeros(total, dtype=bool)
    for index, size in enumerate(selected):
        mask[order[classes[order] == index][:size]] = True
    chosen = torch.from_numpy(mask)
    return split.select(~chosen), split.select(chosen)


def training_split(dataset: Dataset, val_size: int) -> tuple[Split, Split | None]:
    """Return the training images and `val_size` validation images (None if `val_size` is 0)."""
    if val_size == 0:
        return dataset.train, None
    return stratified_split(dataset.train, val_size)


def channel_statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Return the channel means and standard deviations of uint8 images (N, 3, H, W).

    Both refer to pixels scaled to [0, 1]. The standard deviation of a constant channel is set to
    1.0 to avoid division by zero. The sums are computed from a histogram, so they are exact and
    require no copy of the images in a wider dtype.

    Raises DataError if there are no images.
    """
    if not images.numel():
        raise DataError("cannot compute channel statistics: there are no images")
    histogram = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(images), _BLOCK):  # `bincount` requires 8 bytes per value
        block = images[start : start + _BLOCK].cpu()
        for channel in range(3):
            histogram[channel] += np.bincount(block[:, channel].numpy().ravel(), minlength=256)
    (r, r_std), (g, g_std), (b, b_std) = (_mean_std(counts) for counts in histogram.tolist())
    return (r, g, b), (r_std, g_std, b_std)


def _mean_std(counts: list[int]) -> tuple[float, float]:
    """Compute the mean and standard deviation of pixels from a histogram of their uint8 values.

    Both refer to pixels scaled to [0, 1]. A standard deviation of zero is replaced by 1.0.
    """
    total = sum(counts)
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    scaled_variance = total * second - first * first  # the exact variance times total**2
    return first / (255 * total), math.sqrt(scaled_variance) / (255 * total) or 1.0
