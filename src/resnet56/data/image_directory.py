"""Load image data sets with a directory per class, or with one directory and a table of labels."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resnet56.data.dataset import (
    Dataset,
    Split,
    match_classes,
    normalize_class_name,
    stratified_split,
)
from resnet56.data.image_files import describe_skipped, find_images, is_visible, visible_directories
from resnet56.data.images import read_pixels
from resnet56.errors import DataError, ImageError, escape, one_line, option

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
_MAX_LISTED = 10  # maximum number of broken images that a message lists
_MAX_TABLE_BYTES = 1 << 28

Files = dict[str, list[Path]]  # class -> images


@dataclass
class _Reader:
    """Reads the splits of a data set, collects remarks and handles broken images."""

    path: Path
    skip_broken: bool
    evaluation: bool
    skipped: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def find_files(self, root: Path) -> Files:
        """Find the image files of each class directory in `root`, sorted by class name."""
        files: Files = {}
        for directory in visible_directories(root):
            name = normalize_class_name(directory.name)
            images = find_images(directory)
            self.skipped += images.skipped
            if images.files:
                files.setdefault(name, []).extend(images.files)
            elif not self.evaluation:
                raise DataError(
                    f"{escape(str(directory))} contains no images; add some, or remove it"
                    + _in_parentheses(describe_skipped(images.skipped))
                )
        return dict(sorted(files.items()))

    def read(self, files: Files, classes: Sequence[str]) -> Split:
        """Read the images of each class. Skip broken images, or raise DataError."""
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
            self._report_broken(broken)
        return Split(images[: len(labels)], torch.tensor(labels, dtype=torch.int64))

    def _report_broken(self, broken: list[str]) -> None:
        listed = "; ".join(broken[:_MAX_LISTED])
        more = f"; and {len(broken) - _MAX_LISTED:,} more" if len(broken) > _MAX_LISTED else ""
        if self.skip_broken:
            count = f"{len(broken):,} image{'s' * (len(broken) > 1)}"
            self.remarks.append(f"skipped {count} that cannot be read: {listed}{more}")
            return
        pronoun = "it" if len(broken) == 1 else "them"
        count = "" if len(broken) == 1 else f"{len(broken):,} images: "
        raise DataError(
            f"cannot read {count}{listed}{more}; repair or remove {pronoun}, or skip {pronoun} "
            f"with {option('skip_broken', True)}"
        )

    def dataset(
        self,
        classes: Sequence[str],
        train: Split,
        test: Split,
        description: str,
        *,
        predefined_split: bool = True,
    ) -> Dataset:
        name = self.path.resolve().name
        if remark := describe_skipped(self.skipped):
            self.remarks.append(remark)
        return Dataset(
            name=name,
            classes=tuple(classes),
            train=train,
            test=test,
            allow_flip=True,
            source=f"images in {escape(name)}: {len(train):,} training and {len(test):,} test "
            f"images, {description}",
            origin=str(self.path.resolve()),
            remarks=tuple(self.remarks),
            predefined_split=predefined_split,
        )


def load_image_directory(
    path: Path, *, evaluation: bool = False, skip_broken: bool = False
) -> Dataset | None:
    """Load the images from `path`. Return None if the layout of the directory is unknown.

    The known layouts are:

    - `train/<class>/*`, with a test split in `test/<class>/*` or, without test/, in
      `val/<class>/*`
    - images in `train/`, with a table of their labels (.csv)
    - `<class>/*`

    If there is no test split, a fixed stratified fifth of the images forms the test split.

    Args:
        path: an existing directory.
        evaluation: load the data set for evaluation only. The directory may then contain only a
            test split, a single class, classes that are not in train/, or empty class directories.
        skip_broken: skip images that cannot be read and add a remark, instead of raising an error.

    Raises:
        DataError: an image cannot be read, or the purpose of a directory is unclear.
        OSError: a directory cannot be read.
    """
    reader = _Reader(path, skip_broken, evaluation)
    parts = {role: _find_splits(path, role) for role in _ROLES}
    if len(parts["train"]) > 1:
        raise DataError(
            f"{escape(str(path))} contains {_join_names(parts['train'])}; keep one of them"
        )
    if parts["train"]:
        [train] = parts["train"]
        files = reader.find_files(train)
        if not files and (table := _labels_table(path, train)):
            return _load_table(reader, train, table, parts)
        return _load_splits(reader, train, files, parts)
    if evaluation and (parts["test"] or parts["validation"]):
        test = _single(path, parts["test"] or parts["validation"])
        files = reader.find_files(test)
        classes = tuple(files)
        images = reader.read(files, classes)
        if not len(images):
            raise DataError(
                f"{escape(str(test))} contains no class directories with images; add some"
            )
        return reader.dataset(classes, _empty_like(images), images, f"{test.name}/ only")
    return _load_classes(reader)


def _load_splits(
    reader: _Reader, train: Path, files: Files, parts: dict[str, list[Path]]
) -> Dataset:
    """Load the layout train/<class>/*, with or without a test split next to train/."""
    classes = tuple(files)
    if len(classes) < 2 and not reader.evaluation:
        raise DataError(
            f"{escape(str(train))}: expected at least two class directories, found {len(classes)}; "
            "put the images of each class in a separate directory"
        )
    choices = parts["test"] or parts["validation"]
    if not choices:
        _reject_ambiguous(reader.path, train, classes)
        return _split_off_test(
            reader, files, f"no test/ directory, so a fixed stratified 80/20 split of {train.name}/"
        )
    test = _single(reader.path, choices)
    test_files = reader.find_files(test)
    if not test_files:
        raise DataError(
            f"{escape(str(test))} contains no class directories; add some, or remove it"
        )
    if parts["test"]:
        for unused in parts["validation"]:
            count = sum(len(find_images(path).files) for path in visible_directories(unused))
            reader.remarks.append(f"{escape(unused.name)}/ is not used ({count:,} images)")
    matches, remarks = match_classes(tuple(test_files), classes)
    reader.remarks += remarks
    others = [name for name in test_files if name not in matches]
    if others and not reader.evaluation:
        raise DataError(
            f"{escape(str(test / others[0]))} is not a class in {train.name}/; add it there, or "
            "remove it"
        )
    classes = (*classes, *others)
    renamed: Files = {}
    for name, images in test_files.items():
        renamed.setdefault(matches.get(name, name), []).extend(images)
    description = "split by directory" if parts["test"] else f"test images from {test.name}/"
    return reader.dataset(
        classes, reader.read(files, classes), reader.read(renamed, classes), description
    )


def _load_classes(reader: _Reader) -> Dataset | None:
    """Load the layout <class>/*, which does not define a split."""
    nested = [
        directory.name
        for directory in visible_directories(reader.path)
        if any(_role(inner.name) for inner in visible_directories(directory))
    ]
    if nested:
        raise DataError(
            f"{escape(str(reader.path / nested[0]))} looks like a separate data set; use that "
            "directory instead"
        )
    # In this layout, class directories may be empty, even if the data set is for training.
    lenient = _Reader(reader.path, reader.skip_broken, evaluation=True)
    files = lenient.find_files(reader.path)
    reader.skipped = lenient.skipped
    if len(files) < (1 if reader.evaluation else 2):
        return None
    empty = [
        f.name
        for f in visible_directories(reader.path)
        if normalize_class_name(f.name) not in files
    ]
    if empty:
        reader.remarks.append(f"skipped {_join_directories(empty)}: no images")
    description = "no train/ directory, so a fixed stratified 80/20 split of all images"
    return _split_off_test(reader, files, description, predefined_split=False)


def _load_table(reader: _Reader, train: Path, table: Path, parts: dict[str, list[Path]]) -> Dataset:
    """Load images with a table of labels. This layout is common on Kaggle."""
    labels = _read_table(table)
    found = find_images(train)
    reader.skipped += found.skipped
    files: Files = {}
    unlabeled = []
    for file in found.files:
        keys = (file.relative_to(train).as_posix(), file.name, file.stem)
        label = next((labels[key] for key in keys if key in labels), None)
        if label is None:
            unlabeled.append(file)
        else:
            files.setdefault(normalize_class_name(label), []).append(file)
    if unlabeled:
        raise DataError(
            f"{escape(table.name)} has no row for {len(unlabeled):,} of the {len(found.files):,} "
            f"images in {train.name}/, for example {escape(unlabeled[0].name)}; add the rows, or "
            "remove the images"
        )
    if len(labels) > len(found.files):
        reader.remarks.append(
            f"{train.name}/ has no image for {len(labels) - len(found.files):,} of the "
            f"{len(labels):,} rows of {escape(table.name)}"
        )
    reader.remarks += [
        f"{escape(unused.name)}/ is not used, because {escape(table.name)} has labels only for "
        f"{train.name}/"
        for unused in (*parts["test"], *parts["validation"])
    ]
    files = dict(sorted(files.items()))
    if len(files) < 2:
        raise DataError(f"{escape(str(table))}: expected at least two classes, found {len(files)}")
    description = (
        f"labels from {escape(table.name)}, a fixed stratified 80/20 split of {train.name}/"
    )
    return _split_off_test(reader, files, description)


def _labels_table(path: Path, train: Path) -> Path | None:
    """Find the table of labels in train/ or next to it. Return None if train/ has no images."""
    if not find_images(train).files:
        return None
    tables = [
        table
        for table in sorted([*path.glob("*.csv"), *train.glob("*.csv")])
        if is_visible(table.name)
        and "submission" not in table.name.lower()
        and _columns(_header(table)) is not None
    ]
    train_tables = [table for table in tables if "train" in table.name.lower()]
    tables = train_tables or tables
    if len(tables) > 1:
        raise DataError(
            f"{escape(str(path))} contains several tables of labels, {_join_names(tables)}; "
            "keep one"
        )
    if not tables:
        raise DataError(
            f"{escape(str(train))} contains images outside class directories; put the images of "
            "each class in a separate directory, or add a table (.csv) with the columns id and "
            "label"
        )
    return tables[0]


def _header(table: Path) -> list[str]:
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        line = stream.readline(10_000)
    return [cell.strip().strip('"').lower() for cell in line.split(",")]


def _columns(header: Sequence[str]) -> tuple[int, int] | None:
    """Return the indices of the image and label columns, or None if a column is missing."""
    names = [header.index(name) for name in _ID_COLUMNS if name in header]
    labels = [header.index(name) for name in _LABEL_COLUMNS if name in header]
    return (names[0], labels[0]) if names and labels and names[0] != labels[0] else None


def _read_table(table: Path) -> dict[str, str]:
    if table.stat().st_size > _MAX_TABLE_BYTES:
        raise DataError(
            f"{escape(str(table))} is too large for a table of labels; the limit is 256 MiB"
        )
    columns = _columns(_header(table))
    assert columns is not None, "only tables with these columns are selected"
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
                        f"{escape(str(table))}: line {rows.line_num} assigns {escape(name)} a "
                        "different label than an earlier line"
                    )
    except IndexError:
        raise DataError(f"{escape(str(table))}: line {rows.line_num} has too few columns") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {escape(str(table))}: {one_line(error)}") from error
    return labels


def _split_off_test(
    reader: _Reader, files: Files, description: str, *, predefined_split: bool = True
) -> Dataset:
    """Use a fixed stratified fifth of the images as the test split."""
    classes = tuple(files)
    images = reader.read(files, classes)
    counts = images.labels.bincount(minlength=len(classes))
    if not reader.evaluation:
        for name, count in zip(classes, counts.tolist(), strict=True):
            if count < 2:
                found = "only one image" if count else "no readable images"
                raise DataError(
                    f"{escape(str(files[name][0].parent))} has {found}, too few for a test split; "
                    "add images, or a test/ directory"
                )
    # If no class had two images, the training split would be empty.
    if not bool((counts > 1).any()):
        return reader.dataset(
            classes, _empty_like(images), images, "not split", predefined_split=predefined_split
        )
    largest = int((counts - 1).clamp(min=0).sum())
    train, test = stratified_split(images, min(largest, max(len(classes), len(images) // 5)))
    return reader.dataset(classes, train, test, description, predefined_split=predefined_split)


def _reject_ambiguous(path: Path, train: Path, classes: Sequence[str]) -> None:
    """Raise DataError if another directory next to train/ has a class in common with train/."""
    for directory in visible_directories(path):
        if directory == train:
            continue
        names = [inner.name for inner in visible_directories(directory)]
        if match_classes(names, classes)[0]:
            raise DataError(
                f"{escape(str(directory))} contains classes of {train.name}/, but its purpose is "
                "unclear; rename it to test/ to use it for testing, or move it elsewhere"
            )


def _single(path: Path, directories: Sequence[Path]) -> Path:
    if len(directories) > 1:
        raise DataError(
            f"{escape(str(path))} contains {_join_names(directories)}; rename the one for testing "
            "to test/"
        )
    return directories[0]


def _find_splits(path: Path, role: str) -> list[Path]:
    """Find the directories in `path` whose names imply `role`."""
    found = []
    for entry in sorted(path.iterdir()):
        if is_visible(entry.name) and _role(entry.name) == role:
            if entry.is_dir():
                found.append(entry)
            elif not entry.suffix:
                raise DataError(f"cannot read {escape(str(entry))}: it is not a directory")
    return found


def _role(name: str) -> str | None:
    """Return the role that the name of a directory implies, such as "train" for Training_Set."""
    base = re.sub(r"[\s_-]", "", name.casefold())
    base = re.sub(r"(set|images|data|split)$", "", base)
    return next((role for role, names in _ROLES.items() if base in names), None)


def _empty_like(split: Split) -> Split:
    return split.select(slice(0))


def _join_names(paths: Sequence[Path]) -> str:
    return " and ".join(escape(path.name) + "/" * path.is_dir() for path in paths)


def _join_directories(names: Sequence[str]) -> str:
    return ", ".join(f"{escape(name)}/" for name in names[:3]) + ", ..." * (len(names) > 3)


def _in_parentheses(text: str | None) -> str:
    return f" ({text})" if text else ""
