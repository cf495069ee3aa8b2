"""Import libraries without telemetry or writes to the user's home directory.

All imports of ONNX Runtime and Matplotlib go through this module.
"""

import os
import tempfile
from pathlib import Path
from types import ModuleType

# ONNX Runtime reads one of these variables on import. Its name depends on the release.
_NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime with telemetry disabled, unless the variables below are already set.

    Otherwise, some releases look up a telemetry host and write a device ID to the user's cache
    directory (microsoft/onnxruntime issues 27379 and 29843).

    Raises:
        ImportError: ONNX Runtime is not installed.
    """
    for name in _NO_TELEMETRY:
        os.environ.setdefault(name, "1")
    import onnxruntime

    module: ModuleType = onnxruntime
    return module


def import_matplotlib() -> ModuleType:
    """Import Matplotlib, with a temporary font cache if the home directory is not writable.

    Otherwise, it prints warnings to stderr in containers whose user has no home directory.
    """
    if "MPLCONFIGDIR" not in os.environ and not _home_is_writable():
        os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir()) / f"matplotlib-{_user()}")
    import matplotlib

    return matplotlib


def _home_is_writable() -> bool:
    """Return whether Matplotlib's default configuration directory is writable or can be created."""
    try:
        path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "matplotlib"
    except RuntimeError:  # no HOME, and no entry in the password database
        return False
    while not path.exists():
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else os.getpid()
