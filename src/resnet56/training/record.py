"""Write the files of a run during training, and resume from them."""

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from resnet56.custom import Custom, difference
from resnet56.data.dataset import Dataset
from resnet56.errors import RunError, UsageError, either, option
from resnet56.files import read_json, write_json
from resnet56.optimizer import PREFIX
from resnet56.recipe import Recipe, from_fields
from resnet56.runs.checkpoint import Checkpoint, Progress, require_fit
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import Environment, EpochMetrics
from resnet56.runtime import environment
from resnet56.training.setup import TrainingSetup


class Scalars(Protocol):
    """The methods of `SummaryWriter` that training uses."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log a scalar."""


def load_checkpoint(
    run: RunDirectory, recipe: Recipe, dataset: Dataset, fingerprint: str, custom: Custom
) -> Checkpoint:
    """Load the checkpoint of a run.

    Raises:
        RunError: the run has a different recipe, data set or custom part.
    """
    checkpoint = run.load(training=True)
    saved_fields = from_fields(read_json(run.recipe_file), str(run.recipe_file)).to_json()
    differing = [
        f"{name} {saved_fields[name]} -> {value}"
        for name, value in recipe.to_json().items()
        if value != saved_fields[name]
    ]
    if differing:
        longer = (
            f"; to train longer, start a new run with {option('weights', str(run.path))}"
            if recipe.epochs != saved_fields["epochs"]
            else ""
        )
        raise RunError(
            f"{run.path} has a different recipe ({', '.join(differing)}); resume it with the same "
            f"options, or choose another directory for {option('out')}{longer}"
        )
    changed = difference(checkpoint.metadata.get("custom", {}), custom.identities())
    if changed:
        raise RunError(
            f"{run.path} was trained {changed}, or choose another directory for {option('out')}"
        )
    if checkpoint.metadata.get("data") != fingerprint:
        its_data = either("its own data set", "its own data with --data")
        raise RunError(f"{run.path} was not trained on {dataset.source}; pass {its_data}")
    return checkpoint


def restore(setup: TrainingSetup, saved: Checkpoint, run: RunDirectory) -> str:
    """Restore the weights and the training state.

    Returns:
        A message for the user if the results will not be bitwise identical, or an empty string.

    Raises:
        RunError: the checkpoint does not match the model, or a teacher has changed.
    """
    hashes = [teacher["sha256"] for teacher in saved.metadata.get("teachers", [])]
    if hashes != [teacher["sha256"] for teacher in setup.teachers]:
        names = ", ".join(teacher["teacher"] for teacher in setup.teachers)
        raise RunError(
            f"cannot resume {run.path}: the weights of its teachers ({names}) have changed; "
            f"choose another directory for {option('out')}"
        )
    trainer = setup.trainer
    message = f"{run.checkpoint_file} does not match the recipe"
    require_fit(saved.model, trainer.weights(), message)
    saved_state, expected = dict(saved.training), trainer.state()
    if trainer.custom.optimizer is not None:  # the first step creates the optimizer state
        saved_state, expected = (
            {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
            for state in (saved_state, expected)
        )
    require_fit(saved_state, expected, message)
    trainer.restore(saved.model, saved.training, saved.metadata.get("optimizer"))
    if trainer.scaler.is_enabled() and saved.metadata.get("loss_scale"):
        trainer.scaler.load_state_dict(dict(saved.metadata["loss_scale"]))
    previous = [saved.metadata.get("precision"), saved.metadata.get("execution")]
    current = [setup.precision, setup.prepared.execution]
    if None in previous or previous == current:
        return ""
    return (
        f"resuming with {' '.join(current)} instead of {' '.join(map(str, previous))}: "
        "results are equal to within rounding error but not bitwise identical"
    )


def describe_environment(
    setup: TrainingSetup,
    dataset: Dataset,
    device: torch.device,
    threads: int,
    processes: int,
) -> Environment:
    """Return the content of environment.json."""
    result: dict[str, Any] = environment(device, setup.precision) | {
        "threads": threads,
        "processes": processes,
        "data": {
            "origin": dataset.origin,
            "source": dataset.source,
            "flip": setup.batches.augmentation.flip,
        },
        "execution": setup.prepared.execution,
    }
    if setup.teachers:
        result["teachers"] = setup.teachers
    if setup.custom:
        result["custom"] = setup.custom
    if setup.initial_weights is not None:
        result["initial_weights"] = setup.initial_weights
    if setup.prepared.reason:
        result["execution_reason"] = setup.prepared.reason
    return cast(Environment, result)


def begin_run(
    run: RunDirectory, recipe: Recipe, current: Environment, saved: Checkpoint | None
) -> None:
    """Write the files of a run before the first step."""
    if saved is None:
        run.metrics_file.unlink(missing_ok=True)
        write_json(run.recipe_file, recipe.to_json())
        run.write_environment(current)
        return
    run.rewind_metrics(saved.progress.epoch)
    original = run.read_environment() or current
    run.write_environment(
        {
            **original,
            "data": current["data"],  # The directory of the data set may have changed.
            "resumed": [*original.get("resumed", []), current],
        }
    )


def save_checkpoint(
    run: RunDirectory,
    setup: TrainingSetup,
    weights: Mapping[str, Tensor],
    progress: Progress,
    metadata: dict[str, Any],
) -> None:
    """Write a checkpoint.

    Args:
        run: the run directory.
        setup: the model and its trainer.
        weights: the weights to evaluate.
        progress: the progress of the run.
        metadata: additional metadata.

    Raises:
        NotFiniteError: a value is not finite. The previous checkpoint is kept.
        RunError: the checkpoint cannot be written.
    """
    trainer = setup.trainer
    metadata = {
        "resnet56": importlib.metadata.version("resnet56"),
        "weights": "ema" if trainer.emas else "final",
        "precision": setup.precision,
        "execution": setup.prepared.execution,
        "loss_scale": trainer.scaler.state_dict() or None,
        **metadata,
        **({"teachers": setup.teachers} if setup.teachers else {}),
        **({"custom": setup.custom} if setup.custom else {}),
        **({"optimizer": trainer.optimizer_values()} if trainer.custom.optimizer else {}),
        **({"initial_weights": setup.initial_weights} if setup.initial_weights else {}),
    }
    run.save(Checkpoint(setup.config, weights, trainer.state(), progress, metadata))


@contextlib.contextmanager
def tensorboard_writer(enabled: bool, run: RunDirectory, step: int) -> Iterator[Scalars | None]:
    """Yield a TensorBoard writer that overwrites the scalars recorded after `step`.

    If `enabled` is False, yield None.
    """
    if not enabled:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "TensorBoard is not installed; install it with: pip install 'resnet56[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)
    try:
        yield writer
    finally:
        writer.close()


def log_scalars(scalars: Scalars | None, row: EpochMetrics) -> None:
    """Write the metrics of an epoch to TensorBoard if it is enabled."""
    if scalars is not None:
        for name, value in row.items():
            if name not in ("epoch", "step"):
                scalars.add_scalar(name, cast(float, value), row["step"])
