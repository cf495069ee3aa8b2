"""Train a model: data -> model -> epochs -> checkpoint -> evaluation."""

import contextlib
from pathlib import Path

from resnet56.cadence import stop_requests
from resnet56.data.dataset import Dataset
from resnet56.distributed import Distributed, process_group
from resnet56.errors import option
from resnet56.evaluation import evaluate_run
from resnet56.files import StrPath
from resnet56.progress import TrainingDisplay, default_output
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import Evaluation
from resnet56.runtime import resolve_device
from resnet56.threads import ThreadControl
from resnet56.training.loop import EpochCallback, Interrupted, TrainingLoop
from resnet56.training.record import (
    begin_run,
    describe_environment,
    load_checkpoint,
    tensorboard_writer,
)
from resnet56.training.setup import augmentation_of

__all__ = ["Interrupted", "augmentation_of", "train"]


def train(
    recipe: Recipe,
    dataset: Dataset,
    out: StrPath,
    *,
    device: str = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    test_every_epoch: bool = False,
    threads: int | None = None,
    progress: bool | TrainingDisplay | None = None,
    on_epoch: EpochCallback | None = None,
) -> Evaluation:
    """Train a model, save the run in `out`, and evaluate it.

    Args:
        recipe: the training configuration. Its batch size is the total over all processes.
        dataset: training and test images. Without test images, the model is not evaluated.
        out: run directory. It must be empty or not exist. With `resume`, it must contain a run with
            the same recipe.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: continue from the checkpoint in `out`.
        tensorboard: also write TensorBoard scalars to `out/tensorboard`.
        test_every_epoch: also record the test loss and accuracy after each epoch, for plots. They
            do not influence training.
        threads: number of CPU threads. By default, the number of cores that other programs leave
            free, updated during training.
        progress: whether to show progress. By default, progress appears in notebooks and on
            terminals. If True, lines also go to stderr if it is not a terminal. The command line
            passes its own display.
        on_epoch: called after each epoch, when its checkpoint is saved, with the metrics of the
            epoch as in metrics.jsonl.

    Returns:
        The content of evaluation.json, or an empty dictionary without test images or on ranks
        other than 0.

    Raises:
        Interrupted: Ctrl-C or SIGTERM stopped training, and a checkpoint was written. This
            exception is a `KeyboardInterrupt`.
        TrainingError: the loss is not finite.
        RunError: `out` cannot be used or written.
        UsageError: the device is not available, or the validation set is too large.
    """
    run, torch_device = RunDirectory(Path(out)), resolve_device(device)
    with _open_display(progress) as display:
        with (
            process_group(torch_device) as dist,
            stop_requests() as stop,
            contextlib.ExitStack() as stack,
        ):
            fingerprint = dataset.fingerprint()
            if resume and dist.is_main_process:
                stack.enter_context(run.locked())
            saved = load_checkpoint(run, recipe, dataset, fingerprint) if resume else None
            adaptive = torch_device.type == "cpu" and dist.world_size == 1
            control = stack.enter_context(ThreadControl(threads, adaptive=adaptive))
            loop = TrainingLoop(
                recipe, dataset, run, fingerprint, saved, torch_device, dist, stop, control, display
            )
            try:
                with tensorboard_writer(
                    tensorboard and dist.is_main_process, run, loop.progress.step
                ) as scalars:
                    if dist.is_main_process:  # All checks have passed, so an error leaves no files.
                        if saved is None:
                            run.create()
                            stack.enter_context(run.locked())
                        environment = describe_environment(
                            loop.setup, dataset, torch_device, control.threads, dist.world_size
                        )
                        begin_run(run, recipe, environment, saved)
                    loop.run(dataset.test if test_every_epoch else None, scalars, on_epoch)
            finally:
                del loop  # Release DDP before its process group.
        remedy = f"the model in {run.path} is trained; evaluate it with {option('resume', True)}"
        if stop.signum is not None:  # A signal has arrived after the last step.
            raise Interrupted(remedy, stop.signum)
        if not dist.is_main_process or not len(dataset.test):
            return {}  # type: ignore[typeddict-item]
        try:
            with control:
                evaluation = evaluate_run(
                    run,
                    dataset,
                    device=torch_device,
                    val_size=recipe.val_size,
                    augmentation=augmentation_of(recipe, allow_flip=dataset.allow_flip),
                    progress=display.evaluation_progress,
                )
        except KeyboardInterrupt:
            raise Interrupted(remedy) from None
        display.result(evaluation)
        return evaluation


def _open_display(
    progress: bool | TrainingDisplay | None,
) -> contextlib.AbstractContextManager[TrainingDisplay]:
    """Return the display of this process. A display that the caller passed stays open."""
    if isinstance(progress, TrainingDisplay):
        return contextlib.nullcontext(progress)
    is_main_process = Distributed.from_environment().is_main_process
    return TrainingDisplay(default_output(progress if is_main_process else False))
