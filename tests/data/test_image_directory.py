"""Image directories in common layouts, and the errors and messages about them."""

import os
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from resnet56.data.dataset import match_classes
from resnet56.data.readers import load_directory
from resnet56.errors import DataError, UsageError


def save(file: Path, value: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (value, 0, 0)).save(file)
    return file


def fill(root: Path, *classes: str, count: int = 5, first: int = 0) -> None:
    for number, name in enumerate(classes):
        for index in range(count):
            save(root / name / f"{index}.png", first + 10 * number + index)


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_directory(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def values(images: torch.Tensor) -> list[int]:
    return sorted(images[:, 0, 0, 0].tolist())


# Training and test splits


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN_SET"])
@pytest.mark.parametrize(
    "test", ["test", "val", "Valid", "validation", "dev", "eval", "testing", "test-images"]
)
def test_the_directory_next_to_train_contains_the_test_images(
    tmp_path: Path, train: str, test: str
) -> None:
    fill(tmp_path / train, "a", "b", first=0)
    fill(tmp_path / test, "a", "b", first=100, count=2)
    loaded = load_directory(tmp_path)
    assert values(loaded.train.images) == [*range(5), *range(10, 15)]
    assert values(loaded.test.images) == [100, 101, 110, 111]
    assert "80/20" not in loaded.source


def test_an_unused_validation_directory_causes_a_remark(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "test", "a", "b", first=100)
    fill(tmp_path / "val", "a", "b", count=3)
    loaded = load_directory(tmp_path)
    assert values(loaded.test.images)[0] == 100
    assert loaded.remarks == ("val/ is not used (6 images)",)


@pytest.mark.parametrize("other", ["holdout", "gallery", "Zoo"])
def test_an_unused_directory_of_the_same_classes_raises_an_error(
    tmp_path: Path, other: str
) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / other, "B")
    message = error_of(tmp_path)
    assert f"{other} contains classes of train/" in message
    assert "rename it to test/" in message
    shutil.rmtree(tmp_path / other)
    fill(tmp_path / other, "figures")
    assert "80/20" in load_directory(tmp_path).source


def test_two_directories_of_the_same_role_raise_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "val", "a")
    fill(tmp_path / "dev", "a")
    assert "contains dev/ and val/; rename the one for testing" in error_of(tmp_path)
    fill(tmp_path / "Train", "a")
    if len(list(tmp_path.iterdir())) == 4:  # only on case-sensitive file systems
        assert "contains Train/ and train/; keep one" in error_of(tmp_path)


def test_class_directories_without_a_test_split_are_split(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b", count=10)
    (tmp_path / "docs").mkdir()
    fill(tmp_path / "@eaDir", "thumbs")
    loaded = load_directory(tmp_path)
    assert loaded.classes == ("a", "b")
    assert (len(loaded.train), len(loaded.test), loaded.predefined_split) == (16, 4, False)
    assert "docs/" in loaded.remarks[0]


def test_adjacent_data_sets_are_not_classes(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        fill(tmp_path / name / "train", "a", "b")
    assert "cats looks like a separate data set" in error_of(tmp_path)


# A table of labels


def test_a_table_labels_the_images_of_one_directory(tmp_path: Path) -> None:
    for number in range(1, 11):
        save(tmp_path / "train" / f"{number}.png", number)
    save(tmp_path / "test" / "1.png")
    rows = "".join(f"{number},{'odd' if number % 2 else 'even'}\n" for number in range(1, 11))
    (tmp_path / "trainLabels.csv").write_text("\ufeffid,label\n" + rows, encoding="utf-8")
    (tmp_path / "sampleSubmission.csv").write_text("id,label\n1,cat\n")
    loaded = load_directory(tmp_path)
    assert loaded.classes == ("even", "odd")
    for split in (loaded.train, loaded.test):
        assert (split.images[:, 0, 0, 0] % 2).tolist() == split.labels.tolist()
    assert len(loaded.train) + len(loaded.test) == 10
    assert any("test/ is not used" in remark for remark in loaded.remarks)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,label\n1,a\n", "has no row for 1 of the 2 images"),
        ("id,label\n1,a\n2\n", "line 3 has too few columns"),
        ("id,label\n1,a\n1,b\n2,a\n", "line 3 assigns 1 a different label"),
        ("id,label\n1,a\n2,a\n", "expected at least two classes, found 1"),
        ("id,label\n1,a\n2,\x1b[2J\n", "is not a valid class name"),
        ("name,size\n1,2\n", "images outside class directories"),
        ('id,label\n1,"a\n', "has no row for"),
        ("id,label\n1,a\n2," + "b" * 200_000, "field larger than field limit"),
    ],
)
def test_an_invalid_table_causes_a_one_line_error(tmp_path: Path, table: str, message: str) -> None:
    for number in (1, 2):
        save(tmp_path / "train" / f"{number}.png", number)
    (tmp_path / "labels.csv").write_text(table)
    assert message in error_of(tmp_path)


