"""Train a model: data -> model -> epochs -> checkpoint -> evaluation."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from resnet56.cadence import stop_requests
from resnet56.custom import Augment, Custom, Loss, ModelLike, OptimizerFactory
from resnet56.data.dataset import Dataset
from resnet56.distributed import Distributed, process_group
from resnet56.errors import UsageError, one_line, option
from resnet56.evaluation import evaluate_run
from resnet56.files import StrPath
from resnet56.progress import TrainingDisplay, default_output
from resnet56.recipe import Recipe
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import Evaluation
from resnet56.runtime import resolve_device
from resnet56.threads import ThreadControl
from resnet56.training.loop import (
    Callback,
    CallbackError,
    EpochCallback,
    Interrupted,
    TrainingLoop,
)
from resnet56.training.record import (
    begin_run,
    describe_environment,
    load_checkpoint,
    tensorboard_writer,
)
from resnet56.training.setup import augmentation_of

__all__ = ["CallbackError", "Interrupted", "augmentation_of", "train"]


def train(
    recipe: Recipe,
    dataset: Dataset,
    out: StrPath,
    *,
    device: str = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    test_every_epoch: bool = False,
    evaluate: bool = True,
    threads: int | None = None,
    progress: bool | TrainingDisplay | None = None,
    model: ModelLike | None = None,
    optimizer: OptimizerFactory | None = None,
    loss: Loss | None = None,
    augment: Augment | None = None,
    callbacks: Sequence[EpochCallback | Callback] = (),
) -> Evaluation:
    """Train a model, save the run in `out`, and evaluate the model.

    Args:
        recipe: the training configuration. Its batch size is the total across all processes.
        dataset: training and test images. Without test images, the model is not evaluated.
        out: run directory. It must either be empty or not exist. With `resume`, it must contain a
            run with the same recipe.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: continue from the checkpoint in `out`.
        tensorboard: also write TensorBoard scalars to `out/tensorboard`.
        test_every_epoch: also record the test loss and accuracy after each epoch, for plots. These
            metrics do not influence training.
        evaluate: evaluate the model after the last epoch, which uses the test images. If False, the
            run can be evaluated later with `evaluate`.
        threads: number of CPU threads. By default, one thread per core that other programs leave
            free, adjusted during training.
        progress: whether to show progress. By default, progress appears in notebooks and on
            terminals. If True, training also prints progress to stderr when stderr is not a
            terminal.
            The command line passes its own display.
        model: a module that replaces the network of the recipe, or a function that takes the number
            of classes and returns a module. The module maps normalized float32 images
            (N, 3, 32, 32) to logits (N, classes). If `model` is a module, training changes it in
            place. To load the run later, pass the same model to `load`.
        optimizer: a function that replaces the optimizer of the recipe, such as
            `torch.optim.RMSprop`. It takes a list of the parameters to train, and the learning rate
            of the recipe as `lr`. Before each step, the schedule of the recipe scales the learning
            rate of each parameter group.
        loss: a function that replaces cross-entropy. It takes float32 logits (B, C) and int64
            labels (B,), or float32 probabilities (B, C) instead of labels if the recipe mixes
            images. It returns a scalar.
        augment: a function that replaces crops, flips, Cutout and TrivialAugment. It maps uint8
            images (B, 3, 32, 32) on the training device to images of the same dtype and shape. The
            images are then normalized, and mixed or downscaled as the recipe specifies.
        callbacks: functions, or objects with an `on_epoch` method. After saving the checkpoint of
            an epoch, training calls the callbacks with the metrics of the epoch in the format of
            metrics.jsonl.

    For each of `model`, `optimizer`, `loss` and `augment`, the run records the name and a hash of
    the source code. The hash also covers the numbers and strings in closures, attributes and
    arguments of `functools.partial`. A run can be resumed only with the same custom parts. The
    recipe's settings for a replaced part have no effect. Training seeds PyTorch's random number
    generators before each step, so custom parts that use these generators resume exactly.

    Returns:
        The content of evaluation.json, or an empty dictionary if `evaluate` is False, there are no
        test images or the rank is not 0.

    Raises:
        Interrupted: Ctrl-C or SIGTERM stopped training, and a checkpoint was written. This
            exception is a `KeyboardInterrupt`.
        TrainingError: the loss is not finite, or a custom part or a callback raises an exception.
            That exception is then the `__cause__` of the TrainingError.
        RunError: `out` does not meet the requirements above or cannot be written, another process
            is training in it, or weights that the recipe specifies are missing or damaged.
        UsageError: the device is not available, the validation set is too large, or a custom part
            returns an unexpected value.
    """
    if test_every_epoch and not evaluate:
        raise UsageError(
            f"{option('test_every_epoch', True)} uses the test images, so it cannot be combined "
            f"with {option('evaluate', False)}"
        )
    custom = Custom(model, optimizer, loss, augment)
    for callback in callbacks:
        if not callable(getattr(callback, "on_epoch", callback)):
            raise UsageError(
                f"the callback {one_line(repr(callback))} must be callable or have an "
                "on_epoch method"
            )
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
            saved = load_checkpoint(run, recipe, dataset, fingerprint, custom) if resume else None
            adaptive = torch_device.type == "cpu" and dist.world_size == 1
            control = stack.enter_context(ThreadControl(threads, adaptive=adaptive))
            loop = TrainingLoop(
                recipe, dataset, run, fingerprint, saved, torch_device, dist, stop, control,
                display, custom,
            )  # fmt: skip
            trained = loop.trainer.model if custom.model is not None else None
            augmentation = loop.setup.batches.augmentation
            try:
                with tensorboard_writer(
                    tensorboard and dist.is_main_process, run, loop.progress.step
                ) as scalars:
                    if dist.is_main_process:  # after all checks, so that an error leaves no files
                        if saved is None:
                            run.create()
                            stack.enter_context(run.locked())
                        environment = describe_environment(
                            loop.setup, dataset, torch_device, control.threads, dist.world_size
                        )
                        begin_run(run, recipe, environment, saved)
                    loop.run(dataset.test if test_every_epoch else None, scalars, callbacks)
            finally:
                del loop  # Release DDP before its process group.
        remedy = f"the model in {run.path} is trained; evaluate it with {option('resume', True)}"
        if stop.signum is not None:  # A signal arrived after the last step.
            raise Interrupted(remedy, stop.signum)
        if not (evaluate and dist.is_main_process and len(dataset.test)):
            return {}  # type: ignore[typeddict-item]
        try:
            with control:
                evaluation = evaluate_run(
                    run,
                    dataset,
                    device=torch_device,
                    val_size=recipe.val_size,
                    augmentation=augmentation,
                    model=trained,
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
