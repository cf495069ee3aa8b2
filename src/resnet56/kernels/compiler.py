"""Compile and load the C kernels at run time. Without a kernel, callers fall back to PyTorch."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

# The compiler may fuse multiply-adds, and math functions need not set errno. Otherwise, arithmetic
# follows IEEE 754.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


class UnavailableError(Exception):
    """A kernel is not available on this machine.

    The message states the reason. `remedy` states what the user can do, or is empty.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


def compile_kernel(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile and load a C file from `kernels/`, which must define `int resnet56_threads(void)`.

    Each process compiles a kernel once per compiler. The function deletes the library after loading
    it, so that the file cannot become outdated or be modified.

    Raises:
        UnavailableError: no compiler is found, the compilation fails, or the library and PyTorch
            use different OpenMP runtimes.
    """
    if sys.platform != "linux":
        raise UnavailableError("the kernels require Linux")
    return _compile(source, tuple(flags), os.environ.get("CC", ""))


@functools.cache
def _compile(source: str, flags: tuple[str, ...], cc: str) -> ctypes.CDLL:
    try:
        compiler = shlex.split(cc) or ["cc"]
        if not shutil.which(compiler[0]):
            raise UnavailableError(
                f"the C compiler {compiler[0]!r} was not found",
                "install gcc, or set CC to a C compiler",
            )
        with tempfile.TemporaryDirectory() as directory:
            for file in files("resnet56.kernels").iterdir():
                if file.name.endswith((".c", ".h")):
                    (Path(directory) / file.name).write_bytes(file.read_bytes())
            output = Path(directory) / "kernel.so"
            path = Path(directory) / source
            command = [*compiler, *FLAGS, *flags, str(path), "-o", str(output), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            library = _load(output)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line]
        message = (errors or lines or [f"exit status {error.returncode}"])[0]
        raise UnavailableError(
            f"{compiler[0]} failed to compile the kernel: {message}",
            "set CC to another C compiler",
        ) from None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UnavailableError(
            f"the kernel could not be compiled: {error}",
            "set TMPDIR to a writable directory" if isinstance(error, OSError) else "",
        ) from None
    _check_threads(library)
    return library


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # The most common reason is a temporary directory that is mounted with noexec.
        raise UnavailableError(
            f"the compiled kernel could not be loaded: {error}",
            "set TMPDIR to a directory that allows execution",
        ) from None


def _check_threads(library: ctypes.CDLL) -> None:
    """Check that the kernel uses PyTorch's threads. Extra threads would compete for the cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        shared = library.resnet56_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    if not shared:
        raise UnavailableError("the kernel and PyTorch use different OpenMP runtimes")
