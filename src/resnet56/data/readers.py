"""Readers: CIFAR-10 and CIFAR-100 as published, image folders, scikit-learn's digits.

Everything becomes one `Dataset` of 32x32 RGB bytes held in memory. Files are taken as hostile or
damaged until they have shown otherwise: whatever is wrong with them is a one-line `DataError`.
The CIFAR formats are described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from resnet56.data.dataset import Dataset, Split, hold_out
from resnet56.data.images import files_in, read_pixels
from resnet56.data.pickles import PickledArray, read_pickle, text
from resnet56.errors import DataError, ImageError, one_line, shown

Bytes = npt.NDArray[np.uint8]

_PIXELS = 3 * 32 * 32
_BLOCK = 1_000  # images handled at a time where that bounds memory
_AGAIN = "unpack the archive again"
# fmt: off
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer",
            "dog", "frog", "horse", "ship", "truck")
# fmt: on


def load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 greys to 32x32 RGB.

    They come with the package, so this works offline. A fixed stratified fifth is the test split.
    """
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    greys = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # ink is 0..16
    images = torch.empty((len(greys), 3, 32, 32), dtype=torch.uint8)
    for index, grey in enumerate(greys):
        large = Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC)
        images[index] = torch.from_numpy(np.array(large))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    kept, held = model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target
    )
    return Dataset(
        name="digits",
        classes=tuple("0123456789"),
        train=Split(images[kept], labels[kept]),
        test=Split(images[held], labels[held]),
        mirror=False,
        source=f"scikit-learn's digits: {len(kept):,} training and {len(held):,} test images, "
        "a fixed stratified 80/20 split",
        origin="digits",
    )


def load_folder(path: Path) -> Dataset:
    """The data set in `path`, or in the folder of a CIFAR archive's usual name inside it.

    Taken are `cifar-10-batches-bin`, `cifar-10-batches-py`, `cifar-100-binary` and
    `cifar-100-python` (in this order; CIFAR-100 with its fine labels), and image folders:
    `train/<class>/*` with `test/<class>/*`, or without it, when a fixed stratified fifth of the
    images becomes the test split. Raises DataError when anything cannot be read.
    """
    try:
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}: give the folder that holds the data set")
        if next(path.iterdir(), None) is None:
            raise DataError(f"{path} is empty: give the folder that holds the data set")
        for layout in _LAYOUTS:
            for folder in (path, path / layout.folder):
                if layout.fits(folder):
                    return _load_cifar(layout, folder)
        if (path / "train").is_dir():
            return _load_images(path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"cannot read {error.filename or path}: {reason}") from error
    known = ", ".join(layout.folder for layout in _LAYOUTS)
    raise DataError(f"{path} has no known layout: expected {known} or images in train/<class>/")


def is_benchmark(path: Path) -> bool:
    """Whether `path` holds test images as arrays: CIFAR-10-C's or CIFAR-10.1's .npy files."""
    return path.is_dir() and any(path.glob("*.npy"))


def load_benchmark(path: Path, classes: int) -> Iterator[tuple[str, Split]]:
    """The test sets in a folder of .npy files, one after the other, each with its name.

    CIFAR-10-C has `labels.npy` and an array (50,000, 32, 32, 3) of bytes for each corruption, its
    five severities in turn; CIFAR-10.1 has `NAME_data.npy` with `NAME_labels.npy`. Raises
    DataError for arrays of other shapes or types, or labels out of range.
    """
    shared = path / "labels.npy"
    for file in sorted(path.glob("*.npy")):
        if file.stem.endswith("labels"):
            continue
        name = file.stem.removesuffix("_data")
        own = file.with_name(f"{name}_labels.npy")
        images, labels = _read_array(file), _read_array(own if own.is_file() else shared)
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise DataError(f"{file} does not hold bytes of the shape (N, 32, 32, 3)")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise DataError(
                f"{file} and its labels are not as many: {images.shape}, {labels.shape}"
            )
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise DataError(f"{file}: its labels are not classes from 0 to {classes - 1}")
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


def _read_array(file: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}") from error
    return array


