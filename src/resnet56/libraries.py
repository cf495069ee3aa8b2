"""Import libraries with telemetry disabled, and without writing to the user's home directory.

All modules import ONNX Runtime and Matplotlib through this module.
"""

import os
import tempfile
from pathlib import Path
from types import ModuleType

# On import, ONNX Runtime reads one of these variables. Which one depends on the release.
_NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime. Disable telemetry unless a variable in `_NO_TELEMETRY` is already set.

    With telemetry enabled, some releases resolve a host name and write a device ID to the user's
    cache directory (microsoft/onnxruntime issues 27379 and 29843).

    Raises:
        ImportError: ONNX Runtime is not installed.
    """
    for name in _NO_TELEMETRY:
        os.environ.setdefault(name, "1")
    import onnxruntime

    module: ModuleType = onnxruntime
    return module


def import_matplotlib() -> ModuleType:
    """Import Matplotlib. Use a temporary font cache if the home directory is not writable.

    Without this cache, Matplotlib prints warnings to stderr if the user has no home directory, for
    example in a container.
    """
    if "MPLCONFIGDIR" not in os.environ and not _home_is_writable():
        os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir()) / f"matplotlib-{_user()}")
    import matplotlib

    return matplotlib


def _home_is_writable() -> bool:
    """Return whether Matplotlib can write to its default configuration directory."""
    try:
        path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "matplotlib"
    except RuntimeError:  # HOME is not set, and the password database has no entry
        return False
    while not path.exists():
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else os.getpid()
