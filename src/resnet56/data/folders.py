"""Image folders as data sets: a folder per class, or one folder and a table of labels."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resnet56.data.dataset import Dataset, Split, class_name, hold_out, match_classes
from resnet56.data.image_files import find_images, is_visible, remark_on, visible_folders
from resnet56.data.images import read_pixels
from resnet56.errors import DataError, ImageError, one_line, shown

_ROLES = {
    "train": {"train", "training", "trn"},
    "test": {"test", "testing", "tst"},
    "validation": {"val", "valid", "validation", "dev", "eval", "evaluation"},
}
_ID_COLUMNS = (
    "id",
    "image_id",
    "imageid",
    "file",
    "filename",
    "file_name",
    "image",
    "name",
    "path",
)
_LABEL_COLUMNS = ("label", "class", "category", "target", "labels", "class_name")
_MOST_NAMED = 10  # broken images in one message
_TABLE_BYTES = 1 << 28

Files = dict[str, list[Path]]  # the images of each class


@dataclass
class _Reader:
    """What the parts of one data set share: remarks, and what to do about broken images."""

    path: Path
    skip_broken: bool
    evaluation: bool
    passed_over: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def files_of(self, root: Path) -> Files:
        """The image files of each class folder in `root`, classes sorted by name."""
        found: Files = {}
        for folder in visible_folders(root):
            name = class_name(folder.name)
            images = find_images(folder)
            self.passed_over += images.passed_over
            if images.files:
                found.setdefault(name, []).extend(images.files)
            elif not self.evaluation:
                raise DataError(
                    f"{shown(str(folder))} holds no images: add some, or remove the folder"
                    + _in_brackets(remark_on(images.passed_over))
                )
        return dict(sorted(found.items()))

    def read(self, files: Files, classes: Sequence[str]) -> Split:
        """The images of each class. Raises DataError naming those that cannot be read."""
        index = {name: number for number, name in enumerate(classes)}
        labeled = [(file, index[name]) for name in files for file in files[name]]
        images = torch.empty((len(labeled), 3, 32, 32), dtype=torch.uint8)
        labels: list[int] = []
        broken: list[str] = []
        for file, label in labeled:
            try:
                pixels = read_pixels(file)
            except ImageError as error:
                broken.append(str(error).removeprefix("cannot read "))
                continue
            images[len(labels)] = torch.from_numpy(pixels)
            labels.append(label)
        if broken:
            self._tell_broken(broken)
        return Split(images[: len(labels)], torch.tensor(labels, dtype=torch.int64))

    def _tell_broken(self, broken: list[str]) -> None:
        named = "; ".join(broken[:_MOST_NAMED])
        more = f"; and {len(broken) - _MOST_NAMED:,} more" if len(broken) > _MOST_NAMED else ""
        if self.skip_broken:
            them = f"{len(broken):,} image{'s' * (len(broken) > 1)}"
            self.remarks.append(f"left out {them} that cannot be read: {named}{more}")
            return
        them = "it" if len(broken) == 1 else "them"
        count = "" if len(broken) == 1 else f"{len(broken):,} images: "
        raise DataError(
            f"cannot read {count}{named}{more}; repair or remove {them}, or leave {them} out with "
            "--skip-broken"
        )

    def dataset(
        self, classes: Sequence[str], train: Split, test: Split, how: str, *, divided: bool = True
    ) -> Dataset:
        name = self.path.resolve().name
        if passed_over := remark_on(self.passed_over):
            self.remarks.append(passed_over)
        return Dataset(
            name=name,
            classes=tuple(classes),
            train=train,
            test=test,
            mirror=True,
            source=f"images in {shown(name)}: {len(train):,} training and {len(test):,} test "
            f"images, {how}",
            origin=str(self.path.resolve()),
            remarks=tuple(self.remarks),
            divided=divided,
        )


def load_image_folder(
    path: Path, *, evaluation: bool = False, skip_broken: bool = False
) -> Dataset | None:
    """The images below `path`; None if they lie in no order that is known.

    Known are `train/<class>/*`, with `test/<class>/*` or, where there is none, `val/<class>/*` as
    the test part; a `train/` of images without folders and a table of their labels (.csv); and
    `<class>/*`. What has no test part is split: a fixed stratified fifth becomes one.

    Args:
        path: an existing folder.
        evaluation: the images are to be measured, not trained on: a test part alone will do, one
            class, classes that train/ lacks, and empty class folders.
        skip_broken: leave out images that cannot be read, with a remark, instead of raising.

    Raises:
        DataError: an image cannot be read, or it is not clear which images are which.
        OSError: a folder cannot be read.
    """
    reader = _Reader(path, skip_broken, evaluation)
    parts = {role: _parts(path, role) for role in _ROLES}
    if len(parts["train"]) > 1:
        raise DataError(f"{shown(str(path))} has {_names(parts['train'])}: keep one of them")
    if parts["train"]:
        [train] = parts["train"]
        files = reader.files_of(train)
        if not files and (table := _labels_table(path, train)):
            return _load_table(reader, train, table, parts)
        return _load_parts(reader, train, files, parts)
    if evaluation and (parts["test"] or parts["validation"]):
        test = _one_of(path, parts["test"] or parts["validation"])
        files = reader.files_of(test)
        classes = tuple(files)
        images = reader.read(files, classes)
        if not len(images):
            raise DataError(f"{shown(str(test))} has no class folders with images: fill it")
        return reader.dataset(classes, _none_of(images), images, f"{test.name}/ alone")
    return _load_classes(reader)


def _load_parts(
    reader: _Reader, train: Path, files: Files, parts: dict[str, list[Path]]
) -> Dataset:
    """train/<class>/* with a test part beside it, or without one."""
    classes = tuple(files)
    if len(classes) < 2 and not reader.evaluation:
        raise DataError(
            f"{shown(str(train))}: expected two or more class folders, found {len(classes)}; "
            "put the images of each class in a folder of their own"
        )
    choices = parts["test"] or parts["validation"]
    if not choices:
        _refuse_unused(reader.path, train, classes)
        return _split_off(
            reader, files, f"no test/ folder, so a fixed stratified 80/20 split of {train.name}/"
        )
    test = _one_of(reader.path, choices)
    test_files = reader.files_of(test)
    if not test_files:
        raise DataError(f"{shown(str(test))} has no class folders: fill it, or remove it")
    if parts["test"]:
        for unused in parts["validation"]:
            count = sum(len(find_images(folder).files) for folder in visible_folders(unused))
            reader.remarks.append(f"{shown(unused.name)}/ is not used ({count:,} images)")
    known, remarks = match_classes(tuple(test_files), classes)
    reader.remarks += remarks
    others = [name for name in test_files if name not in known]
    if others and not reader.evaluation:
        raise DataError(f"{shown(str(test / others[0]))} is a class that {train.name}/ lacks")
    classes = (*classes, *others)
    renamed: Files = {}
    for name, images in test_files.items():
        renamed.setdefault(known.get(name, name), []).extend(images)
    how = "split by its folders" if parts["test"] else f"the test images from {test.name}/"
    return reader.dataset(classes, reader.read(files, classes), reader.read(renamed, classes), how)


def _load_classes(reader: _Reader) -> Dataset | None:
    """<class>/*: no folder says which images are for what."""
    nested = [
        folder.name
        for folder in visible_folders(reader.path)
        if any(_role(inner.name) for inner in visible_folders(folder))
    ]
    if nested:
        raise DataError(
            f"{shown(str(reader.path / nested[0]))} looks like a data set of its own: give that "
            "folder"
        )
    lenient = _Reader(reader.path, reader.skip_broken, evaluation=True)  # others may lie there, too
    files = lenient.files_of(reader.path)
    reader.passed_over = lenient.passed_over
    if len(files) < (1 if reader.evaluation else 2):
        return None
    empty = [f.name for f in visible_folders(reader.path) if class_name(f.name) not in files]
    if empty:
        reader.remarks.append(f"{_quoted(empty)}: no images there, so no class")
    how = "no train/ folder, so a fixed stratified 80/20 split of its classes"
    return _split_off(reader, files, how, divided=False)


def _load_table(reader: _Reader, train: Path, table: Path, parts: dict[str, list[Path]]) -> Dataset:
    """A folder of images and a table of their labels, as Kaggle hands them out."""
    labels = _read_table(table)
    found = find_images(train)
    reader.passed_over += found.passed_over
    files: Files = {}
    unnamed = []
    for file in found.files:
        keys = (file.relative_to(train).as_posix(), file.name, file.stem)
        label = next((labels[key] for key in keys if key in labels), None)
        if label is None:
            unnamed.append(file)
        else:
            files.setdefault(class_name(label), []).append(file)
    if unnamed:
        raise DataError(
            f"{shown(table.name)} has no row for {len(unnamed):,} of the {len(found.files):,} "
            f"images in {train.name}/, the first {shown(unnamed[0].name)}: add the rows, or move "
            "the images away"
        )
    if len(labels) > len(found.files):
        reader.remarks.append(
            f"{len(labels) - len(found.files):,} rows of {shown(table.name)} name no image in "
            f"{train.name}/"
        )
    reader.remarks += [
        f"{shown(folder.name)}/ is not used: {shown(table.name)} has labels for {train.name}/ alone"
        for folder in (*parts["test"], *parts["validation"])
    ]
    files = dict(sorted(files.items()))
    if len(files) < 2:
        raise DataError(f"{shown(str(table))}: expected two or more classes, found {len(files)}")
    how = f"labels from {shown(table.name)}, a fixed stratified 80/20 split of {train.name}/"
    return _split_off(reader, files, how)


def _labels_table(path: Path, train: Path) -> Path | None:
    """The table of labels beside or in train/; None if it holds no images without a folder."""
    if not find_images(train).files:
        return None
    tables = [
        table
        for table in sorted([*path.glob("*.csv"), *train.glob("*.csv")])
        if is_visible(table.name)
        and "submission" not in table.name.lower()
        and _columns(_header(table)) is not None
    ]
    of_training = [table for table in tables if "train" in table.name.lower()]
    tables = of_training or tables
    if len(tables) > 1:
        raise DataError(f"{shown(str(path))} has several tables of labels: keep {_names(tables)}")
    if not tables:
        raise DataError(
            f"{shown(str(train))} holds images without class folders: put those of each class in a "
            "folder of their own, or a table (.csv) with the columns id and label beside it"
        )
    return tables[0]


def _header(table: Path) -> list[str]:
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        line = stream.readline(10_000)
    return [cell.strip().strip('"').lower() for cell in line.split(",")]


def _columns(header: Sequence[str]) -> tuple[int, int] | None:
    """Where a table has the images' names and their labels."""
    names = [header.index(name) for name in _ID_COLUMNS if name in header]
    labels = [header.index(name) for name in _LABEL_COLUMNS if name in header]
    return (names[0], labels[0]) if names and labels and names[0] != labels[0] else None


def _read_table(table: Path) -> dict[str, str]:
    if table.stat().st_size > _TABLE_BYTES:
        raise DataError(f"{shown(str(table))} is too large for a table of labels")
    columns = _columns(_header(table))
    assert columns is not None, "chosen by its header"
    labels: dict[str, str] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream)
            next(rows, None)
            for row in rows:
                if not row:
                    continue
                name, label = (row[column].strip() for column in columns)
                if labels.setdefault(name, label) != label:
                    raise DataError(
                        f"{shown(str(table))}: line {rows.line_num} gives {shown(name)} a second "
                        "label"
                    )
    except IndexError:
        raise DataError(f"{shown(str(table))}: line {rows.line_num} lacks a column") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {shown(str(table))}: {one_line(error)}") from error
    return labels


def _split_off(reader: _Reader, files: Files, how: str, *, divided: bool = True) -> Dataset:
    """A fixed stratified fifth becomes the test part."""
    classes = tuple(files)
    images = reader.read(files, classes)
    counts = images.labels.bincount(minlength=len(classes))
    if not reader.evaluation:
        for name, count in zip(classes, counts.tolist(), strict=True):
            if count < 2:
                kept = "one image" if count else "no image that can be read"
                raise DataError(
                    f"{shown(str(files[name][0].parent))} has {kept}, too few to split off a test "
                    "part: add images, or a test/ folder"
                )
    if not bool((counts > 1).any()):  # to be measured: too few for two parts
        return reader.dataset(classes, _none_of(images), images, "all of them", divided=divided)
    most = int((counts - 1).clamp(min=0).sum())
    train, test = hold_out(images, min(most, max(len(classes), len(images) // 5)))
    return reader.dataset(classes, train, test, how, divided=divided)


def _refuse_unused(path: Path, train: Path, classes: Sequence[str]) -> None:
    """Raise DataError if a folder of the same classes lies beside train/ and is not used."""
    for folder in visible_folders(path):
        if folder == train:
            continue
        names = [inner.name for inner in visible_folders(folder)]
        if match_classes(names, classes)[0]:
            raise DataError(
                f"{shown(str(folder))} has the classes of {train.name}/, and it is not clear what "
                "for: rename it to test/ to test on it, or move it away"
            )


def _one_of(path: Path, folders: Sequence[Path]) -> Path:
    if len(folders) > 1:
        raise DataError(
            f"{shown(str(path))} has {_names(folders)}: rename the one to test on to test/"
        )
    return folders[0]


def _parts(path: Path, role: str) -> list[Path]:
    """The folders in `path` of that role, however they are spelled."""
    found = []
    for entry in sorted(path.iterdir()):
        if is_visible(entry.name) and _role(entry.name) == role:
            if entry.is_dir():
                found.append(entry)
            elif not entry.suffix:
                raise DataError(f"cannot read {shown(str(entry))}: it is not a folder")
    return found


def _role(name: str) -> str | None:
    """What a folder's name says it is for: 'Training_Set' is train."""
    plain = re.sub(r"[\s_-]", "", name.casefold())
    plain = re.sub(r"(set|images|data|split)$", "", plain)
    return next((role for role, names in _ROLES.items() if plain in names), None)


def _none_of(split: Split) -> Split:
    return Split(split.images[:0], split.labels[:0])


def _names(paths: Sequence[Path]) -> str:
    return " and ".join(shown(path.name) + "/" * path.is_dir() for path in paths)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"{shown(name)}/" for name in names[:3]) + ", ..." * (len(names) > 3)


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""
