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
from typing import Any

import numpy.typing as npt

from resnet56.errors import RunError, one_line
from resnet56.files import from_json, to_json, write_text
from resnet56.locks import try_lock
from resnet56.runs import schema
from resnet56.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from resnet56.runs.schema import Comparison, Environment, EpochMetrics, Evaluation, Parity


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
        environment = self.read_environment()
        return environment["data"]["origin"] if environment and "data" in environment else None

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

    # environment.json

    def read_environment(self) -> Environment | None:
        """What the run ran on, if it says so. Raises RunError."""
        if not self.environment_file.exists():
            return None
        return schema.read(self.environment_file, Environment)

    def write_environment(self, environment: Environment) -> None:
        """Replace environment.json. Raises RunError."""
        schema.write(self.environment_file, environment, Environment)

    # evaluation.json, predictions.npz and samples.npz

    def read_evaluation(self, step: int) -> Evaluation | None:
        """What was measured of the weights after `step` steps; None if that is not known.

        Raises:
            RunError: the file is damaged.
        """
        if not self.evaluation_file.exists():
            return None
        found = schema.read(self.evaluation_file, Evaluation)
        schema.check_evaluation(found, self.evaluation_file)
        return found if found["step"] == step else None

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Replace evaluation.json. Raises RunError."""
        schema.check_evaluation(evaluation, self.evaluation_file)
        schema.write(self.evaluation_file, evaluation, Evaluation)

    def write_predictions(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace predictions.npz. Raises RunError."""
        schema.save_arrays(self.predictions_file, schema.PREDICTIONS, arrays)

    def read_samples(self) -> dict[str, npt.NDArray[Any]] | None:
        """The images that an evaluation kept for the report, if there are any. Raises RunError."""
        if not self.samples_file.exists():
            return None
        return schema.load_arrays(self.samples_file, schema.SAMPLES)

    def write_samples(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace samples.npz. Raises RunError."""
        schema.save_arrays(self.samples_file, schema.SAMPLES, arrays)

    # metrics.jsonl

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line; on the disk when this returns."""
        schema.check(row, EpochMetrics, str(self.metrics_file))
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

    def read_metrics(self) -> list[EpochMetrics]:
        """All lines, but a last one that a crash cut short; empty before the first epoch."""
        if not self.metrics_file.exists():
            return []
        rows: list[EpochMetrics] = []
        try:
            text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RunError(f"cannot read {self.metrics_file}: {error.strerror or error}") from None
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = from_json(line)
            except (ValueError, RecursionError) as error:
                if number == len(lines):
                    break
                raise RunError(
                    f"{self.metrics_file}:{number} is damaged: {one_line(error)}"
                ) from None
            rows.append(schema.check(row, EpochMetrics, f"{self.metrics_file}:{number}"))
        return rows

    def rewind_metrics(self, epochs: int) -> None:
        """Keep the lines of the first `epochs` epochs: the ones the checkpoint has behind it."""
        if self.metrics_file.exists():
            kept = [row for row in self.read_metrics() if row["epoch"] <= epochs]
            text = "".join(to_json(row) + "\n" for row in kept)
            write_text(self.metrics_file, text)

    # parity.json

    def read_comparisons(self, step: int) -> list[Comparison]:
        """The comparisons of the weights after `step` steps. Raises RunError."""
        if not self.parity_file.exists():
            return []
        comparisons = schema.read(self.parity_file, Parity)["comparisons"]
        return [one for one in comparisons if one.get("step", step) == step]

    def keep_comparison(self, found: Comparison, step: int) -> None:
        """Add a comparison of two devices or precisions, of the weights after `step` steps.

        It takes the place of an earlier one of the same two, and those of earlier weights go.
        """
        pair = [found["a"], found["b"]]
        kept = [one for one in self.read_comparisons(step) if [one["a"], one["b"]] != pair]
        found = {**found, "step": step}
        schema.write(self.parity_file, {"comparisons": [*kept, found]}, Parity)

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
