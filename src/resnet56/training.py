"""Train a model: data -> model -> epochs -> checkpoint -> evaluation."""

import contextlib
import importlib.metadata
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from resnet56.cadence import Cadence, StopRequest, stop_requests
from resnet56.data.augment import Augmentation
from resnet56.data.batches import Batches
from resnet56.data.dataset import Dataset, Split, channel_statistics, training_split
from resnet56.distillation import Teachers
from resnet56.distillation import fingerprint as weights_fingerprint
from resnet56.distributed import (
    Distributed,
    all_reduce_max,
    all_reduce_sum,
    process_group,
    synchronize_batch_norm,
)
from resnet56.ema import REESTIMATION_DECAY, REESTIMATION_IMAGES, reestimate_batch_norm
from resnet56.errors import NotFiniteError, RunError, TrainingError, UsageError, either, option
from resnet56.evaluation import evaluate, evaluate_run
from resnet56.files import StrPath, read_json, write_json
from resnet56.model import build
from resnet56.progress import TrainingDisplay, default_output
from resnet56.recipe import Recipe, from_fields
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, Progress, require_fit
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import Environment, EpochMetrics, Evaluation
from resnet56.runs.sources import open_model
from resnet56.runtime import (
    Precision,
    environment,
    peak_memory_mb,
    resolve_device,
    resolve_precision,
)
from resnet56.step import PreparedModel, Trainer, learning_rate, prepare_model
from resnet56.threads import ThreadControl, ThroughputMonitor


