"""Test sets in NumPy files: CIFAR-10-C, CIFAR-10.1, and pairs of image and label arrays."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from resnet56.data.dataset import Split
from resnet56.errors import DataError, escape, one_line

# Name patterns of image files and their label files, without the suffix.
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
    """Return whether `path` is a directory that contains .npy files."""
    return path.is_dir() and any(path.glob("*.npy"))


def load_benchmark(path: Path, classes: int) -> Iterator[tuple[str, Split]]:
    """Yield the name and the split of each test set in a directory of .npy files.

    CIFAR-10-C consists of `labels.npy` and one uint8 array of shape (50,000, 32, 32, 3) per
    corruption. This array contains the five severities in order. CIFAR-10.1 consists of
    `NAME_data.npy` and `NAME_labels.npy`. The function also accepts other common pairs of names,
    such as `x_NAME.npy` and `y_NAME.npy`. Label arrays have an integer dtype and shape (N,) or
    (N, 1).

    Raises:
        DataError: an array has an unexpected shape or dtype, labels are missing or out of range, or
            there are no images.
    """
    stems = {file.stem: file for file in sorted(path.glob("*.npy"))}
    pairs = list(_pairs(path, stems))
    if not pairs:
        raise DataError(
            f"{escape(str(path))} contains no image arrays; name them NAME_data.npy or x_NAME.npy"
        )
    for name, file, labels_file in pairs:
        images, labels = _read_array(file), _read_array(labels_file)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
            raise DataError(
                f"{escape(str(file))} has shape {images.shape} and dtype "
                f"{one_line(images.dtype)}; expected shape (N, 32, 32, 3) and dtype uint8"
            )
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError(
                f"{escape(str(labels_file))} has shape {labels.shape} and dtype "
                f"{one_line(labels.dtype)}; expected shape (N,) or (N, 1) and an integer dtype"
            )
        if len(images) != len(labels):
            raise DataError(
                f"{escape(str(file))} has {len(images):,} images, but {labels_file.name} "
                f"has {len(labels):,} labels; provide one label per image"
            )
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise DataError(f"{escape(str(labels_file))}: expected labels from 0 to {classes - 1}")
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
    """Yield the name, image file and label file of each test set.

    Raises DataError if a label file is missing.
    """
    paired: dict[str, tuple[str, str]] = {}  # image file -> (name, label file)
    labels = {"labels"}
    for stem in stems:
        for images_format, labels_format in _PAIRS:
            prefix, suffix = images_format.split("{}")
            name = stem.removeprefix(prefix).removesuffix(suffix)
            if images_format.format(name) == stem and labels_format.format(name) in stems:
                paired.setdefault(stem, (name, labels_format.format(name)))
                labels.add(labels_format.format(name))
    for stem, file in stems.items():
        if stem in labels or stem.endswith("labels"):
            continue
        name, labels_stem = paired.get(stem, (stem.removesuffix("_data"), "labels"))
        if labels_stem not in stems:
            candidates = f"{name}_labels.npy, labels.npy"
            if stem.lower().startswith("x"):
                candidates += f", y{stem[1:]}.npy"
            raise DataError(
                f"{escape(str(file))} has no label file; expected one of {escape(candidates)}"
            )
        yield name or stem, file, stems[labels_stem]


def _read_array(file: Path) -> npt.NDArray[Any]:
    """Memory-map the array in an .npy file. Raises DataError if NumPy cannot read the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns about some headers
            array = np.load(file, mmap_mode="r", allow_pickle=False)
    except MemoryError as error:
        raise DataError(
            f"cannot read {escape(str(file))}: parsing its header requires too much memory"
        ) from error
    except Exception as error:  # NumPy can raise any exception for a damaged header
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {escape(str(file))}: {one_line(reason)}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(
            f"cannot read {escape(str(file))}: it is an .npz archive; "
            "save each array in an .npy file"
        )
    return array
