"""Load data sets: CIFAR-10 and CIFAR-100 in all formats, image directories, and the digits.

Each data set becomes a `Dataset` of 32x32 RGB images in memory. Files are untrusted. For every
damaged or malicious file, the functions raise a `DataError` with a one-line message.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnet56.data import download
from resnet56.data.archives import UnpackError, unpack
from resnet56.data.cifar import ARCHIVES, LAYOUTS, find_layout, load_cifar
from resnet56.data.class_names import DIGITS
from resnet56.data.dataset import Dataset, Split
from resnet56.data.image_directory import load_image_directory
from resnet56.data.image_files import find_images
from resnet56.errors import DataError, UsageError, escape, one_line, option
from resnet56.files import StrPath

NAMES = ("digits", *download.ARCHIVES)


def load_data(data: StrPath, *, evaluation: bool = False, skip_broken: bool = False) -> Dataset:
    """Load a data set by name, or from a directory or an archive.

    The names are "digits", "cifar10" and "cifar100". CIFAR is downloaded if necessary. A directory
    takes precedence over a data set with the same name. `Dataset.remarks` reports unusual data.

    Args:
        data: the name of a data set, or a path as in `load_directory`.
        evaluation: load the data set for evaluation only, which requires only test images.
        skip_broken: skip images that cannot be read and add a remark, instead of raising an error.

    Raises:
        UsageError: `data` is empty or is not a known name.
        DataError: the data set cannot be read.
        DownloadError: the data set cannot be downloaded.
    """
    name = os.fspath(data)
    if not name.strip():
        raise UsageError(
            f"{option('data')} is empty; use {', '.join(NAMES)} or an existing directory"
        )
    if name in NAMES and not Path(name).is_dir():
        return load_digits() if name == "digits" else load_directory(fetch(name))
    if not Path(name).exists() and not re.search(r"[/\\.]", name):
        raise UsageError(
            f"unknown data set {name!r}; use {', '.join(NAMES)} or an existing directory"
        )
    dataset = load_directory(name, evaluation=evaluation, skip_broken=skip_broken)
    if name in NAMES:
        path = escape(str(Path(name).resolve()))
        remark = f"loaded the directory {path} instead of the data set {name}"
        dataset = replace(dataset, remarks=(remark, *dataset.remarks))
    return dataset


def fetch(name: str, root: Path | None = None, mirrors: Sequence[str] = ()) -> Path:
    """Download CIFAR-10 or CIFAR-100 if necessary, with a progress bar.

    Return the directory of the data set.

    Args:
        name: "cifar10" or "cifar100".
        root: directory for data sets. By default, `download.default_root()`.
        mirrors: URLs to try before the official URL.

    Raises:
        DownloadError: the archive cannot be downloaded.
    """
    from resnet56.progress import DownloadProgress

    archive = download.ARCHIVES[name]
    with DownloadProgress(archive.filename) as progress:
        return download.fetch(
            archive, root or download.default_root(), mirrors=mirrors, progress=progress
        )


def load_digits() -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, upsampled from 8x8 grayscale to 32x32 RGB.

    scikit-learn includes the images, so nothing is downloaded. The test split is a fixed stratified
    fifth of the images.
    """
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    grays = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # original pixels are 0..16
    images = torch.empty((len(grays), 3, 32, 32), dtype=torch.uint8)
    for index, gray in enumerate(grays):
        upsampled = Image.fromarray(gray).resize((32, 32), Image.Resampling.BICUBIC)
        images[index] = torch.from_numpy(np.array(upsampled))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target
    )
    return Dataset(
        name="digits",
        classes=DIGITS,
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        allow_flip=False,
        source=f"scikit-learn's digits: {len(train):,} training and {len(test):,} test images, "
        "a fixed stratified 80/20 split",
        origin="digits",
    )


def load_directory(
    path: StrPath, *, evaluation: bool = False, skip_broken: bool = False
) -> Dataset:
    """Load the data set from a directory or an archive.

    The function supports CIFAR-10 and CIFAR-100 (fine labels) in the binary and Python formats. The
    files can be in `path` or in a subdirectory with the published name. The function unpacks a
    published archive into the directory that contains it. It compares the data with the published
    data. It adds a remark for a minor difference, and raises an error for a major difference.

    The function also supports image directories (see `image_directory.load_image_directory`).

    Args:
        path: a directory or an archive. A leading ~ is expanded to the home directory.
        evaluation: load the data set for evaluation only, which requires only test images.
        skip_broken: skip images that cannot be read and add a remark, instead of raising an error.

    Raises:
        DataError: the data set cannot be read.
    """
    path = Path(path).expanduser() if str(path).startswith("~") else Path(path)
    name = escape(str(path))
    try:
        if path.name in ARCHIVES and path.is_file():
            return _load_archive(path)
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise DataError(f"{name} {problem}; specify the directory of the data set")
        if next(path.iterdir(), None) is None:
            raise DataError(f"{name} is empty; specify the directory of the data set")
        if found := find_layout(path):
            return load_cifar(*found)
        dataset = load_image_directory(path, evaluation=evaluation, skip_broken=skip_broken)
        if dataset is not None:
            return dataset
        for archive in ARCHIVES:
            if (path / archive).is_file():
                return _load_archive(path / archive)
        if any(path.rglob("*.mat")) or any(path.glob("*-matlab.tar.gz")):
            # SciPy's MATLAB reader crashes the process on some damaged files.
            raise DataError(
                f"{name} contains MATLAB files, which are not supported; use the binary format "
                "(resnet56 data fetch)"
            )
        if any(path.rglob("*.parquet")):
            raise DataError(
                f"{name} contains Parquet files, which are not supported; save the images as "
                "train/<class>/*.png and test/<class>/*.png (with pyarrow or datasets)"
            )
        if images := find_images(path).files:
            count = f"{len(images):,} image{'s' * (len(images) > 1)}"
            raise DataError(
                f"{name} contains {count} but fewer than two class directories; put the images of "
                "each class in their own directory, such as train/<class>/ or <class>/"
            )
    except OSError as error:
        reason = error.strerror or one_line(error)
        source = escape(str(error.filename or path))
        raise DataError(f"cannot read {source}: {reason}") from error
    layouts = ", ".join(layout.directory for layout in LAYOUTS)
    raise DataError(
        f"{name} has an unknown layout; expected {layouts}, one of their archives, or images in "
        "train/<class>/ or <class>/"
    )


def _load_archive(archive: Path) -> Dataset:
    """Load a published archive. Unpack the archive if its directory is missing."""
    directory = archive.with_name(ARCHIVES[archive.name])
    if not directory.is_dir():
        try:
            with archive.open("rb") as file:
                unpack(file, archive.parent, directory.name)
        except UnpackError as error:
            raise DataError(
                f"{escape(str(archive))} cannot be unpacked: {error}; download it again"
            ) from error
    found = find_layout(directory)
    if found is None:
        raise DataError(
            f"{escape(str(archive))} does not contain {directory.name}; download it again"
        )
    return load_cifar(*found)
