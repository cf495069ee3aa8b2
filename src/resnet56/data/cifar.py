"""CIFAR-10 and CIFAR-100 in the forms they are published in, compared with what was published.

The formats are described at https://www.cs.toronto.edu/~kriz/cifar.html. Whatever the form, a file
is read as the records of the binary one, so that one checksum serves all.
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
from resnet56.data.dataset import Dataset, Split, class_name
from resnet56.data.pickles import PickledArray, read_pickle, text
from resnet56.errors import DataError, shown

Bytes = npt.NDArray[np.uint8]

_PIXELS = 3 * 32 * 32
_BLOCK = 1_000  # images handled at a time, to bound memory
_AGAIN = "unpack the archive again"
# SHA-1 of each file of the binary form: the training files and the test file. Apache MXNet's
# gluon.data.vision pins the same ones.
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
_TRAINING, _TEST = 50_000, 10_000  # images of each set
_LEAST_DISTINCT = 0.99  # of a split's images; of the published ones 0.9997 and more are


@dataclass(frozen=True)
class _Layout:
    """One published form of CIFAR: its files, and where they keep labels and class names.

    A record of the binary form has `label_bytes` bytes, the last of them the label, and 3,072 of
    pixels (1,024 red, green, blue; rows from the top). The other form is pickled dictionaries, with
    labels and names under the keys `labels` and `names`.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    classes: int
    form: Literal["binary", "pickle"]
    labels: str = ""
    names: str = ""

    @property
    def label_bytes(self) -> int:
        """Bytes before the pixels: CIFAR-100 has a coarse label before the fine one."""
        return 1 if self.name == "cifar10" else 2

    def fits(self, folder: Path) -> bool:
        """Whether `folder` looks like this layout, complete or not."""
        if folder.name == self.folder and folder.is_dir():
            return True
        return any((folder / file).is_file() for file in self.train)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARY = tuple(f"{batch}.bin" for batch in _BATCHES)
# fmt: off
LAYOUTS = (
    _Layout("cifar10", "cifar-10-batches-bin", _BINARY, "test_batch.bin",
            meta="batches.meta.txt", classes=10, form="binary"),
    _Layout("cifar10", "cifar-10-batches-py", _BATCHES, "test_batch",
            meta="batches.meta", classes=10, form="pickle", labels="labels", names="label_names"),
    _Layout("cifar100", "cifar-100-binary", ("train.bin",), "test.bin",
            meta="fine_label_names.txt", classes=100, form="binary"),
    _Layout("cifar100", "cifar-100-python", ("train",), "test",
            meta="meta", classes=100, form="pickle", labels="fine_labels",
            names="fine_label_names"),
)
# The archives that hold these folders, by their published names.
ARCHIVES = {
    "cifar-10-binary.tar.gz": "cifar-10-batches-bin",
    "cifar-10-python.tar.gz": "cifar-10-batches-py",
    "cifar-100-binary.tar.gz": "cifar-100-binary",
    "cifar-100-python.tar.gz": "cifar-100-python",
}
# fmt: on


def layout_in(path: Path) -> tuple[_Layout, Path] | None:
    """The layout of `path`, or of a folder of its usual name in it, and where it lies."""
    for layout in LAYOUTS:
        for folder in (path, path / layout.folder):
            if layout.fits(folder):
                return layout, folder
    return None


def load_cifar(layout: _Layout, folder: Path) -> Dataset:
    """The data set in `folder`. Raises DataError if it cannot be what was published."""
    needed = [*layout.train, layout.test]
    if layout.classes != len(CIFAR10):  # only CIFAR-10's names are known without their file
        needed.append(layout.meta)
    for file in needed:
        if not (folder / file).is_file():
            raise DataError(f"{shown(str(folder / file))} is missing: {_AGAIN}")
    classes = _class_names(layout, folder / layout.meta)
    with ThreadPoolExecutor(1) as pool:  # checksums are computed beside the reading
        train, sums = _read_files(layout, [folder / file for file in layout.train], _TRAINING, pool)
        test, test_sums = _read_files(layout, [folder / layout.test], _TEST, pool)
    files = (*layout.train, layout.test)
    published = _PUBLISHED[layout.name]
    differ = [
        file
        for file, found, right in zip(files, [*sums, *test_sums], published, strict=True)
        if found != right
    ]
    if differ:
        _check_split(layout, folder, train, classes, "training")
        _check_split(layout, folder, test, classes, "test")
    if classes != PUBLISHED[layout.name]:
        differ.append(layout.meta)
    how = "the published split"
    remarks: tuple[str, ...] = ()
    if differ:
        how = f"the published split, but not its bytes in {', '.join(differ)}"
        remarks = (
            f"{shown(str(folder))} is not the published data set to the byte: "
            f"{', '.join(differ)} differ{'s' * (len(differ) == 1)}",
        )
    return Dataset(
        name=layout.name,
        classes=classes,
        train=train,
        test=test,
        mirror=True,
        source=f"{layout.folder}: {len(train):,} training and {len(test):,} test images, {how}",
        origin=str(folder.resolve()),
        remarks=remarks,
    )


