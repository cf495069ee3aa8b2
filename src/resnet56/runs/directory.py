"""The run directory: the files that a training run writes and later commands read.

    recipe.json        training settings
    environment.json   machine, versions, command and data
    metrics.jsonl      one line per epoch
    checkpoint/        checkpoint.json and the tensor files that it names
    evaluation.json    metrics of the final weights
    predictions.npz    logits, labels and indices of the test images
    samples.npz        a few images for the report
    parity.json        comparisons of devices, precisions or runtimes, if requested

Most files are replaced atomically (see `resnet56.files`). Each epoch appends a line to
metrics.jsonl.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from resnet56.errors import RunError, one_line, option
from resnet56.files import from_json, to_json, write_text
from resnet56.locks import try_lock
from resnet56.runs import schema
from resnet56.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from resnet56.runs.schema import Comparison, Environment, EpochMetrics, Evaluation, Parity


class RunDirectory:
    """Reads and writes the files of a run. The directory does not have to exist."""

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
        """Create the directory. Raises RunError if it cannot be used for a new run."""
        self.require_unused()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot create the run directory {self.path}: {error.strerror or error}"
            ) from None

    def require_unused(self) -> None:
        """Raise RunError if the directory cannot be used for a new run."""
        if self.checkpoint_file.exists():
            raise RunError(
                f"{self.path} already contains a run; continue it with {option('resume', True)} or "
                f"choose another directory for {option('out')}"
            )
        try:
            others = sorted(entry.name for entry in self.path.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:  # for example, the path is a file
            raise RunError(
                f"cannot use {self.path} as a run directory: {error.strerror or error}; choose "
                f"another directory for {option('out')}"
            ) from None
        # A new run may overwrite the files of a run that stopped before its first checkpoint.
        replaceable = (
            "recipe.json",
            "environment.json",
            "metrics.jsonl",
            "checkpoint",
            "tensorboard",
        )
        others = [name for name in others if name not in replaceable and not name.endswith(".tmp")]
        if others:
            raise RunError(
                f"{self.path} is not a run but contains files such as {others[0]}; choose another "
                f"directory for {option('out')}"
            )

    def is_imported(self) -> bool:
        """Return whether `resnet56 import` wrote the run. Imported runs have no recipe."""
        return self.checkpoint_file.exists() and not self.recipe_file.exists()

    def data_origin(self) -> str | None:
        """Return the value of --data for the data set of the run, or None if it is not recorded."""
        environment = self.read_environment()
        return environment["data"]["origin"] if environment and "data" in environment else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for training until the block ends. On Windows, do nothing.

        Raises:
            RunError: another process is training in this directory.
        """
        try:
            directory = os.open(self.path, os.O_RDONLY)
        except OSError:
            # On Windows, `os.open` rejects directories. Other functions report a missing directory.
            yield
            return
        try:
            if not try_lock(directory):
                raise RunError(
                    f"another process is training in {self.path}; wait until it ends, or stop it"
                )
            yield
        finally:
            os.close(directory)

    # environment.json

    def read_environment(self) -> Environment | None:
        """Read environment.json, or return None if it is missing.

        Raises:
            RunError: the file is damaged.
        """
        if not self.environment_file.exists():
            return None
        return schema.read(self.environment_file, Environment)

    def write_environment(self, environment: Environment) -> None:
        """Replace environment.json. Raises RunError if writing fails."""
        schema.write(self.environment_file, environment, Environment)

    # evaluation.json, predictions.npz and samples.npz

    def read_evaluation(self, step: int) -> Evaluation | None:
        """Read the evaluation of the weights after `step` steps, or return None if there is none.

        Raises:
            RunError: the file is damaged.
        """
        if not self.evaluation_file.exists():
            return None
        found = schema.read(self.evaluation_file, Evaluation)
        schema.check_evaluation(found, self.evaluation_file)
        return found if found["step"] == step else None

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Replace evaluation.json. Raises RunError if writing fails."""
        schema.check_evaluation(evaluation, self.evaluation_file)
        schema.write(self.evaluation_file, evaluation, Evaluation)

    def write_predictions(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace predictions.npz. Raises RunError if writing fails."""
        schema.save_arrays(self.predictions_file, schema.PREDICTIONS, arrays)

    def read_predictions(self) -> dict[str, npt.NDArray[Any]] | None:
        """Read the predictions on the test images, or return None if there are none.

        Raises:
            RunError: the file is damaged.
        """
        if not self.predictions_file.exists():
            return None
        return schema.load_arrays(self.predictions_file, schema.PREDICTIONS)

    def read_samples(self) -> dict[str, npt.NDArray[Any]] | None:
        """Read the images for the report, or return None if there are none.

        Raises:
            RunError: the file is damaged.
        """
        if not self.samples_file.exists():
            return None
        return schema.load_arrays(self.samples_file, schema.SAMPLES)

    def write_samples(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace samples.npz. Raises RunError if writing fails."""
        schema.save_arrays(self.samples_file, schema.SAMPLES, arrays)

    # metrics.jsonl

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl and flush it to disk. Raises RunError if writing fails."""
        schema.check(row, EpochMetrics, str(self.metrics_file))
        try:
            with self.metrics_file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(to_json(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write {self.metrics_file}: {error.strerror or error}; continue with "
                f"{option('resume', True)}"
            ) from None

    def read_metrics(self) -> list[EpochMetrics]:
        """Return the metrics of all epochs. An incomplete last line, left by a crash, is ignored.

        Raises:
            RunError: a line is damaged.
        """
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
        """Keep the metrics of the first `epochs` epochs, and remove all others.

        Raises RunError if writing fails.
        """
        if self.metrics_file.exists():
            rows = [row for row in self.read_metrics() if row["epoch"] <= epochs]
            text = "".join(to_json(row) + "\n" for row in rows)
            write_text(self.metrics_file, text)

    # parity.json

    def read_comparisons(self, step: int) -> list[Comparison]:
        """Return the comparisons that used the weights after `step` steps.

        Raises:
            RunError: the file is damaged.
        """
        if not self.parity_file.exists():
            return []
        comparisons = schema.read(self.parity_file, Parity)["comparisons"]
        return [entry for entry in comparisons if entry.get("step", step) == step]

    def add_comparison(self, comparison: Comparison, step: int) -> None:
        """Add a comparison of two devices or precisions that uses the weights after `step` steps.

        The comparison replaces an earlier comparison of the same pair. The function removes
        comparisons that were made with other weights.
        """
        pair = [comparison["a"], comparison["b"]]
        others = [e for e in self.read_comparisons(step) if [e["a"], e["b"]] != pair]
        comparison = {**comparison, "step": step}
        schema.write(self.parity_file, {"comparisons": [*others, comparison]}, Parity)

    # checkpoint/

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint. If the function raises RunError, the old one remains intact."""
        save_checkpoint(self.checkpoint_file, checkpoint)

    def load(self, *, training: bool = False) -> Checkpoint:
        """Read the checkpoint. If `training` is True, also read the training state.

        Raises:
            RunError: the checkpoint does not exist, is damaged, or has a newer format.
        """
        if not self.path.is_dir():
            raise RunError(f"no run found at {self.path}; choose a run directory")
        if not self.checkpoint_file.exists():
            raise RunError(f"{self.path} has no checkpoint yet; train first")
        return load_checkpoint(self.checkpoint_file, training=training)
