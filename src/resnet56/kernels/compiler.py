"""The kernels in `kernels/`, compiled where they run; where that fails, callers do without."""

import ctypes
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

# Exact IEEE arithmetic, but for errno and fused multiply-adds.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


class UnavailableError(Exception):
    """There is no kernel on this machine; the message says why, and `remedy` what to do."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


def compile_here(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile and load a C file of `kernels/`, which must have `int resnet56_threads(void)`.

    Nothing stays on the disk, so nothing can be stale or tampered with.

    Raises:
        UnavailableError: no compiler, or one that refuses, or another OpenMP than PyTorch's.
    """
    if sys.platform != "linux":
        raise UnavailableError("it is made for Linux")
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        if not shutil.which(compiler[0]):
            raise UnavailableError(
                f"there is no C compiler {compiler[0]!r}", "install gcc, or name a compiler in CC"
            )
        with tempfile.TemporaryDirectory() as folder:
            for file in files("resnet56.kernels").iterdir():
                if file.name.endswith((".c", ".h")):
                    (Path(folder) / file.name).write_bytes(file.read_bytes())
            made = Path(folder) / "kernel.so"
            path = Path(folder) / source
            command = [*compiler, *FLAGS, *flags, str(path), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            library = _load(made)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        wrong = [line for line in lines if "error" in line] or lines or [f"exit {error.returncode}"]
        raise UnavailableError(
            f"{compiler[0]} could not compile it: {wrong[0]}", "name another compiler in CC"
        ) from None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UnavailableError(
            f"it could not be compiled: {error}",
            "choose a folder to write in with TMPDIR" if isinstance(error, OSError) else "",
        ) from None
    _share_threads(library)
    return library


def _load(made: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        # Usually the temporary folder is mounted noexec.
        raise UnavailableError(
            f"what was compiled could not be loaded: {error}",
            "choose a folder from which programs may run with TMPDIR",
        ) from None


def _share_threads(library: ctypes.CDLL) -> None:
    """See that the kernel runs on PyTorch's own threads: two sets would fight for the cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        shared = library.resnet56_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    if not shared:
        raise UnavailableError("its OpenMP is not the one that PyTorch uses")
