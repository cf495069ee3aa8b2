"""Finding image files in a directory, and skipping others."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from resnet56.data.image_files import SUFFIXES, describe_skipped, find_images
from resnet56.data.images import read_image

needs_links = pytest.mark.skipif(
    sys.platform == "win32", reason="creating links requires privileges on Windows"
)


def save(file: Path, format: str = "PNG") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file, format)
    return file


def names(directory: Path) -> list[str]:
    return [file.relative_to(directory).as_posix() for file in find_images(directory).files]


@pytest.mark.parametrize("system", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"])
@pytest.mark.parametrize("depth", ["", "a/", "a/b/"])
def test_system_directories_are_ignored(tmp_path: Path, system: str, depth: str) -> None:
    save(tmp_path / "a" / "b" / "x.png")
    for name in (system, system.upper(), system.lower()):
        save(tmp_path / depth / name / "x.png" / "THUMB.jpg")
    save(tmp_path / depth / ".cache" / "y.png")
    save(tmp_path / depth / "._z.png")
    assert names(tmp_path) == ["a/b/x.png"]
    assert describe_skipped(find_images(tmp_path).skipped) is None


@needs_links
def test_linked_directories_are_visited_once(tmp_path: Path) -> None:
    for name in ("data/cat/0", "data/dog/1", "pool/2", "pool/deep/3"):
        save(tmp_path / f"{name}.png")
    cat = tmp_path / "data" / "cat"
    for name, target in (
        ("more", tmp_path / "pool"),
        ("again", tmp_path / "pool"),
        ("up", tmp_path / "data"),  # a parent directory
        ("round", cat),
        ("file.png", tmp_path / "pool" / "2.png"),
    ):
        (cat / name).symlink_to(target)
    (tmp_path / "pool" / "deep" / "back").symlink_to(tmp_path / "pool")
    found = [file.resolve().name for file in find_images(cat).files]
    assert sorted(found) == ["0.png", "2.png", "2.png", "3.png"]


@needs_links
def test_a_lattice_of_links_is_visited_in_linear_time(tmp_path: Path) -> None:
    for level in range(40):  # there are 2**40 paths
        (tmp_path / f"{level}").mkdir()
    for level in range(39):
        for side in "ab":
            (tmp_path / f"{level}" / side).symlink_to(tmp_path / f"{level + 1}")
    save(tmp_path / "39" / "x.png")
    assert len(find_images(tmp_path / "0").files) == 1


def test_every_supported_suffix_is_read(tmp_path: Path) -> None:
    """Includes AVIF if Pillow supports it."""
    formats = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}
    formats |= {"pgm": "PPM"}
    for suffix in sorted(SUFFIXES):
        format = formats.get(suffix[1:], suffix[1:].upper())
        try:
            save(tmp_path / f"x{suffix.upper()}", format)
        except (KeyError, OSError):
            assert suffix == ".avif"
    for file in find_images(tmp_path).files:
        assert read_image(file).size == (4, 4)
    assert len(find_images(tmp_path).files) >= len(SUFFIXES) - 1


def test_skipped_images_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "bare")  # no suffix: recognized by its content
    save(tmp_path / "x.png.bak")
    save(tmp_path / "y.heic", "JPEG")
    (tmp_path / "z.JP2").write_bytes(b"")
    (tmp_path / "nosuffix").write_bytes(b"\0\0\0\x18ftypheic")
    for other in ("notes.txt", "README", "labels.csv", "Thumbs.db"):
        (tmp_path / other).write_text("MM is not a TIFF")
    if sys.platform != "win32":
        (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "pipe.png")
        os.mkfifo(tmp_path / "pipe")
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == ["bare"]
    expected = {".bak": 1, ".heic": 2, ".jp2": 1}
    if sys.platform != "win32":
        expected["broken link"] = 1
    assert found.skipped == expected
    remark = describe_skipped(found.skipped) or ""
    assert remark.startswith(f"skipped {sum(expected.values())} image files: 2 .heic, ")
    assert "convert HEIC" in remark


def test_a_remark_lists_a_few_suffixes_and_is_printable() -> None:
    from collections import Counter

    remark = describe_skipped(Counter({f".\x1b{number}": number for number in range(1, 9)})) or ""
    assert remark.isprintable()
    assert remark.endswith(", ...")
