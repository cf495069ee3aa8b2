"""Libraries that are imported with care: no telemetry, and nothing written to the user's home.

Every import of ONNX Runtime and Matplotlib goes through here.
"""

import os
import tempfile
from pathlib import Path
from types import ModuleType

# Both names are set because releases differ in the one they read. ONNX Runtime reads them once,
# while it is imported.
_NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED")


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime with its telemetry turned off, unless the user's environment decides.

    Without this, some releases look up a telemetry host and write a device id to the user's cache
    directory (microsoft/onnxruntime issues 27379 and 29843).

    Raises:
        ImportError: it is not installed.
    """
    for name in _NO_TELEMETRY:
        os.environ.setdefault(name, "1")
    import onnxruntime

    module: ModuleType = onnxruntime
    return module


def import_matplotlib() -> ModuleType:
    """Matplotlib, with its font cache in a temporary directory where the home is not writable.

    Without this, it prints warnings to stderr in containers whose user has no home directory.
    """
    if "MPLCONFIGDIR" not in os.environ and not _home_is_writable():
        os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir()) / f"matplotlib-{_user()}")
    import matplotlib

    return matplotlib


def _home_is_writable() -> bool:
    """Whether the configuration directory that Matplotlib would choose can be created."""
    try:
        path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "matplotlib"
    except RuntimeError:  # no HOME, and no entry in the password database
        return False
    while not path.exists():
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else os.getpid()