class Interrupted(KeyboardInterrupt):
    """Training stopped because of Ctrl-C or SIGTERM, after writing a checkpoint."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

    def _render_traceback_(self) -> list[str]:
        """Return what IPython prints. The traceback would only show the current step."""
        return [str(self)]


EpochCallback = Callable[[EpochMetrics], object]


class Scalars(Protocol):
    """The methods of `SummaryWriter` that training uses."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log a scalar."""


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
        dataset: training and test images.
        out: run directory. It must not exist, or with `resume` hold a run with the same recipe.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        resume: continue from the checkpoint in `out`.
        tensorboard: also write TensorBoard scalars to `out/tensorboard`.
        test_every_epoch: also record the test loss and accuracy after each epoch, for plots. They
            do not influence training.
        threads: number of CPU threads. By default, all cores that other programs leave free. This
            number is updated during training.
        progress: whether to show the progress. By default, it is shown in a notebook, and on stderr
            if that is a terminal. True also writes lines to stderr if it is not a terminal.
        on_epoch: called after each epoch with its row of metrics.jsonl. The checkpoint has been
            saved.

    Returns:
        The content of evaluation.json. An empty dictionary if the rank is not 0.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, a KeyboardInterrupt. A checkpoint has been written.
        TrainingError: the loss is not finite.
        RunError: `out` cannot be used or written.
        UsageError: the device is not available, or the validation set is too large.
    """
    resolved = resolve_device(device)
    run = RunDirectory(Path(out))
    with _open_display(progress) as display:
        with (
            process_group(resolved) as dist,
            stop_requests() as stop,
            contextlib.ExitStack() as stack,
        ):
            fingerprint = dataset.fingerprint()
            if resume and dist.is_main_process:
                stack.enter_context(run.locked())
            saved = _load_resumed(run, recipe, dataset.source, fingerprint) if resume else None
            adaptive = resolved.type == "cpu" and dist.world_size == 1
            control = stack.enter_context(ThreadControl(threads, adaptive=adaptive))
            loop = TrainingLoop(
                recipe, dataset, run, fingerprint, saved, resolved, dist, stop, control, display
            )
            try:
                with _tensorboard(
                    tensorboard and dist.is_main_process, run, loop.progress.step
                ) as scalars:
                    if dist.is_main_process:  # after all checks, so that an error leaves no files
                        if saved is None:
                            run.create()
                            stack.enter_context(run.locked())
                        _write_run_files(run, recipe, loop.run_environment(dataset), saved)
                    loop.run(dataset.test if test_every_epoch else None, scalars, on_epoch)
            finally:
                del loop  # DDP is released before its process group
        unevaluated = (
            f"the model in {run.path} is trained; evaluate it with {option('resume', True)}"
        )
        if stop.signum is not None:  # received after the last step
            raise Interrupted(unevaluated, stop.signum)
        if not dist.is_main_process:
            return {}  # type: ignore[typeddict-item]
        try:
            with control:
                result = evaluate_run(
                    run,
                    dataset,
                    device=resolved,
                    val_size=recipe.val_size,
                    augmentation=augmentation_of(recipe, allow_flip=dataset.allow_flip),
                    progress=display.evaluation_progress,
                )
        except KeyboardInterrupt:
            raise Interrupted(unevaluated) from None
        display.result(result)
        return result


def _open_display(
    progress: bool | TrainingDisplay | None,
) -> contextlib.AbstractContextManager[TrainingDisplay]:
    """Return the display of the main process. The caller closes its own display."""
    if isinstance(progress, TrainingDisplay):
        return contextlib.nullcontext(progress)
    is_main_process = Distributed.from_environment().is_main_process
    return TrainingDisplay(default_output(progress if is_main_process else False))


def augmentation_of(recipe: Recipe, *, allow_flip: bool) -> Augmentation:
    """Return the augmentation of a recipe, without flips unless `allow_flip` is set."""
    return Augmentation(
        padding=recipe.padding,
        flip=recipe.flip and allow_flip,
        alternate_flip=recipe.alternate_flip,
        cutout=recipe.cutout,
        trivial_augment=recipe.trivial_augment,
        sizes=recipe.sizes,
        mix=recipe.mix,
        mix_alpha=recipe.mix_alpha,
        mix_probability=recipe.mix_probability,
        weak_augmentation_from=recipe.epochs - recipe.weak_augmentation_epochs
        if recipe.weak_augmentation_epochs
        else None,
    )


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
        display: shows the progress.
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
    ) -> None:
        self.recipe, self.run_directory, self.fingerprint = recipe, run, fingerprint
        self.device, self.dist, self.display = device, dist, display
        self.precision = resolve_precision(recipe.precision, device)
        recorded = saved.metadata.get("threads") if saved is not None else None
        self.log(threads.begin(saved.progress.step if saved is not None else 0, recorded))
        training, self.validation = training_split(dataset, recipe.val_size)
        mean, std = channel_statistics(training.images)
        self.config = ModelConfig(recipe.arch, dataset.classes, mean, std)
        teachers = {name: open_model(name).checkpoint for name in recipe.teacher}
        self.teachers = [
            {
                "teacher": name,
                "arch": teacher.config.arch,
                "sha256": weights_fingerprint(teacher),
            }
            for name, teacher in teachers.items()
        ]
        ensemble = Teachers(teachers, self.config, device, self.precision) if teachers else None
        self.trainer, self.prepared = _trainer(
            recipe, len(dataset.classes), device, self.precision, dist, ensemble
        )
        self.batches = Batches(
            Split(training.images.to(device), training.labels.to(device)),
            torch.tensor(mean, device=device),
            torch.tensor(std, device=device),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            augmentation=augmentation_of(recipe, allow_flip=dataset.allow_flip),
            classes=len(dataset.classes),
            rank=dist.rank,
            world_size=dist.world_size,
        )
        self.cadence = Cadence(self.batches.steps, stop, threads, dist, device)
        self.throughput = ThroughputMonitor(threads, device.type)
        self.costs = _costs(recipe)
        self.progress = Progress()
        if self.prepared.remedy:
            self.log(
                f"training is slower than necessary: {self.prepared.reason}; {self.prepared.remedy}"
            )
        self.selected: Mapping[str, Tensor] | None = None  # the best EMA, after the last epoch
        self.ema_metadata: dict[str, Any] = {}
        if saved is not None:
            self._restore(saved)

    def run(
        self,
        test: Split | None = None,
        scalars: Scalars | None = None,
        on_epoch: EpochCallback | None = None,
    ) -> None:
        """Train from the current progress to the last epoch.

        Args:
            test: images to evaluate after each epoch, or None.
            scalars: TensorBoard writer, or None.
            on_epoch: called with the row of each epoch, or None.
        """
        splits = {"val": self.validation, "test": test}
        self.display.begin(self.costs, self.batches.steps, self.progress.step)
        if self.progress.step == 0:
            self.save()  # makes the run resumable before the first step
        while self.progress.epoch < self.recipe.epochs:
            lr = self.train_epoch()
            row = self.summary(lr)
            if self.dist.is_main_process:
                if self.progress.epoch + 1 == self.recipe.epochs:
                    self.select_ema()
                for name, split in splits.items():
                    if split is not None:
                        row |= self.measure(name, split, self.weights())  # type: ignore[typeddict-item]
                self.run_directory.append_metrics(row)  # before saving; resuming removes extra rows
                _log_scalars(scalars, row)
            self.progress = Progress(epoch=self.progress.epoch + 1, step=self.progress.step)
            message = self.cadence.threads.after_step(self.progress.step)
            self.save()
            self.log(message)
            self.display.epoch(row)
            if on_epoch is not None and self.dist.is_main_process:
                on_epoch(row)
            if self.progress.epoch < self.recipe.epochs and self.cadence.stop_requested():
                raise self.interrupted()

    def train_epoch(self) -> float:
        """Run the rest of the current epoch, and return its last learning rate."""
        start, started, lr = self.progress, time.perf_counter(), 0.0
        # The saved sums cover all processes, so only the main process restores them.
        self.trainer.reset_sums(
            *((start.loss_sum, start.correct) if self.dist.is_main_process else ())
        )
        self.trainer.model.train()
        for images, labels in self.batches.epoch(start.epoch, start.epoch_step):
            step, epoch_step = self.progress.step, self.progress.epoch_step + 1
            lr = learning_rate(self.recipe, step, self.batches.steps)
            self.trainer.step(images, labels, lr, step)
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

    def read_loss(self) -> None:
        """Read and display the running loss. Raise TrainingError if a loss is not finite."""
        # Share the failed step, so that all processes stop together.
        diverged = int(all_reduce_max(self.trainer.first_nonfinite_step.clone(), self.dist))
        if diverged >= 0:
            epoch = diverged // self.batches.steps + 1
            lr = learning_rate(self.recipe, diverged, self.batches.steps)
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {diverged + 1}, at learning rate "
                f"{lr:g}; the last good checkpoint is in {self.run_directory.path}; try a "
                f"lower {option('lr')} or a longer {option('warmup_epochs')}"
            )
        loss_sum, correct = all_reduce_sum(self.trainer.sums.clone(), self.dist).tolist()
        self.progress = replace(self.progress, loss_sum=loss_sum, correct=correct)
        if self.dist.is_main_process:
            images, seconds = self.progress.images, self.progress.seconds
            self.display.step(
                self.progress.step, loss_sum / images, correct / images, images / seconds
            )
            self.log(self.throughput.update(images, seconds, self.costs[self.progress.epoch]))

    def log(self, line: str) -> None:
        """Display a line in the main process, unless it is empty."""
        if line and self.dist.is_main_process:
            self.display.log(line)

    def interrupted(self) -> Interrupted:
        """Return the exception for a stop request. The checkpoint has been saved."""
        finished, within = self.progress.epoch, self.progress.epoch_step > 0
        epoch = f"in epoch {finished + 1}" if within else f"after epoch {finished}"
        return Interrupted(
            f"training stopped {epoch} of {self.recipe.epochs}; the checkpoint is saved in "
            f"{self.run_directory.path}; continue with {option('resume', True)}",
            self.cadence.stop.signum or signal.SIGTERM,
        )

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

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights to save and evaluate."""
        return self.trainer.weights() if self.selected is None else self.selected

    def measure(self, name: str, split: Split, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the loss and accuracy of `weights` on `split`."""
        net = self.config
        model = build(net.arch, classes=len(net.classes)).to(self.device)
        model.load_state_dict(weights)
        try:
            metrics = evaluate(model, split, net.classes, net.mean, net.std, self.precision)
        except NotFiniteError as error:
            raise self._diverged(error) from error
        return {f"{name}_loss": metrics["loss"], f"{name}_accuracy": metrics["accuracy"]}

    def select_ema(self) -> None:
        """Select the EMA with the highest validation accuracy, if there is an EMA."""
        candidates: list[tuple[dict[str, Any], Mapping[str, Tensor]]] = []
        for ema in self.trainer.emas:
            reestimated = ema.decay > REESTIMATION_DECAY
            weights = self._reestimate_statistics(ema.tensors) if reestimated else ema.tensors
            metrics: dict[str, Any] = {"decay": ema.decay, "reestimated": reestimated}
            if self.validation is not None:
                metrics |= self.measure("val", self.validation, weights)
            candidates.append((metrics, weights))
        if candidates:
            # Ties are resolved by the loss. A single EMA needs no validation set.
            best, self.selected = max(
                candidates,
                key=lambda pair: (pair[0].get("val_accuracy", 0), -pair[0].get("val_loss", 0)),
            )
            candidate_metrics = [metrics for metrics, _ in candidates]
            self.ema_metadata = {"ema_decay": best["decay"], "ema_candidates": candidate_metrics}
            if len(candidates) > 1:
                self.log(f"EMA decay {best['decay']:g} has the highest validation accuracy")

    def _reestimate_statistics(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return `weights` with batch norm statistics computed on images of the last epoch."""
        model = build(self.config.arch, classes=len(self.config.classes))
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(weights)
        # This runs in one process, on global batches.
        batches = replace(self.batches, rank=0, world_size=1)
        count = math.ceil(REESTIMATION_IMAGES / batches.global_batch)
        images = (images for images, _ in batches.epoch(self.recipe.epochs - 1))
        reestimate_batch_norm(model, itertools.islice(images, count), self.precision)
        return model.state_dict()

    def save(self) -> None:
        """Write a checkpoint. Raise TrainingError if it contains values that are not finite."""
        self.cadence.record_save()
        if not self.dist.is_main_process:
            return
        metadata = {
            "resnet56": importlib.metadata.version("resnet56"),
            "data": self.fingerprint,
            "weights": "ema" if self.trainer.emas else "final",
            "precision": self.precision,
            "execution": self.prepared.execution,
            "loss_scale": self.trainer.scaler.state_dict() or None,
            "threads": self.cadence.threads.state(),
            **self.ema_metadata,
            **({"teachers": self.teachers} if self.teachers else {}),
        }
        weights, state = self.weights(), self.trainer.state()
        try:
            self.run_directory.save(
                Checkpoint(self.config, weights, state, self.progress, metadata)
            )
        except NotFiniteError as error:
            raise self._diverged(error) from error
        except RunError as error:
            begun = self.run_directory.checkpoint_file.exists()
            remedy = (
                f"continue with {option('resume', True)}" if begun else "then start training again"
            )
            raise RunError(f"{error}; {remedy}") from error

    def _diverged(self, error: NotFiniteError) -> TrainingError:
        return TrainingError(
            f"training diverged at step {self.progress.step:,}: {error}; the last good "
            f"checkpoint is in {self.run_directory.path}; try a lower {option('lr')} or a "
            f"longer {option('warmup_epochs')}"
        )

    def run_environment(self, dataset: Dataset) -> Environment:
        """Return the content of environment.json."""
        result: dict[str, Any] = environment(self.device, self.precision) | {
            "threads": self.cadence.threads.threads,
            "processes": self.dist.world_size,
            "data": {
                "origin": dataset.origin,
                "source": dataset.source,
                "flip": self.batches.augmentation.flip,
            },
            "execution": self.prepared.execution,
        }
        if self.teachers:
            result["teachers"] = self.teachers
        if self.prepared.reason:
            result["execution_reason"] = self.prepared.reason
        return cast(Environment, result)

    def _restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint."""
        hashes = [teacher["sha256"] for teacher in saved.metadata.get("teachers", [])]
        if hashes != [teacher["sha256"] for teacher in self.teachers]:
            raise RunError(
                f"cannot resume {self.run_directory.path}: the weights of its teachers "
                f"({', '.join(self.recipe.teacher)}) have changed; "
                f"choose another directory for {option('out')}"
            )
        self.progress = saved.progress
        message = f"{self.run_directory.checkpoint_file} does not match the recipe"
        require_fit(saved.model, self.trainer.weights(), message)
        require_fit(saved.training, self.trainer.state(), message)
        self.trainer.restore(saved.model, saved.training)
        if self.trainer.scaler.is_enabled() and saved.metadata.get("loss_scale"):
            self.trainer.scaler.load_state_dict(dict(saved.metadata["loss_scale"]))
        previous = [saved.metadata.get("precision"), saved.metadata.get("execution")]
        current = [self.precision, self.prepared.execution]
        if None not in previous and previous != current:
            self.log(
                f"resuming with {' '.join(current)} instead of {' '.join(map(str, previous))}: "
                "results are equal up to rounding, not bit for bit"
            )


def _trainer(
    recipe: Recipe,
    classes: int,
    device: torch.device,
    precision: Precision,
    dist: Distributed,
    teachers: Teachers | None,
) -> tuple[Trainer, PreparedModel]:
    """Build the model on its device, its trainer, and its forward pass."""
    model = build(recipe.arch, classes=classes, seed=recipe.seed)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dist.world_size == 1:
        prepared = prepare_model(model, recipe.execution, precision)
        return Trainer(model, prepared.module, recipe, precision, teachers), prepared
    if recipe.execution not in ("auto", "eager"):
        raise UsageError(
            f"{recipe.execution} execution does not support several processes; use "
            f"{option('execution', 'auto')}"
        )
    model = synchronize_batch_norm(model)  # type: ignore[assignment]
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids)
    # The batch norm statistics are already synchronized. This is set as an attribute because the
    # name of the argument differs between PyTorch releases.
    wrapped.broadcast_buffers = False
    prepared = PreparedModel(wrapped, "eager", "several processes require synchronized batch norm")
    return Trainer(model, wrapped, recipe, precision, teachers), prepared


def _costs(recipe: Recipe) -> list[float]:
    """Return the relative duration of a step in each epoch. A step on 32x32 images takes 1."""
    rest = [32] * (recipe.epochs - len(recipe.sizes))
    # A fifth of the time does not depend on the size. Measured: 0.39 for 16x16 and 0.64 for 24x24
    # (resnet56, batch size 64, two CPU cores, results/fast-seed0).
    return [0.2 + 0.8 * (side / 32) ** 2 for side in (*recipe.sizes, *rest)][: recipe.epochs]


def _load_resumed(run: RunDirectory, recipe: Recipe, source: str, fingerprint: str) -> Checkpoint:
    """Load the checkpoint. Raise RunError if its recipe or data set differs."""
    checkpoint = run.load(training=True)
    saved_fields = from_fields(read_json(run.recipe_file), str(run.recipe_file)).to_json()
    fields = recipe.to_json()
    differing = [
        f"{name} {saved_fields[name]} -> {value}"
        for name, value in fields.items()
        if value != saved_fields[name]
    ]
    if differing:
        raise RunError(
            f"{run.path} has a different recipe ({', '.join(differing)}); resume it with the same "
            f"options, or choose another directory for {option('out')}"
        )
    if checkpoint.metadata.get("data") != fingerprint:
        its_data = either("its own data set", "its own data with --data")
        raise RunError(f"{run.path} was not trained on {source}; pass {its_data}")
    return checkpoint


def _write_run_files(
    run: RunDirectory, recipe: Recipe, record: Environment, saved: Checkpoint | None
) -> None:
    """Write the files that are known before the first step."""
    if saved is not None:
        run.rewind_metrics(saved.progress.epoch)
        original = run.read_environment() or record
        record = {
            **original,
            "data": record["data"],  # the directory may have changed
            "resumed": [*original.get("resumed", []), record],
        }
    else:
        run.metrics_file.unlink(missing_ok=True)
        write_json(run.recipe_file, recipe.to_json())
    run.write_environment(record)


def _log_scalars(scalars: Scalars | None, row: EpochMetrics) -> None:
    if scalars is not None:
        for name, value in row.items():
            if name not in ("epoch", "step"):
                scalars.add_scalar(name, cast(float, value), row["step"])


@contextlib.contextmanager
def _tensorboard(enabled: bool, run: RunDirectory, step: int) -> Iterator[Scalars | None]:
    if not enabled:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "TensorBoard is not installed; pip install 'resnet56[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)
    try:
        yield writer
    finally:
        writer.close()