def _check_split(
    layout: _Layout, folder: Path, split: Split, classes: tuple[str, ...], kind: str
) -> None:
    """Raise DataError if these cannot be the published images, damaged a little at most."""
    total = len(split)
    counts = split.labels.bincount(minlength=layout.classes)
    expected = total // layout.classes
    if bool((counts != expected).any()):
        worst = int((counts - expected).abs().argmax())
        raise DataError(
            f"{shown(str(folder))} is not the published data set: {int(counts[worst]):,} {kind} "
            f"images have the label {shown(classes[worst])}, expected {expected:,}; {_AGAIN}"
        )
    distinct = len({hash(image.tobytes()) for image in split.images.numpy()})
    if distinct < _LEAST_DISTINCT * total:
        raise DataError(
            f"{shown(str(folder))} is not the published data set: {total - distinct:,} of its "
            f"{total:,} {kind} images are copies of others, as of a file copied in part; {_AGAIN}"
        )


def _class_names(layout: _Layout, file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return CIFAR10
    names: object
    if layout.form == "binary":
        names = file.read_bytes().split()
    else:
        names = read_pickle(file).get(layout.names)
    if isinstance(names, list):
        decoded = tuple(text(name) for name in names if isinstance(name, str | bytes))
        if len(names) == len(set(decoded)) == layout.classes:
            return tuple(map(class_name, decoded))
    raise DataError(f"{shown(str(file))} does not hold {layout.classes} class names: {_AGAIN}")


def _read_files(
    layout: _Layout, files: list[Path], total: int, pool: ThreadPoolExecutor
) -> tuple[Split, list[str]]:
    """Read `total` images, as many from each of `files`; returns the files' SHA-1 sums, too."""
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
                pending.result()  # one block at a time, to bound memory
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


def _records(layout: _Layout, file: Path, count: int) -> Iterator[Bytes]:
    """The `count` records of a file in blocks, (n, label_bytes + 3072), as in the binary form."""
    if layout.form == "binary":
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


def _binary_records(layout: _Layout, file: Path, count: int) -> Iterator[Bytes]:
    record = layout.label_bytes + _PIXELS
    expected, found = count * record, file.stat().st_size
    if found != expected:
        raise DataError(
            f"{shown(str(file))} has the wrong size: expected {expected:,} bytes, found {found:,}; "
            f"{_AGAIN}"
        )
    with file.open("rb") as stream:
        for start in range(0, count, _BLOCK):
            wanted = min(_BLOCK, count - start) * record
            records = np.fromfile(stream, np.uint8, wanted)
            if len(records) != wanted:  # it became shorter meanwhile
                raise DataError(f"{shown(str(file))} ended early: {_AGAIN}")
            yield records.reshape(-1, record)


_Batch = tuple[Bytes, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]  # pixels, labels, coarse ones


def _read_batch(layout: _Layout, file: Path, count: int, coarse: str | None) -> _Batch:
    """A pickled dictionary of `count` images (N, 3072) and labels (N,)."""
    batch = read_pickle(file)
    data = batch.get("data")
    if not isinstance(data, PickledArray) or (pixels := data.pixels((count, _PIXELS))) is None:
        raise DataError(f"{shown(str(file))}: 'data' is not a uint8 array of {count:,} x 3,072")
    labels = _labels(batch.get(layout.labels), file, layout.labels, count, layout.classes)
    # Those of the twenty coarse classes serve for the checksum alone.
    other = batch.get(coarse) if coarse else None
    found = labels if other is None else _labels(other, file, coarse or "", count, 256)
    return pixels, labels, found


def _labels(values: object, file: Path, key: str, count: int, classes: int) -> Bytes:
    """A list of whole numbers as bytes; DataError if it is anything else."""
    if not isinstance(values, list) or not all(
        type(value) is int and value.bit_length() < 64 for value in values
    ):
        raise DataError(f"{shown(str(file))}: {key!r} is not a list of whole numbers")
    if len(values) != count:
        raise DataError(f"{shown(str(file))}: {count:,} images but {len(values):,} labels")
    wide = np.array(values, dtype=np.int64)
    _refuse_labels(file, np.flatnonzero((wide < 0) | (wide >= classes)), wide, classes)
    return wide.astype(np.uint8)


def _check_labels(file: Path, labels: npt.NDArray[np.int64], layout: _Layout) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= layout.classes))
    _refuse_labels(file, wrong, labels, layout.classes)


def _refuse_labels(
    file: Path, wrong: npt.NDArray[np.intp], labels: npt.NDArray[np.int64], classes: int
) -> None:
    if len(wrong):
        raise DataError(
            f"{shown(str(file))}: record {wrong[0]} (the first is 0) has label {labels[wrong[0]]}, "
            f"expected 0 to {classes - 1}; {_AGAIN}"
        )


def empty_split(count: int) -> Split:
    """A split of `count` images to be filled in."""
    images = torch.empty((count, 3, 32, 32), dtype=torch.uint8)
    return Split(images, torch.empty(count, dtype=torch.int64))
