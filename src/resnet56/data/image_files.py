"""Find the image files in a directory, and count the skipped images.

The search follows links to directories. It ignores hidden files and directories, and directories
that file servers and archive programs create.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from resnet56.errors import escape

# fmt: off
SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
    ".pgm", ".avif",
))
# Suffixes of image formats that this package does not support.
_UNSUPPORTED_SUFFIXES = frozenset((
    ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".ico", ".tga", ".dng", ".nef",
    ".cr2", ".cr3", ".arw", ".raw", ".exr", ".hdr", ".eps", ".xcf", ".pcx", ".dcm", ".emf", ".wmf",
))
_SYSTEM_DIRECTORIES = frozenset((
    "@eadir", "#recycle", "@recycle", "$recycle.bin", "__macosx", "lost+found",
    "system volume information", "@recently-snapshot", "@tmp", "__pycache__",
))
# fmt: on
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_SIGNATURE_BYTES = 16  # long enough for all signatures below


@dataclass
class ImageFiles:
    """The image files below a directory, sorted by path, and the number of skipped images."""

    files: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # number of skipped images per suffix


def find_images(directory: Path) -> ImageFiles:
    """Find all images in `directory` and its subdirectories.

    Images are recognized by suffix. Files without a suffix are recognized by content. Each
    directory is visited once, even if several links lead to it. The search does not follow links to
    parents of `directory`.

    Raises:
        OSError: a directory cannot be read.
    """
    found = ImageFiles()
    parents = {_identity(parent) for parent in directory.resolve().parents}
    for entry in _walk(directory, parents):
        suffix = entry.suffix.lower()
        if entry.is_symlink() and not entry.exists():
            if suffix in SUFFIXES:
                found.skipped["broken link"] += 1
        elif not entry.is_file():  # opening a pipe, for example, would block
            continue
        elif suffix in SUFFIXES:
            found.files.append(entry)
        elif suffix in _UNSUPPORTED_SUFFIXES:
            found.skipped[suffix] += 1
        elif detected := _detect_suffix(entry):
            if not suffix and detected in SUFFIXES:
                found.files.append(entry)
            else:
                found.skipped[suffix or detected] += 1
    found.files.sort(key=Path.as_posix)
    return found


def is_visible(name: str) -> bool:
    """Return False for hidden names and the names of system directories."""
    return not name.startswith(".") and name.casefold() not in _SYSTEM_DIRECTORIES


def visible_directories(path: Path) -> list[Path]:
    """Return the directories in `path`, including links, sorted by name. Raises OSError."""
    directories = [entry for entry in path.iterdir() if is_visible(entry.name) and entry.is_dir()]
    return sorted(directories, key=lambda entry: entry.name)


def describe_skipped(skipped: Counter[str]) -> str | None:
    """Return a one-line description of the skipped images, or None if no image was skipped."""
    count = skipped.total()
    if not count:
        return None
    suffixes = ", ".join(
        f"{number:,} {escape(suffix)}" for suffix, number in skipped.most_common(5)
    )
    more = ", ..." if len(skipped) > 5 else ""
    hint = ""
    if ".heic" in skipped or ".heif" in skipped:
        hint = "; convert HEIC files to JPEG or PNG to use them"
    return f"skipped {count:,} image file{'s' * (count > 1)}: {suffixes}{more}{hint}"


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _walk(directory: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield all visible files below `directory`, including broken links and special files."""
    pending = [directory]
    while pending:
        current = pending.pop()
        identity = _identity(current)
        if identity in visited:
            continue
        visited.add(identity)
        with os.scandir(current) as entries:
            visible = [Path(entry) for entry in entries if is_visible(entry.name)]
        for entry in sorted(visible):
            if entry.is_dir():
                pending.append(entry)
            else:
                yield entry


def _detect_suffix(file: Path) -> str | None:
    """Detect an image format from the first bytes of a file.

    Return the suffix of the format, or None if the format is unknown.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(_SIGNATURE_BYTES)
    except OSError:
        return None
    for signature, suffix in (
        (b"\x89PNG\r\n\x1a\n", ".png"),
        (b"\xff\xd8\xff", ".jpg"),
        (b"GIF87a", ".gif"),
        (b"GIF89a", ".gif"),
        (b"II*\0", ".tif"),
        (b"MM\0*", ".tif"),
        (b"8BPS", ".psd"),
        (b"\0\0\0\x0cjP  ", ".jp2"),
    ):
        if head.startswith(signature):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis"):
            return ".avif"
        return ".heic" if head[8:12] in _HEIF_BRANDS else None
    return None