# Names


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system normalizes names")
def test_class_names_are_normalized(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(tmp_path / "train", decomposed, "tea")
    fill(tmp_path / "test", composed, "tea ", first=100)
    save(tmp_path / "train" / composed / "more.png", 99)
    loaded = load_directory(tmp_path)
    assert loaded.classes == (composed, "tea")
    assert loaded.train.labels.tolist().count(0) == 6
    assert loaded.remarks == ()


def test_names_that_differ_in_case_are_matched_with_a_remark(tmp_path: Path) -> None:
    fill(tmp_path / "train", "Cat", "dog")
    fill(tmp_path / "test", "cat", "dog", first=100)
    loaded = load_directory(tmp_path)
    assert loaded.classes == ("Cat", "dog")
    assert loaded.test.labels.tolist() == [0] * 5 + [1] * 5
    assert "treating cat as the class Cat" in loaded.remarks[0]


def test_class_names_can_differ_only_in_case() -> None:
    assert match_classes(("a", "A"), ("A", "a")) == ({"a": "a", "A": "A"}, [])
    assert match_classes(("ß",), ("SS", "ss"))[0] == {}  # ambiguous
    matches, remarks = match_classes(("x",), ("y",))
    assert (matches, remarks) == ({}, [])


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems do not allow such names")
@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\rb", "\x9b31m", "a\u2028b"])
def test_class_names_with_control_characters_are_rejected(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "train", "a", name)
    assert "is not a valid class name" in error_of(tmp_path)


@pytest.mark.parametrize("directory", ["", "cat"])
def test_images_without_class_directories_are_reported(tmp_path: Path, directory: str) -> None:
    """The classes are unknown if all images are in one directory."""
    fill(tmp_path, directory)
    message = error_of(tmp_path)
    assert "contains 5 images" in message
    assert "put the images of each class in their own directory" in message


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems do not allow such names")
def test_directory_names_in_errors_are_printable(tmp_path: Path) -> None:
    root = tmp_path / "a\x1b[2J\nresnet56: done"
    for message in (
        "does not exist",
        "is empty",
        "unknown layout",
        "at least two",
        "contains no images",
    ):
        assert message in error_of(root)
        if not root.exists():
            root.mkdir()
        elif message == "is empty":
            (root / "notes").touch()
        elif message == "unknown layout":
            fill(root / "train", "x")
        else:
            (root / "train" / "y").mkdir(exist_ok=True)
    fill(root / "train", "y")
    assert load_directory(root).source.isprintable()
    (root / "train" / "y" / "z\x1b.png").write_bytes(b"junk")
    error_of(root)


# Broken images


def test_an_error_lists_ten_broken_images_and_counts_the_others(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b", count=20)
    broken = [tmp_path / "train" / "a" / f"{number}.png" for number in range(12)]
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    message = error_of(tmp_path)
    assert message.startswith("cannot read 12 images: ")
    assert sum(str(file) in message for file in broken) == 10
    assert "and 2 more" in message
    assert "skip_broken=True" in message
    loaded = load_directory(tmp_path, skip_broken=True)
    assert len(loaded.train) + len(loaded.test) == 28
    assert "skipped 12 images" in loaded.remarks[0]


def test_a_class_of_only_broken_images_raises_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b", count=3)
    for file in (tmp_path / "train" / "a").iterdir():
        file.write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="no readable images"):
        load_directory(tmp_path, skip_broken=True)


# Evaluation


def test_a_test_split_alone_can_be_evaluated(tmp_path: Path) -> None:
    fill(tmp_path / "only" / "test", "cat")
    (tmp_path / "only" / "test" / "dog").mkdir()
    error_of(tmp_path / "only")
    loaded = load_directory(tmp_path / "only", evaluation=True).for_classes(("dog", "cat", "bird"))
    assert (len(loaded.train), loaded.test.labels.tolist()) == (0, [1] * 5)
    save(tmp_path / "one" / "Cat" / "x.png")
    loaded = load_directory(tmp_path / "one", evaluation=True).for_classes(("dog", "cat"))
    assert loaded.test.labels.tolist() == [1]
    assert "differs only in case" in loaded.remarks[-1]


def test_all_images_without_a_predefined_split_are_evaluated(tmp_path: Path) -> None:
    fill(tmp_path, "bird", "cat", "horse", count=10)
    loaded = load_directory(tmp_path, evaluation=True)
    evaluated = loaded.for_classes(("cat", "dog", "bird"))
    assert values(evaluated.test.images) == list(range(20))
    pairs = zip(
        evaluated.test.images[:, 0, 0, 0].tolist(), evaluated.test.labels.tolist(), strict=True
    )
    assert all(label == (2 if value < 10 else 0) for value, label in pairs)
    assert "skipped the images of horse" in evaluated.remarks[-1]
    with pytest.raises(UsageError, match="no classes in common"):
        loaded.for_classes(("x", "y"))


def test_training_and_evaluation_load_the_same_data(tmp_path: Path) -> None:
    """`evaluate` recognizes the data of a run by the fingerprint."""
    fill(tmp_path / "plain", "a", "b")
    fill(tmp_path / "train only" / "train", "a", "b")
    for directory in tmp_path.iterdir():
        trained = load_directory(directory)
        assert load_directory(directory, evaluation=True).fingerprint() == trained.fingerprint()


def test_classes_missing_from_train_can_be_evaluated(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a")
    fill(tmp_path / "test", "a", "b", first=100)
    loaded = load_directory(tmp_path, evaluation=True)
    assert loaded.classes == ("a", "b")
    assert loaded.test.labels.tolist() == [0] * 5 + [1] * 5


def test_a_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "pets", "a", "b")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    monkeypatch.setenv("USERPROFILE", os.fspath(tmp_path))
    assert load_directory(Path("~/pets")).name == "pets"
