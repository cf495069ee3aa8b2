"""Read a data set: CIFAR-10 and CIFAR-100 in all forms, image folders, scikit-learn's digits.

Everything becomes one `Dataset` of 32x32 RGB bytes held in memory. Files are taken as hostile or
damaged until they have shown otherwise: whatever is wrong with them is a one-line `DataError`.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnet56.data.archives import UnpackError, unpack
from resnet56.data.cifar import ARCHIVES, LAYOUTS, layout_in, load_cifar
from resnet56.data.class_names import DIGITS
from resnet56.data.dataset import Dataset, Split
from resnet56.data.folders import load_image_folder
from resnet56.errors import DataError, one_line, shown


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
        classes=DIGITS,
        train=Split(images[kept], labels[kept]),
        test=Split(images[held], labels[held]),
        mirror=False,
        source=f"scikit-learn's digits: {len(kept):,} training and {len(held):,} test images, "
        "a fixed stratified 80/20 split",
        origin="digits",
    )


def load_folder(path: Path, *, evaluation: bool = False, skip_broken: bool = False) -> Dataset:
    """The data set in `path`, or in the folder of a CIFAR archive's usual name inside it.

    Read are CIFAR-10 and CIFAR-100 (with its fine labels) in their binary and Python forms, as
    folders or as the published archives, which are unpacked beside themselves; and images in
    folders, see `folders.load_image_folder`. The images of CIFAR are compared with the published
    ones: what cannot be them is refused, and a small difference is remarked on.

    Args:
        path: a folder or an archive; a leading ~ is the home directory.
        evaluation: the images are to be measured only, so that test images alone will do.
        skip_broken: leave out images that cannot be read, with a remark, instead of raising.

    Raises:
        DataError: anything cannot be read; the message names it and says what to do.
    """
    path = Path(path).expanduser() if str(path).startswith("~") else Path(path)
    name = shown(str(path))
    try:
        if path.name in ARCHIVES and path.is_file():
            return _load_archive(path)
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise DataError(f"{name} {what}: give the folder that holds the data set")
        if next(path.iterdir(), None) is None:
            raise DataError(f"{name} is empty: give the folder that holds the data set")
        if found := layout_in(path):
            return load_cifar(*found)
        dataset = load_image_folder(path, evaluation=evaluation, skip_broken=skip_broken)
        if dataset is not None:
            return dataset
        for archive in ARCHIVES:
            if (path / archive).is_file():
                return _load_archive(path / archive)
        if any(path.rglob("*.mat")) or any(path.glob("*-matlab.tar.gz")):
            # SciPy's reader, the one at hand, ends the whole process on some damaged files.
            raise DataError(
                f"{name} holds MATLAB files, which are not read: take the binary form "
                "(resnet56 data fetch)"
            )
        if any(path.rglob("*.parquet")):
            raise DataError(
                f"{name} holds Parquet files, which are not read: save the images as "
                "train/<class>/*.png and test/<class>/*.png (with pyarrow or datasets)"
            )
    except OSError as error:
        reason = error.strerror or one_line(error)
        where = shown(str(error.filename or path))
        raise DataError(f"cannot read {where}: {reason}") from error
    known = ", ".join(layout.folder for layout in LAYOUTS)
    raise DataError(
        f"{name} has no known layout: expected {known}, one of their archives, or images in "
        "train/<class>/ or <class>/"
    )


def _load_archive(archive: Path) -> Dataset:
    """Unpack a published archive beside itself, if its folder is not there yet, and read that."""
    folder = archive.with_name(ARCHIVES[archive.name])
    if not folder.is_dir():
        try:
            with archive.open("rb") as file:
                unpack(file, archive.parent, folder.name)
        except UnpackError as error:
            raise DataError(
                f"{shown(str(archive))} cannot be unpacked: {error}; download it again"
            ) from error
    found = layout_in(folder)
    if found is None:
        raise DataError(f"{shown(str(archive))} holds no {folder.name}: download it again")
    return load_cifar(*found)
