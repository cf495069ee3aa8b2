"""Read CIFAR-10 and CIFAR-100 in their published formats, and verify their checksums.

https://www.cs.toronto.edu/~kriz/cifar.html describes the formats. The checksums apply to the
binary format, so this module converts all formats to binary records.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from resnet56.data.class_names import CIFAR10, PUBLISHED
from resnet56.data.dataset import Dataset, Split, normalize_class_name
from resnet56.data.pickles import PickledArray, read_pickle, text
from resnet56.errors import DataError, escape

UInt8Array = npt.NDArray[np.uint8]

OFFICIAL = "official split"  # part of `Dataset.source` for CIFAR

_PIXELS = 3 * 32 * 32
_BLOCK = 1_000  # number of images to process at once, to limit memory use
_ADVICE = "unpack the archive again"
# SHA-1 digests of the files in the binary format. The test file is last. Apache MXNet's
# gluon.data.vision uses the same values.
_PUBLISHED = {
    "cifar10": (
        "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
        "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
        "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
        "aab85764eb3584312d3c7f65fd2fd016e36a258e",
        "26e2849e66a845b7f1e4614ae70f4889ae604628",
        "67eb016db431130d61cd03c7ad570b013799c88c",
    ),
    "cifar100": (
        "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
        "8fb6623e830365ff53cf14adec797474f5478006",
    ),
}
_TRAIN_SIZE, _TEST_SIZE = 50_000, 10_000
# Minimum fraction of distinct images in a split. This fraction is at least 0.9997 in the published
# splits.
_MIN_DISTINCT = 0.99


@dataclass(frozen=True)
class _Layout:
    """A published format of CIFAR: its files and the locations of the labels and the class names.

    A record of the binary format consists of `label_bytes` label bytes and 3,072 pixel bytes. The
    last label byte is the label. The pixel bytes are the red, green and blue channels with 1,024
    bytes each, row by row from the top. A file in the pickle format contains a dictionary. `labels`
    is the key of the labels in an image file, and `names` is the key of the class names in `meta`.
    """

    name: str
    directory: str
    train: tuple[str, ...]
    test: str
    meta: str
    classes: int
    file_format: Literal["binary", "pickle"]
    labels: str = ""
    names: str = ""

    @property
    def title(self) -> str:
        """Name of the data set, for messages."""
        return self.name.replace("cifar", "CIFAR-")

    @property
    def label_bytes(self) -> int:
        """Number of label bytes per record. In CIFAR-100, the coarse label comes first."""
        return 1 if self.name == "cifar10" else 2

    def matches(self, directory: Path) -> bool:
        """Return whether `directory` has this layout. Files may be missing."""
        if directory.name == self.directory and directory.is_dir():
            return True
        return any((directory / file).is_file() for file in self.train)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARY = tuple(f"{batch}.bin" for batch in _BATCHES)
# fmt: off
LAYOUTS = (
    _Layout("cifar10", "cifar-10-batches-bin", _BINARY, "test_batch.bin",
            meta="batches.meta.txt", classes=10, file_format="binary"),
    _Layout("cifar10", "cifar-10-batches-py", _BATCHES, "test_batch",
            meta="batches.meta", classes=10, file_format="pickle", labels="labels",
            names="label_names"),
    _Layout("cifar100", "cifar-100-binary", ("train.bin",), "test.bin",
            meta="fine_label_names.txt", classes=100, file_format="binary"),
    _Layout("cifar100", "cifar-100-python", ("train",), "test",
            meta="meta", classes=100, file_format="pickle", labels="fine_labels",
            names="fine_label_names"),
)
# The published archives and the directories that they contain.
ARCHIVES = {
    "cifar-10-binary.tar.gz": "cifar-10-batches-bin",
    "cifar-10-python.tar.gz": "cifar-10-batches-py",
    "cifar-100-binary.tar.gz": "cifar-100-binary",
    "cifar-100-python.tar.gz": "cifar-100-python",
}
# fmt: on


def find_layout(path: Path) -> tuple[_Layout, Path] | None:
    """Find a published layout in `path` or a subdirectory. Return the layout and its directory."""
    for layout in LAYOUTS:
        for directory in (path, path / layout.directory):
            if layout.matches(directory):
                return layout, directory
    return None


def load_cifar(layout: _Layout, directory: Path) -> Dataset:
    """Load the data set from `directory`. Raises DataError if it is not the published data set."""
    needed = [*layout.train, layout.test]
    if layout.classes != len(CIFAR10):  # only CIFAR-100 requires the file of class names
        needed.append(layout.meta)
    for file in needed:
        if not (directory / file).is_file():
            raise DataError(f"{escape(str(directory / file))} is missing; {_ADVICE}")
    classes = _class_names(layout, directory / layout.meta)
    with ThreadPoolExecutor(1) as pool:  # computes checksums while this thread reads files
        train, sums = _read_files(
            layout, [directory / file for file in layout.train], _TRAIN_SIZE, pool
        )
        test, test_sums = _read_files(layout, [directory / layout.test], _TEST_SIZE, pool)
    files = (*layout.train, layout.test)
    published = _PUBLISHED[layout.name]
    different = [
        file
        for file, actual, expected in zip(files, [*sums, *test_sums], published, strict=True)
        if actual != expected
    ]
    if different:
        _check_split(layout, directory, train, classes, "training")
        _check_split(layout, directory, test, classes, "test")
    if classes != PUBLISHED[layout.name]:
        different.append(layout.meta)
    description = OFFICIAL
    remarks: tuple[str, ...] = ()
    if different:
        names = ", ".join(different)
        description = f"{OFFICIAL}, with differences in {names}"
        remarks = (f"{escape(str(directory))} differs from the published data set in {names}",)
    return Dataset(
        name=layout.name,
        classes=classes,
        train=train,
        test=test,
        allow_flip=True,
        source=f"{layout.title} ({description}): {len(train):,} training and {len(test):,} test "
        "images",
        origin=str(directory.resolve()),
        remarks=remarks,
    )


def _check_split(
    layout: _Layout, directory: Path, split: Split, classes: tuple[str, ...], kind: str
) -> None:
    """Raise DataError if `split` differs considerably from the published split."""
    total = len(split)
    counts = split.labels.bincount(minlength=layout.classes)
    expected = total // layout.classes
    if bool((counts != expected).any()):
        worst = int((counts - expected).abs().argmax())
        raise DataError(
            f"{escape(str(directory))} is not the published data set: {int(counts[worst]):,} "
            f"{kind} images have the label {escape(classes[worst])}, expected {expected:,}; "
            f"{_ADVICE}"
        )
    distinct = len({hash(image.tobytes()) for image in split.images.numpy()})
    if distinct < _MIN_DISTINCT * total:
        raise DataError(
            f"{escape(str(directory))} is not the published data set: {total - distinct:,} of its "
            f"{total:,} {kind} images are duplicates, so a file may be incomplete; {_ADVICE}"
        )


def _class_names(layout: _Layout, file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return CIFAR10
    names: object
    if layout.file_format == "binary":
        names = file.read_bytes().split()
    else:
        names = read_pickle(file).get(layout.names)
    if isinstance(names, list):
        decoded = tuple(text(name) for name in names if isinstance(name, str | bytes))
        if len(names) == len(set(decoded)) == layout.classes:
            return tuple(map(normalize_class_name, decoded))
    raise DataError(f"{escape(str(file))} does not contain {layout.classes} class names; {_ADVICE}")


def _read_files(
    layout: _Layout, files: list[Path], total: int, pool: ThreadPoolExecutor
) -> tuple[Split, list[str]]:
    """Read `total` images, an equal number from each file.

    Return the split and the SHA-1 digests of the files in binary format.
    """
    split = empty_split(total)
    rows = total // len(files)
    images = split.images.view(len(files), rows, _PIXELS).numpy()
    labels = split.labels.view(len(files), rows).numpy()
    sums = []
    for file, file_images, file_labels in zip(files, images, labels, strict=True):
        digest = hashlib.sha1(usedforsecurity=False)
        pending: Future[None] | None = None
        start = 0
        for records in _records(layout, file, rows):
            if pending:
                pending.result()  # at most one block waits for the pool, to limit memory use
            pending = pool.submit(digest.update, records.data)
            block = slice(start, start + len(records))
            file_images[block] = records[:, layout.label_bytes :]
            file_labels[block] = records[:, layout.label_bytes - 1]
            start += len(records)
        if pending:
            pending.result()
        _check_labels(file, file_labels, layout)
        sums.append(digest.hexdigest())
    return split, sums


def _records(layout: _Layout, file: Path, count: int) -> Iterator[UInt8Array]:
    """Yield the `count` records of a file as blocks (n, label_bytes + 3072) in binary format."""
    if layout.file_format == "binary":
        yield from _binary_records(layout, file, count)
    else:
        coarse = "coarse_labels" if layout.label_bytes == 2 else None
        pixels, labels, coarse_labels = _read_batch(layout, file, count, coarse)
        for start in range(0, count, _BLOCK):
            block = slice(start, start + _BLOCK)
            records = np.empty((len(labels[block]), layout.label_bytes + _PIXELS), np.uint8)
            records[:, 0] = coarse_labels[block]
            records[:, layout.label_bytes - 1] = labels[block]
            records[:, layout.label_bytes :] = pixels[block]
            yield records


def _binary_records(layout: _Layout, file: Path, count: int) -> Iterator[UInt8Array]:
    record = layout.label_bytes + _PIXELS
    expected, actual = count * record, file.stat().st_size
    if actual != expected:
        raise DataError(
            f"{escape(str(file))} has the wrong size: "
            f"expected {expected:,} bytes, found {actual:,}; {_ADVICE}"
        )
    with file.open("rb") as stream:
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start) * record
            records = np.fromfile(stream, np.uint8, size)
            if len(records) != size:  # the file was truncated after the check
                raise DataError(f"{escape(str(file))} is truncated; {_ADVICE}")
            yield records.reshape(-1, record)


# The pixels, labels and coarse labels in a file.
_Batch = tuple[UInt8Array, UInt8Array, UInt8Array]


def _read_batch(layout: _Layout, file: Path, count: int, coarse: str | None) -> _Batch:
    """Read pixels (count, 3072), labels (count,) and coarse labels (count,) from a pickle."""
    batch = read_pickle(file)
    data = batch.get("data")
    if not isinstance(data, PickledArray) or (pixels := data.pixels((count, _PIXELS))) is None:
        raise DataError(
            f"{escape(str(file))}: 'data' is not a uint8 array of shape ({count}, 3072); {_ADVICE}"
        )
    labels = _labels(batch.get(layout.labels), file, layout.labels, count, layout.classes)
    # Only the checksum requires the coarse labels.
    stored = batch.get(coarse) if coarse else None
    coarse_labels = labels if stored is None else _labels(stored, file, coarse or "", count, 256)
    return pixels, labels, coarse_labels


def _labels(values: object, file: Path, key: str, count: int, classes: int) -> UInt8Array:
    """Convert a list of labels to uint8. Raises DataError for any other object."""
    if not isinstance(values, list) or not all(
        type(value) is int and value.bit_length() < 64 for value in values
    ):
        raise DataError(f"{escape(str(file))}: {key!r} is not a list of integers; {_ADVICE}")
    if len(values) != count:
        raise DataError(
            f"{escape(str(file))}: {count:,} images, but {len(values):,} labels; {_ADVICE}"
        )
    array = np.array(values, dtype=np.int64)
    _reject_labels(file, np.flatnonzero((array < 0) | (array >= classes)), array, classes)
    return array.astype(np.uint8)


def _check_labels(file: Path, labels: npt.NDArray[np.int64], layout: _Layout) -> None:
    invalid = np.flatnonzero((labels < 0) | (labels >= layout.classes))
    _reject_labels(file, invalid, labels, layout.classes)


def _reject_labels(
    file: Path, invalid: npt.NDArray[np.intp], labels: npt.NDArray[np.int64], classes: int
) -> None:
    if len(invalid):
        raise DataError(
            f"{escape(str(file))}: record {invalid[0]} (counted from 0) has "
            f"label {labels[invalid[0]]}, expected 0 to {classes - 1}; {_ADVICE}"
        )


def empty_split(count: int) -> Split:
    """Return a split of `count` images with uninitialized content."""
    images = torch.empty((count, 3, 32, 32), dtype=torch.uint8)
    return Split(images, torch.empty(count, dtype=torch.int64))
