"""The run directory: what a training leaves on disk, and all that later commands read.

    recipe.json        how it was trained
    environment.json   on what, with which versions, by which command
    metrics.jsonl      a line an epoch
    checkpoint/        checkpoint.json, and the tensor files it names
    evaluation.json    how good it is
    predictions.npz    the test images' logits, labels and indices
    samples.npz        a few images, for the report
    parity.json        whether device or precision matter, where that was asked

Files appear whole or not at all (`resnet56.files`).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet56.errors import RunError
from resnet56.files import from_json, read_json, to_json, write_json, write_text
from resnet56.locks import try_lock
from resnet56.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

if TYPE_CHECKING:  # what reads no tensors starts without PyTorch
    pass


class RunDirectory:
    """Reads and writes one run; `path` need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.json"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.evaluation_file = path / "evaluation.json"
        self.predictions_file = path / "predictions.npz"
        self.samples_file = path / "samples.npz"
        self.parity_file = path / "parity.json"
        self.checkpoint_file = path / "checkpoint" / "checkpoint.json"

    def create(self) -> None:
        """Make the directory; RunError if something is in the way."""
        self.refuse_taken()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the run directory {self.path}: {error.strerror or error}"
            ) from None

    def refuse_taken(self) -> None:
        """RunError if a new run cannot begin here, whatever it is that is in the way."""
        if self.checkpoint_file.exists():
            raise RunError(
                f"{self.path} holds a run already; continue it with --resume, or choose "
                "another --out"
            )
        try:
            others = sorted(entry.name for entry in self.path.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:  # a file among them
            raise RunError(
                f"{self.path} cannot be a run directory: {error.strerror or error}; choose "
                "another --out"
            ) from None
        # What a run leaves that was stopped before its first checkpoint may be written over.
        ours = (
            "recipe.json",
            "environment.json",
            "metrics.jsonl",
            "checkpoint",
            "tensorboard",
        )
        others = [name for name in others if name not in ours and not name.endswith(".tmp")]
        if others:
            raise RunError(
                f"{self.path} is not empty ({others[0]} is in it) and is no run; choose "
                "another --out"
            )

    def data_origin(self) -> str | None:
        """What `--data` would load the run's own images again: digits, or a folder."""
        if not self.environment_file.exists():
            return None
        data = read_json(self.environment_file).get("data")
        origin = data.get("origin") if isinstance(data, dict) else None
        return origin if isinstance(origin, str) else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from training here; RunError if one does. Windows knows no such lock."""
        try:
            directory = os.open(self.path, os.O_RDONLY)
        except OSError:  # Windows opens no folders; if it is not there, that is said elsewhere
            yield
            return
        try:
            if not try_lock(directory):
                raise RunError(
                    f"another process trains in {self.path}; wait for its end, or stop it"
                )
            yield
        finally:
            os.close(directory)

    # evaluation.json

    def read_evaluation(self, step: int) -> dict[str, Any] | None:
        """What was measured of the weights after `step` steps: None if it was of earlier ones."""
        if not self.evaluation_file.exists():
            return None
        found = read_json(self.evaluation_file)
        return found if found.get("step", step) == step else None

    # metrics.jsonl

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line; on the disk when this returns."""
        try:
            with self.metrics_file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(to_json(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write {self.metrics_file}: {error.strerror or error}; continue with "
                "--resume"
            ) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines, but a last one that a crash cut short; empty before the first epoch."""
        if not self.metrics_file.exists():
            return []
        rows: list[dict[str, Any]] = []
        try:
            text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RunError(f"cannot read {self.metrics_file}: {error.strerror or error}") from None
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = from_json(line)
            except (ValueError, RecursionError):
                if number == len(lines):
                    break
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
                raise RunError(f"{self.metrics_file}:{number} is damaged")
            rows.append(row)
        return rows

    def rewind_metrics(self, epochs: int) -> None:
        """Keep the lines of the first `epochs` epochs: the ones the checkpoint has behind it."""
        if self.metrics_file.exists():
            kept = [row for row in self.read_metrics() if row["epoch"] <= epochs]
            text = "".join(to_json(row) + "\n" for row in kept)
            write_text(self.metrics_file, text)

    # parity.json

    def keep_comparison(self, found: Mapping[str, Any], step: int) -> None:
        """Add a comparison of two devices or precisions, of the weights after `step` steps.

        It takes the place of an earlier one of the same two, and those of earlier weights go.
        """
        kept: Any = []
        if self.parity_file.exists():
            kept = read_json(self.parity_file).get("comparisons")
            if not isinstance(kept, list) or not all(isinstance(entry, dict) for entry in kept):
                raise RunError(f"{self.parity_file} is damaged: remove it")
        pair = [found["a"], found["b"]]
        kept = [
            entry
            for entry in kept
            if [entry.get("a"), entry.get("b")] != pair and entry.get("step", step) == step
        ]
        write_json(self.parity_file, {"comparisons": [*kept, {**found, "step": step}]})

    # checkpoint/

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; RunError if it cannot be written, and the old one is intact."""
        save_checkpoint(self.checkpoint_file, checkpoint)

    def load(self, *, training: bool = False) -> Checkpoint:
        """Read the checkpoint; with `training`, also what only resuming needs.

        Raises:
            RunError: there is none, it is damaged, or a newer version wrote it.
        """
        if not self.path.is_dir():
            raise RunError(f"there is no run at {self.path}; give the directory of a training")
        if not self.checkpoint_file.exists():
            raise RunError(f"{self.path} has no checkpoint; train there first")
        return load_checkpoint(self.checkpoint_file, training=training)