def _load_images(path: Path) -> Dataset:
    """An image folder, see `load_folder`; hidden and other files are passed over."""
    train_files = _image_files(path / "train")
    classes = tuple(train_files)
    if len(classes) < 2:
        raise DataError(
            f"{path / 'train'}: expected two or more class folders, found {len(classes)}; "
            "put the images of each class in a folder of their own"
        )
    name = path.resolve().name
    if (path / "test").exists():
        test_files = _image_files(path / "test")
        if not test_files:
            raise DataError(f"{path / 'test'} has no class folders: fill it, or remove it")
        for class_name in test_files:
            if class_name not in train_files:
                raise DataError(f"{path / 'test' / class_name} is a class that train/ lacks")
        train, test = _read_images(train_files, classes), _read_images(test_files, classes)
        how = "split by its folders"
    else:
        for class_name, files in train_files.items():
            if len(files) < 2:
                raise DataError(
                    f"{path / 'train' / class_name} has one image, too few to split off a test "
                    "part: add images, or a test/ folder"
                )
        everything = _read_images(train_files, classes)
        train, test = hold_out(everything, max(len(classes), len(everything) // 5))
        how = "no test/ folder, so a fixed stratified 80/20 split of train/"
    source = f"images in {name}: {len(train):,} training and {len(test):,} test images, {how}"
    origin = str(path.resolve())
    return Dataset(name, classes, train, test, mirror=True, source=source, origin=origin)


def _image_files(root: Path) -> dict[str, list[Path]]:
    """The image files below each class folder of `root`, classes and files sorted by name."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            folder.name.encode()
        except UnicodeEncodeError:  # it could be written into no file, and sent to no browser
            raise DataError(
                f"{shown(str(folder))} cannot name a class, it is no UTF-8; rename it"
            ) from None
        found[folder.name] = files_in(folder)
        if not found[folder.name]:
            raise DataError(f"{folder} holds no images: add some, or remove the folder")
    return found


def _read_images(files: dict[str, list[Path]], classes: tuple[str, ...]) -> Split:
    """Read the files of each class, through `prepare`. Raises DataError naming a broken one."""
    labelled = [(file, classes.index(name)) for name in files for file in files[name]]
    split = _empty_split(len(labelled))
    for index, (file, label) in enumerate(labelled):
        try:
            pixels = read_pixels(file)
        except ImageError as error:
            raise DataError(f"{error}; repair or remove it") from error
        split.images[index] = torch.from_numpy(pixels)
        split.labels[index] = label
    return split


@dataclass(frozen=True)
class _Layout:
    """One published form of CIFAR: its files, and where they keep labels and class names.

    Binary files hold records of `label_bytes` bytes, the last of them the label, and 3,072 of
    pixels (1,024 red, green, blue; rows from the top). Without label bytes the files are pickled
    dictionaries, with labels and names under the keys `labels` and `names`.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    classes: int
    label_bytes: int = 0
    labels: str = ""
    names: str = ""

    def fits(self, folder: Path) -> bool:
        """Whether `folder` looks like this layout, complete or not."""
        if folder.name == self.folder and folder.is_dir():
            return True
        return any((folder / file).is_file() for file in self.train)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARY = tuple(f"{batch}.bin" for batch in _BATCHES)
# fmt: off
_LAYOUTS = (
    _Layout("cifar10", "cifar-10-batches-bin", _BINARY, "test_batch.bin",
            meta="batches.meta.txt", classes=10, label_bytes=1),
    _Layout("cifar10", "cifar-10-batches-py", _BATCHES, "test_batch",
            meta="batches.meta", classes=10, labels="labels", names="label_names"),
    _Layout("cifar100", "cifar-100-binary", ("train.bin",), "test.bin",
            meta="fine_label_names.txt", classes=100, label_bytes=2),
    _Layout("cifar100", "cifar-100-python", ("train",), "test",
            meta="meta", classes=100, labels="fine_labels", names="fine_label_names"),
)
# fmt: on


def _load_cifar(layout: _Layout, folder: Path) -> Dataset:
    needed = [*layout.train, layout.test]
    if layout.classes != len(CIFAR10):  # only CIFAR-10's names are known without their file
        needed.append(layout.meta)
    for file in needed:
        if not (folder / file).is_file():
            raise DataError(f"{folder / file} is missing: {_AGAIN}")
    classes = _class_names(layout, folder / layout.meta)
    train = _read_batches(layout, [folder / file for file in layout.train], 50_000)
    test = _read_batches(layout, [folder / layout.test], 10_000)
    return Dataset(
        name=layout.name,
        classes=classes,
        train=train,
        test=test,
        mirror=True,
        source=f"{layout.folder}: {len(train):,} training and {len(test):,} test "
        "images, the published split",
        origin=str(folder.resolve()),
    )


def _class_names(layout: _Layout, file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return CIFAR10
    if layout.label_bytes:
        names: object = file.read_bytes().split()
    else:
        names = read_pickle(file).get(layout.names)
    if isinstance(names, list):
        decoded = tuple(text(name) for name in names if isinstance(name, str | bytes))
        if len(names) == len(set(decoded)) == layout.classes:
            return decoded
    raise DataError(f"{file} does not hold {layout.classes} class names: {_AGAIN}")


def _read_batches(layout: _Layout, files: Sequence[Path], total: int) -> Split:
    """Read `total` images, as many from each of `files`, into one preallocated split."""
    split = _empty_split(total)
    rows = total // len(files)
    images = split.images.view(len(files), rows, _PIXELS).numpy()
    labels = split.labels.view(len(files), rows).numpy()
    for file, file_images, file_labels in zip(files, images, labels, strict=True):
        if layout.label_bytes:
            _read_binary(file, layout, file_images, file_labels)
        else:
            _read_pickled(file, layout, file_images, file_labels)
    return split


def _read_binary(file: Path, layout: _Layout, images: Bytes, labels: npt.NDArray[np.int64]) -> None:
    """Fill `images` (N, 3072) and `labels` (N,) from a file of N records."""
    record = layout.label_bytes + _PIXELS
    expected, found = len(labels) * record, file.stat().st_size
    if found != expected:
        raise DataError(
            f"{file} has the wrong size: expected {expected:,} bytes, found {found:,}; {_AGAIN}"
        )
    with file.open("rb") as stream:
        for start in range(0, len(labels), _BLOCK):
            block = slice(start, start + _BLOCK)
            records = np.fromfile(stream, np.uint8, _BLOCK * record).reshape(-1, record)
            images[block] = records[:, layout.label_bytes :]
            labels[block] = records[:, layout.label_bytes - 1]
    _check_labels(file, labels, layout)


def _read_pickled(
    file: Path, layout: _Layout, images: Bytes, labels: npt.NDArray[np.int64]
) -> None:
    """Fill `images` (N, 3072) and `labels` (N,) from a pickled dictionary of as many."""
    batch = read_pickle(file)
    data, values = batch.get("data"), batch.get(layout.labels)
    if not isinstance(data, PickledArray) or (pixels := data.pixels(images.shape)) is None:
        raise DataError(f"{file}: 'data' is not a uint8 array of {len(images):,} x {_PIXELS:,}")
    if not isinstance(values, list) or not all(
        type(value) is int and value.bit_length() < 64 for value in values
    ):
        raise DataError(f"{file}: {layout.labels!r} is not a list of whole numbers")
    if len(values) != len(labels):
        raise DataError(f"{file}: {len(labels):,} images but {len(values):,} labels")
    images[:] = pixels
    labels[:] = values
    _check_labels(file, labels, layout)


def _check_labels(file: Path, labels: npt.NDArray[np.int64], layout: _Layout) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= layout.classes))
    if len(wrong):
        raise DataError(
            f"{file}: record {wrong[0]} (the first is 0) has label {labels[wrong[0]]}, "
            f"expected 0 to {layout.classes - 1}; {_AGAIN}"
        )


def _empty_split(count: int) -> Split:
    images = torch.empty((count, 3, 32, 32), dtype=torch.uint8)
    return Split(images, torch.empty(count, dtype=torch.int64))
