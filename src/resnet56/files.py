"""Write files atomically.

The functions write a file under a temporary name, flush it to disk and rename it. After a crash,
the file contains either the old content or the new content.
"""

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from resnet56.errors import Error, RunError, one_line
from resnet56.locks import create_temporary

StrPath: TypeAlias = str | os.PathLike[str]
"""The type of path arguments in the public API."""


def check_target(path: Path) -> None:
    """Raise RunError if `path` exists but is not a file."""
    if path.is_dir():
        raise RunError(f"cannot write {path}: it is a directory; choose a file")
    if path.exists() and not path.is_file():  # renaming would replace the device or pipe
        raise RunError(f"cannot write {path}: it is a device or a pipe; choose a file")


def check_writable(directory: Path) -> None:
    """Raise RunError if no file can be created in `directory`.

    Call this function before long computations. If the directory does not exist, the function
    checks its closest existing parent.
    """
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        file, temporary = create_temporary(existing)
        file.close()
        temporary.unlink()
    except OSError as error:
        raise RunError(f"cannot write to {existing}: {error.strerror or error}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which replaces `path` when the block ends without an exception."""
    check_target(path)
    if path.is_symlink():
        path = path.resolve()  # replace the target of the link, not the link
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = create_temporary(path.parent)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # flush the new name to disk, because callers may delete old files
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        hint = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; an existing file is unchanged{hint}"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises RunError if writing fails."""
    # The text can contain file names that are not valid UTF-8.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises RunError if writing fails."""
    with _writing(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically, with each list of numbers on one line.

    Raises RunError if writing fails.
    """
    try:
        text = _format_json(content)
    except (Error, RecursionError) as error:
        raise RunError(f"cannot write {path}: {one_line(error)}") from None
    write_text(path, text + "\n")


def write_arrays(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write a compressed .npz file atomically. Raises RunError if writing fails."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def _format_json(content: Any, indent: str = "") -> str:
    """Format JSON with one line per key, and each innermost list on one line."""
    deeper = indent + "  "
    if isinstance(content, Mapping) and content:
        lines = [f"{json.dumps(str(k))}: {_format_json(v, deeper)}" for k, v in content.items()]
        return "{\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}}}"
    if isinstance(content, list | tuple) and any(isinstance(v, list | dict) for v in content):
        lines = [_format_json(value, deeper) for value in content]
        return "[\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}]"
    return to_json(content)


def to_json(content: Any) -> str:
    """Format `content` as JSON on one line. Raises Error for NaN and infinity."""
    try:
        return json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise Error(
            f"JSON cannot represent a result that is not a finite number: {error}"
        ) from None


def from_json(text: str) -> Any:
    """Parse JSON. Unlike `json.loads`, reject NaN, infinity, and numbers that overflow.

    Raises:
        ValueError: `text` is not valid JSON.
        RecursionError: the JSON is nested too deeply.
    """
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises RunError for any other file."""
    try:
        content = from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it is not a JSON object")
    return content


def unused_path(base: Path) -> Path:
    """Return the first of the paths `base`, base-2, base-3, ... that does not exist."""
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
