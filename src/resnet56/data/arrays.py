"""Test sets as NumPy arrays: CIFAR-10-C, CIFAR-10.1, and pairs as Keras users save them."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from resnet56.data.dataset import Split
from resnet56.errors import DataError, one_line, shown

# How the file of the images begins or ends, and that of its labels; X and Y stand for either case.
_PAIRS = (
    ("{}_data", "{}_labels"),
    ("{}_images", "{}_labels"),
    ("x_{}", "y_{}"),
    ("X_{}", "y_{}"),
    ("X_{}", "Y_{}"),
    ("{}_x", "{}_y"),
    ("{}_X", "{}_y"),
    ("x{}", "y{}"),
)


def is_benchmark(path: Path) -> bool:
    """Whether `path` holds test images as arrays: .npy files."""
    return path.is_dir() and any(path.glob("*.npy"))


def load_benchmark(path: Path, classes: int) -> Iterator[tuple[str, Split]]:
    """The test sets in a folder of .npy files, one after the other, each with its name.

    CIFAR-10-C has `labels.npy` and an array (50,000, 32, 32, 3) of bytes for each corruption, its
    five severities in turn; CIFAR-10.1 has `NAME_data.npy` with `NAME_labels.npy`. Also read are
    `x_NAME.npy` with `y_NAME.npy`. Labels are whole numbers of the shape (N,) or (N, 1). Raises
    DataError for arrays of other shapes or types, labels out of range, or none at all.
    """
    stems = {file.stem: file for file in sorted(path.glob("*.npy"))}
    pairs = list(_pairs(path, stems))
    if not pairs:
        raise DataError(
            f"{shown(str(path))} holds no images: give them as NAME_data.npy or x_NAME.npy"
        )
    for name, file, labels_file in pairs:
        images, labels = _read_array(file), _read_array(labels_file)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
            raise DataError(
                f"{shown(str(file))} has the shape {images.shape} and type "
                f"{one_line(images.dtype)}; expected (N, 32, 32, 3) of uint8"
            )
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError(
                f"{shown(str(labels_file))} has the shape {labels.shape} and type "
                f"{one_line(labels.dtype)}; expected (N,) or (N, 1) of whole numbers"
            )
        if len(images) != len(labels):
            raise DataError(
                f"{shown(str(file))} has {len(images):,} images, and {labels_file.name} "
                f"{len(labels):,} labels"
            )
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"{shown(str(labels_file))}: its labels are not classes from 0 to {classes - 1}"
            )
        severities = 5 if len(images) == 50_000 else 1
        size = len(images) // severities
        for severity in range(severities):
            part = slice(severity * size, (severity + 1) * size)
            pixels = np.array(images[part]).transpose(0, 3, 1, 2)
            split = Split(
                torch.from_numpy(np.ascontiguousarray(pixels)),
                torch.from_numpy(np.array(labels[part], dtype=np.int64)),
            )
            yield f"{name} {severity + 1}" if severities > 1 else name, split


def _pairs(path: Path, stems: dict[str, Path]) -> Iterator[tuple[str, Path, Path]]:
    """The name, images and labels of each test set. Raises DataError for images without labels."""
    paired: dict[str, tuple[str, str]] = {}  # images to name and labels
    labels = {"labels"}
    for stem in stems:
        for images_form, labels_form in _PAIRS:
            before, after = images_form.split("{}")
            name = stem.removeprefix(before).removesuffix(after)
            if images_form.format(name) == stem and labels_form.format(name) in stems:
                paired.setdefault(stem, (name, labels_form.format(name)))
                labels.add(labels_form.format(name))
    for stem, file in stems.items():
        if stem in labels or stem.endswith("labels"):
            continue
        name, of = paired.get(stem, (stem.removesuffix("_data"), "labels"))
        if of not in stems:
            looked_for = f"{name}_labels.npy, labels.npy"
            if stem.lower().startswith("x"):
                looked_for += f", y{stem[1:]}.npy"
            raise DataError(
                f"{shown(str(file))} has no labels beside it: looked for {shown(looked_for)}"
            )
        yield name or stem, file, stems[of]


def _read_array(file: Path) -> npt.NDArray[Any]:
    """The array in a .npy file, mapped and not read yet. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the head is parsed as Python, which warns
            array = np.load(file, mmap_mode="r", allow_pickle=False)
    except MemoryError as error:
        raise DataError(f"cannot read {shown(str(file))}: its head claims too much") from error
    except Exception as error:  # a damaged head makes NumPy raise anything
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {shown(str(file))}: {one_line(reason)}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"cannot read {shown(str(file))}: it is an archive of arrays (.npz)")
    return array
