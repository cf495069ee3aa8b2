"""The training loop: epochs of steps, with their metrics and checkpoints."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from resnet56.cadence import Cadence, StopRequest
from resnet56.custom import Custom, name_of
from resnet56.data.batches import derive_seed, seeded
from resnet56.data.dataset import Dataset, Split
from resnet56.distributed import Distributed, all_reduce_max, all_reduce_sum
from resnet56.errors import NotFiniteError, RunError, TrainingError, one_line, option
from resnet56.progress import TrainingDisplay
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import Checkpoint, Progress
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import EpochMetrics
from resnet56.runtime import peak_memory_mb
from resnet56.step import learning_rate
from resnet56.threads import ThreadControl, ThroughputMonitor
from resnet56.training.final_weights import measure, select_ema
from resnet56.training.record import Scalars, log_scalars, restore, save_checkpoint
from resnet56.training.setup import set_up, step_costs

EpochCallback = Callable[[EpochMetrics], object]
# Training from random weights logs a hint if it takes fewer steps than this limit. With a momentum
# of 0.1, the running statistics of batch norm then still contain more than 0.9**50 = 0.5 % of their
# initial values, so the evaluation can differ greatly from training.
MIN_STEPS = 50
STEP_STREAM = 4  # separates the random numbers of a training step from other uses of the seed


class Callback(Protocol):
    """An object with an `on_epoch` method, which `train` calls after each epoch."""

    def on_epoch(self, row: EpochMetrics) -> object:
        """Receive the metrics of an epoch, in the format of metrics.jsonl."""
        ...


class CallbackError(TrainingError):
    """A callback raised an exception. That exception is the `__cause__` of this one."""


class Interrupted(KeyboardInterrupt):
    """Raised when Ctrl-C or SIGTERM stops training, after a checkpoint is saved."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython prints. A traceback would show only the current step."""
        return [str(self)]


