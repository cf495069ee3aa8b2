"""Run the tutorial notebooks and store their outputs.

    python tools/notebooks.py                                     # all
    python tools/notebooks.py docs/tutorials/build-and-train.ipynb

The tool writes a notebook only if it runs without errors. It does not store times, speeds, versions
or the name of the kernel, so that two runs on the same machine produce the same file.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
TIMEOUT = 1800  # seconds per cell, for busy machines
SPEED = re.compile(r"  [0-9]+ img/s  [0-9:]+$", re.MULTILINE)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def paths() -> list[Path]:
    """Return the notebooks in the documentation."""
    return sorted(TUTORIALS.glob("*.ipynb"))


def run(notebook: Any, directory: Path) -> Any:
    """Run a notebook in `directory`, and return it with its new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an exception.
    """
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
        config=Config(KernelManager={"transport_encryption": "auto"}),  # avoids a warning
    )
    # Rounding depends on the number of threads. IPYTHONDIR hides the user's IPython settings.
    variables = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(directory / ".ipython")}
    client.execute(env={**os.environ, **variables})
    return normalized(notebook)


def normalized(notebook: Any) -> Any:
    """Remove content that differs between machines or editors, and return the notebook."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in ("alt", "tags") if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            data = output.get("data", {})
            if "text/plain" in data:
                data["text/plain"] = SPEED.sub("", data["text/plain"])
    return notebook


def main() -> None:
    """Run the notebooks given on the command line, or all notebooks by default."""
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else paths():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            notebook = run(nbformat.read(path, as_version=4), Path(directory))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {size:.0f} kB")


if __name__ == "__main__":
    main()
