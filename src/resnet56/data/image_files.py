"""Find the image files in a folder, and say which images in it are passed over.

Linked folders are followed. Hidden files, and the folders that file servers and archivers put among
people's images, are not looked into.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from resnet56.errors import shown

# fmt: off
SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".avif",
))
# Images, too, but of formats that are not read.
_OTHER_SUFFIXES = frozenset((
    ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".ico", ".tga", ".dng", ".nef",
    ".cr2", ".cr3", ".arw", ".raw", ".exr", ".hdr", ".eps", ".xcf", ".pcx", ".dcm", ".emf", ".wmf",
))
_MACHINE_FOLDERS = frozenset((
    "@eadir", "#recycle", "@recycle", "$recycle.bin", "__macosx", "lost+found",
    "system volume information", "@recently-snapshot", "@tmp", "__pycache__",
))
# fmt: on
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_HEAD = 16  # bytes that tell a format


@dataclass
class ImageFiles:
    """The image files below a folder, sorted by path, and what is passed over there."""

    files: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # images not read, by suffix


def find_images(folder: Path) -> ImageFiles:
    """Look through `folder` and all folders in it. Raises OSError if one cannot be read.

    A file is taken by its suffix, and one without a suffix by its first bytes. Each folder is
    entered once, however many links lead to it, and none that `folder` itself lies in.
    """
    found = ImageFiles()
    above = {_identity(parent) for parent in folder.resolve().parents}
    for entry in _walk(folder, above):
        suffix = entry.suffix.lower()
        if entry.is_symlink() and not entry.exists():
            if suffix in SUFFIXES:
                found.passed_over["broken link"] += 1
        elif not entry.is_file():  # a pipe would wait for ever
            continue
        elif suffix in SUFFIXES:
            found.files.append(entry)
        elif suffix in _OTHER_SUFFIXES:
            found.passed_over[suffix] += 1
        elif kind := _kind(entry):
            if not suffix and kind in SUFFIXES:
                found.files.append(entry)
            else:
                found.passed_over[suffix or kind] += 1
    found.files.sort(key=Path.as_posix)
    return found


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is the user's, not hidden and not a machine's."""
    return not name.startswith(".") and name.casefold() not in _MACHINE_FOLDERS


def visible_folders(path: Path) -> list[Path]:
    """The folders in `path`, linked ones too, sorted by name. Raises OSError."""
    folders = [entry for entry in path.iterdir() if is_visible(entry.name) and entry.is_dir()]
    return sorted(folders, key=lambda entry: entry.name)


def remark_on(passed_over: Counter[str]) -> str | None:
    """A line about images that were passed over; None if there are none."""
    count = passed_over.total()
    if not count:
        return None
    kinds = ", ".join(f"{number:,} {shown(kind)}" for kind, number in passed_over.most_common(5))
    more = ", ..." if len(passed_over) > 5 else ""
    hint = ""
    if ".heic" in passed_over or ".heif" in passed_over:
        hint = "; convert HEIC to JPEG or PNG to use it"
    return f"{count:,} image file{'s' * (count > 1)} passed over: {kinds}{more}{hint}"


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _walk(folder: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    """All visible entries below `folder` that are not folders."""
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        identity = _identity(current)
        if identity in entered:
            continue
        entered.add(identity)
        with os.scandir(current) as entries:
            visible = [Path(entry) for entry in entries if is_visible(entry.name)]
        for entry in sorted(visible):
            if entry.is_dir():
                waiting.append(entry)
            else:
                yield entry


def _kind(file: Path) -> str | None:
    """Which images the first bytes of a file are of, as a suffix; None if of none."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return None
    for start, kind in (
        (b"\x89PNG\r\n\x1a\n", ".png"),
        (b"\xff\xd8\xff", ".jpg"),
        (b"GIF87a", ".gif"),
        (b"GIF89a", ".gif"),
        (b"II*\0", ".tif"),
        (b"MM\0*", ".tif"),
        (b"8BPS", ".psd"),
        (b"\0\0\0\x0cjP  ", ".jp2"),
    ):
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis"):
            return ".avif"
        return ".heic" if head[8:12] in _HEIF_BRANDS else None
    return None