class TrainingLoop:
    """The training loop and its state.

    Args:
        recipe: the training configuration.
        dataset: the data set.
        run: the run directory.
        fingerprint: fingerprint of the data set.
        saved: checkpoint to continue from, or None.
        device: training device.
        dist: rank and world size.
        stop: stop request of this process.
        threads: thread control of this process.
        display: the progress display.
        custom: parts that replace built-in ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        run: RunDirectory,
        fingerprint: str,
        saved: Checkpoint | None,
        device: torch.device,
        dist: Distributed,
        stop: StopRequest,
        threads: ThreadControl,
        display: TrainingDisplay,
        custom: Custom,
    ) -> None:
        self.recipe, self.run_directory, self.fingerprint = recipe, run, fingerprint
        self.device, self.dist, self.display = device, dist, display
        self.progress = saved.progress if saved is not None else Progress()
        recorded = saved.metadata.get("threads") if saved is not None else None
        self.log(threads.begin(self.progress.step, recorded))
        self.setup = set_up(recipe, dataset, device, dist, saved, custom)
        self.trainer, self.batches = self.setup.trainer, self.setup.batches
        self.cadence = Cadence(self.batches.steps, stop, threads, dist, device)
        self.throughput = ThroughputMonitor(threads, device.type)
        self.costs = step_costs(recipe)
        self.selected: Mapping[str, Tensor] | None = None  # best EMA, known after the last epoch
        self.ema_metadata: dict[str, Any] = {}
        prepared = self.setup.prepared
        if prepared.remedy:
            self.log(f"training is slower than necessary: {prepared.reason}; {prepared.remedy}")
        elif custom.model is not None and prepared.reason:
            self.log(f"{prepared.execution} execution: {prepared.reason}")
        initial = self.setup.initial_weights
        if initial is not None and saved is None and initial["new_classifier"]:
            self.log(
                "the classifier starts from random weights because "
                f"{initial['weights']} has different classes"
            )
        if saved is not None:
            self.log(restore(self.setup, saved, run))
            if self.progress.epoch == recipe.epochs:
                self.log("all epochs are complete; the model is not trained further")
        strong = recipe.cutout or recipe.trivial_augment or recipe.mix != "none"
        if saved is None and recipe.plain_tail >= recipe.epochs and strong and not custom.augment:
            self.log(
                f"{option('plain_tail', recipe.plain_tail)} disables mixing, Cutout and "
                "TrivialAugment in all epochs; reduce it to use them"
            )
        steps = recipe.epochs * self.batches.steps
        if saved is None and initial is None and custom.model is None and steps < MIN_STEPS:
            self.log(
                f"training has only {steps} step{'s' * (steps > 1)}, which is rarely enough for "
                f"random weights; increase {option('epochs')}, reduce {option('batch_size')}, or "
                f"set {option('weights')} to trained weights"
            )

    def run(
        self,
        test: Split | None = None,
        scalars: Scalars | None = None,
        callbacks: Sequence[EpochCallback | Callback] = (),
    ) -> None:
        """Train from the current step to the end of the last epoch.

        Args:
            test: images to evaluate after each epoch, or None.
            scalars: TensorBoard writer, or None.
            callbacks: functions or objects to call with the metrics of each epoch.
        """
        self.display.begin(self.costs, self.batches.steps, self.progress.step)
        if self.progress.step == 0:
            self.save()  # Make the run resumable before the first step.
        while self.progress.epoch < self.recipe.epochs:
            lr = self.train_epoch()
            row = self.summary(lr)
            if self.dist.is_main_process:
                if self.progress.epoch + 1 == self.recipe.epochs:
                    self.select_ema()
                row = self.with_measurements(row, {"val": self.setup.validation, "test": test})
                # Append the row before saving the checkpoint. Resuming removes extra rows.
                self.run_directory.append_metrics(row)
                log_scalars(scalars, row)
            self.progress = Progress(epoch=self.progress.epoch + 1, step=self.progress.step)
            message = self.cadence.threads.after_step(self.progress.step)
            self.save()
            self.log(message)
            self.display.epoch(row)
            if self.dist.is_main_process:
                self.call(callbacks, row)
            if self.progress.epoch < self.recipe.epochs and self.cadence.stop_requested():
                raise self.interrupted()

    def train_epoch(self) -> float:
        """Run the rest of the current epoch, and return its last learning rate."""
        start, started, lr = self.progress, time.perf_counter(), 0.0
        # The saved sums cover all processes, so only the main process restores them.
        self.trainer.reset_sums(
            *((start.loss_sum, start.correct) if self.dist.is_main_process else ())
        )
        self.trainer.train_mode()
        for images, labels in self.batches.epoch(start.epoch, start.epoch_step):
            step, epoch_step = self.progress.step, self.progress.epoch_step + 1
            lr = learning_rate(self.recipe, step, self.batches.steps)
            self.step(images, labels, lr, step)
            self.progress = replace(
                self.progress,
                step=step + 1,
                epoch_step=epoch_step,
                images=epoch_step * self.batches.global_batch,
                seconds=start.seconds + time.perf_counter() - started,
            )
            due = self.cadence.after_step(step + 1, epoch_step)
            if due.read_loss:
                self.read_loss()
            if due.save:
                self.save()
            self.log(due.message)
            if due.stop:
                raise self.interrupted()
        seconds = start.seconds + time.perf_counter() - started
        self.progress = replace(self.progress, seconds=seconds)
        return lr

    def step(self, images: Tensor, targets: Tensor, lr: float, step: int) -> None:
        """Perform a training step. Custom parts get their own random numbers in each step."""
        if not self.setup.custom:
            self.trainer.step(images, targets, lr, step)
            return
        seed = derive_seed(self.recipe.seed, step, STEP_STREAM, self.dist.rank)
        with seeded(seed, self.device):
            self.trainer.step(images, targets, lr, step)
        if step == 0:
            self.trainer.state()  # raises an error if the optimizer cannot be saved

    def call(self, callbacks: Sequence[EpochCallback | Callback], row: EpochMetrics) -> None:
        """Call the callbacks with the metrics of an epoch, after its checkpoint is saved."""
        for callback in callbacks:
            function: Any = getattr(callback, "on_epoch", callback)
            try:
                function(row)
            except Exception as error:
                raise CallbackError(
                    f"the callback {name_of(callback)} raised {type(error).__name__} after epoch "
                    f"{row['epoch']}: {one_line(error)}; the checkpoint is saved in "
                    f"{self.run_directory.path}; continue with {option('resume', True)}"
                ) from error

    def read_loss(self) -> None:
        """Read and display the running loss. Raise TrainingError if a loss is not finite."""
        # Share the failed step so that all processes stop together.
        diverged = int(all_reduce_max(self.trainer.first_nonfinite_step.clone(), self.dist))
        if diverged >= 0:
            epoch = diverged // self.batches.steps + 1
            lr = learning_rate(self.recipe, diverged, self.batches.steps)
            raise self.diverged(
                f"the loss is not finite in epoch {epoch}, step {diverged + 1}, at learning rate "
                f"{lr:g}"
            )
        loss_sum, correct = all_reduce_sum(self.trainer.sums.clone(), self.dist).tolist()
        self.progress = replace(self.progress, loss_sum=loss_sum, correct=correct)
        if self.dist.is_main_process:
            images, seconds = self.progress.images, self.progress.seconds
            self.display.step(
                self.progress.step, loss_sum / images, correct / images, images / seconds
            )
            self.log(self.throughput.update(images, seconds, self.costs[self.progress.epoch]))

    def summary(self, lr: float) -> EpochMetrics:
        """Return the row of metrics.jsonl for the finished epoch."""
        progress = self.progress
        return {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": lr,
            "train_loss": progress.loss_sum / progress.images,
            "train_accuracy": progress.correct / progress.images,
            "images_per_second": progress.images / progress.seconds,
            "seconds": progress.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
            "threads": self.cadence.threads.threads,
        }

    def with_measurements(
        self, row: EpochMetrics, splits: Mapping[str, Split | None]
    ) -> EpochMetrics:
        """Return a copy of `row` with the loss and accuracy on each split."""
        measured: dict[str, float] = {}
        try:
            for name, split in splits.items():
                if split is not None:
                    measured |= measure(self.setup, name, split, self.weights())
        except NotFiniteError as error:
            raise self.diverged(error) from error
        return cast(EpochMetrics, row | measured)

    def select_ema(self) -> None:
        """Use the EMA with the highest validation accuracy, if there is an EMA."""
        try:
            self.selected, self.ema_metadata = select_ema(self.setup, self.progress.epoch)
        except NotFiniteError as error:
            raise self.diverged(error) from error
        if len(self.trainer.emas) > 1:
            decay = self.ema_metadata["ema_decay"]
            self.log(f"EMA decay {decay:g} has the highest validation accuracy")

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights to save and evaluate."""
        return self.trainer.weights() if self.selected is None else self.selected

    def save(self) -> None:
        """Write a checkpoint. Raise TrainingError if any value is not finite."""
        self.cadence.record_save()
        if not self.dist.is_main_process:
            return
        metadata = {
            "data": self.fingerprint,
            "threads": self.cadence.threads.state(),
            **self.ema_metadata,
        }
        try:
            save_checkpoint(self.run_directory, self.setup, self.weights(), self.progress, metadata)
        except NotFiniteError as error:
            raise self.diverged(error) from error
        except RunError as error:
            begun = self.run_directory.checkpoint_file.exists()
            remedy = (
                f"continue with {option('resume', True)}" if begun else "then start training again"
            )
            raise RunError(f"{error}; {remedy}") from error

    def diverged(self, error: NotFiniteError | str) -> TrainingError:
        """Return the exception for non-finite values."""
        if isinstance(error, NotFiniteError):
            error = f"training diverged at step {self.progress.step:,}: {error}"
        return TrainingError(
            f"{error}; the last good checkpoint is in {self.run_directory.path}; try a lower "
            f"{option('lr')} or a longer {option('warmup_epochs')}"
        )

    def interrupted(self) -> Interrupted:
        """Return the exception for a stop request. The checkpoint must already be saved."""
        finished, within = self.progress.epoch, self.progress.epoch_step > 0
        epoch = f"in epoch {finished + 1}" if within else f"after epoch {finished}"
        return Interrupted(
            f"training stopped {epoch} of {self.recipe.epochs}; the checkpoint is saved in "
            f"{self.run_directory.path}; continue with {option('resume', True)}",
            self.cadence.stop.signum or signal.SIGTERM,
        )

    def log(self, line: str) -> None:
        """Display a line in the main process, unless the line is empty."""
        if line and self.dist.is_main_process:
            self.display.log(line)
