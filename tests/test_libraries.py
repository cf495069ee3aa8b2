"""Libraries neither send telemetry nor write to the home directory."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from networks import random_checkpoint

import resnet56
from resnet56.runs.directory import RunDirectory

SOURCE = Path(resnet56.__file__).parent

USE = """
import sys, time
import numpy as np
from resnet56 import load
load(sys.argv[1]).predict(np.zeros((32, 32, 3), np.uint8))
time.sleep(0.5)
"""


def clean_environment(home: Path | None) -> dict[str, str]:
    """Return the environment of a user's shell. ONNX Runtime sends no telemetry if CI is set."""
    hidden = ("CI", "ORT_", "XDG_", "MPLCONFIGDIR", "HOME")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return kept | ({"HOME": str(home)} if home else {})


def imported_names(file: Path) -> set[str]:
    """Return the top-level packages that a module imports anywhere in its file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_onnx_runtime_is_imported_in_one_place() -> None:
    importing = {
        file.name for file in SOURCE.rglob("*.py") if "onnxruntime" in imported_names(file)
    }
    assert importing == {"libraries.py"}


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a file as a user with an empty home directory, which is next to the file."""
    pytest.importorskip("onnxruntime")
    directory = tmp_path_factory.mktemp("onnx")
    (directory / "home").mkdir()
    RunDirectory(directory / "run").save(random_checkpoint())
    path = directory / "net.onnx"
    command = [
        sys.executable,
        "-m",
        "resnet56",
        "export",
        str(directory / "run"),
        "--out",
        str(path),
    ]
    environment = clean_environment(directory / "home")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return path


def test_loading_an_onnx_file_writes_nothing_to_the_home_directory(
    onnx_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", USE, str(onnx_file)]
    done = subprocess.run(
        command, env=clean_environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert done.stderr == ""


def test_an_export_writes_nothing_to_the_home_directory(onnx_file: Path) -> None:
    home = onnx_file.parent / "home"
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_the_telemetry_setting_of_the_user_is_kept(onnx_file: Path, tmp_path: Path) -> None:
    code = "from resnet56.libraries import import_onnxruntime as load; import os; load(); "
    code += "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = clean_environment(tmp_path) | {"ORT_DISABLE_TELEMETRY": "0", "CI": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows always has a home directory")
def test_matplotlib_prints_no_warning_if_the_home_directory_is_read_only(tmp_path: Path) -> None:
    missing = tmp_path / "file" / "home"
    missing.parent.touch()
    code = "from resnet56.libraries import import_matplotlib as load; load(); import matplotlib; "
    code += "import matplotlib.font_manager; print(matplotlib.get_configdir())"
    environment = clean_environment(missing) | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / f"matplotlib-{os.getuid()}")
    assert done.stderr == ""
