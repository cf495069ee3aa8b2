"""The story of a training: data -> model -> epochs -> checkpoint -> evaluation."""

import contextlib
import importlib.metadata
import itertools
import math
import signal
import time
from collections.abc import Iterator, Mapping
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
    highest,
    process_group,
    synchronize_batch_norm,
    total,
)
from resnet56.ema import LONG_DECAY, REESTIMATED_ON, reestimate_batch_norm
from resnet56.errors import NotFiniteError, RunError, TrainingError, UsageError
from resnet56.evaluation import evaluate, evaluate_run
from resnet56.files import read_json, write_json
from resnet56.model import build
from resnet56.progress import TrainingDisplay
from resnet56.recipe import Recipe, from_fields
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, Progress, require_fit
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import Environment, Evaluation
from resnet56.runs.sources import open_network
from resnet56.runtime import (
    Precision,
    environment,
    peak_memory_mb,
    resolve_device,
    resolve_precision,
)
from resnet56.step import PreparedModel, Trainer, learning_rate, prepare_model
from resnet56.threads import ThreadControl, ThroughputMonitor


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """Ctrl-C or SIGTERM came; the checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


class Scalars(Protocol):
    """What is used of a TensorBoard writer."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log one number."""


def train(
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    test_every_epoch: bool = False,
    threads: int | None = None,
    display: TrainingDisplay | None = None,
) -> Evaluation:
    """Train by `recipe` on `dataset`, leave the run in `out`, and test it.

    Args:
        recipe: how to train; its batch is the global one when torchrun starts several processes.
        dataset: what to train and test on.
        out: the run directory; must be new, or with `resume` hold a run of the same recipe.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        resume: continue from the checkpoint in `out`.
        tensorboard: also write scalars for TensorBoard, in `out/tensorboard`.
        test_every_epoch: also record the test loss and accuracy after each epoch, for curves;
            nothing is chosen by them, and training does not depend on them.
        threads: CPU threads; by default as many as other programs leave cores free, reconsidered
            during the training.
        progress: where to show it; nothing is shown without.

    Returns:
        The content of evaluation.json; in processes other than the first, an empty dictionary.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the checkpoint is written.
        TrainingError: the loss is not finite.
        RunError: `out` cannot be used or written.
        UsageError: the device is not available, or the held-out part is too large.
    """
    display = display or TrainingDisplay(quiet=True)
    resolved = resolve_device(device)
    run = RunDirectory(out)
    with process_group(resolved) as dist, stop_requests() as stop, contextlib.ExitStack() as held:
        fingerprint = dataset.fingerprint()
        if resume and dist.is_first:
            held.enter_context(run.locked())
        saved = _load_resumed(run, recipe, dataset.source, fingerprint) if resume else None
        adaptive = resolved.type == "cpu" and dist.world_size == 1
        control = held.enter_context(ThreadControl(threads, adaptive=adaptive))
        loop = TrainingLoop(
            recipe, dataset, run, fingerprint, saved, resolved, dist, stop, control, display
        )
        try:
            with _tensorboard(tensorboard and dist.is_first, run, loop.progress.step) as scalars:
                if dist.is_first:  # not before everything that can be refused has been
                    if saved is None:
                        run.create()
                        held.enter_context(run.locked())
                    _prepare(run, recipe, loop.facts(dataset), saved)
                loop.run(dataset.test if test_every_epoch else None, scalars)
        finally:
            del loop  # DDP is released before its process group
    if stop.signum is not None:  # requested at the last moment
        raise Interrupted(stop.signum)
    if not dist.is_first:
        return {}  # type: ignore[typeddict-item]
    with control:
        return evaluate_run(
            run,
            dataset,
            device=resolved,
            val_size=recipe.val_size,
            augmentation=augmentation_of(recipe, mirror=dataset.mirror),
            show=display.measuring,
        )


def augmentation_of(recipe: Recipe, *, mirror: bool) -> Augmentation:
    """The augmentation of a recipe, on images that may be mirrored or not (digits)."""
    return Augmentation(
        padding=recipe.padding,
        flip=recipe.flip and mirror,
        alternate_flip=recipe.alternate_flip,
        cutout=recipe.cutout,
        trivial_augment=recipe.trivial_augment,
        sizes=recipe.sizes,
        mix=recipe.mix,
        mix_alpha=recipe.mix_alpha,
        mix_probability=recipe.mix_probability,
        plain_from=recipe.epochs - recipe.plain_tail if recipe.plain_tail else None,
    )


class TrainingLoop:
    """The epochs of one training, and where it stands in them.

    Args:
        recipe: how to train.
        dataset: what to train on.
        run: where to write.
        fingerprint: of the data set.
        saved: the checkpoint to continue from, where there is one.
        device: of the training.
        dist: which process this is, of how many.
        stop: of this process.
        threads: of this process.
        progress: where to show it.
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
        self.say(threads.begin(saved.progress.step if saved is not None else 0, recorded))
        training, self.validation = training_split(dataset, recipe.val_size)
        mean, std = channel_statistics(training.images)
        self.config = ModelConfig(recipe.arch, dataset.classes, mean, std)
        teachers = {name: open_network(name).checkpoint for name in recipe.teacher}
        self.teachers = [
            {"teacher": name, "arch": one.config.arch, "sha256": weights_fingerprint(one)}
            for name, one in teachers.items()
        ]
        ensemble = Teachers(teachers, self.config, device, self.precision) if teachers else None
        self.trainer, self.forward = _trainer(
            recipe, len(dataset.classes), device, self.precision, dist, ensemble
        )
        self.batches = Batches(
            Split(training.images.to(device), training.labels.to(device)),
            torch.tensor(mean, device=device),
            torch.tensor(std, device=device),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            augmentation=augmentation_of(recipe, mirror=dataset.mirror),
            classes=len(dataset.classes),
            rank=dist.rank,
            world_size=dist.world_size,
        )
        self.cadence = Cadence(self.batches.steps, stop, threads, dist, device)
        self.throughput = ThroughputMonitor(threads, device.type)
        self.costs = _costs(recipe)
        self.progress = Progress()
        if self.forward.remedy:
            self.say(
                f"training is slower than it could be: {self.forward.reason}; {self.forward.remedy}"
            )
        self.chosen: Mapping[str, Tensor] | None = None  # of several EMAs, after the last epoch
        self.ema_notes: dict[str, Any] = {}
        if saved is not None:
            self._restore(saved)

    def run(self, test: Split | None = None, scalars: Scalars | None = None) -> None:
        """Train from the present position to the last epoch.

        Args:
            test: images to measure after each epoch too, for curves.
            scalars: a TensorBoard writer.
        """
        measured = {"val": self.validation, "test": test}
        self.display.begin(self.costs, self.batches.steps, self.progress.step)
        if self.progress.step == 0:
            self.save()  # from here on there is something to resume
        while self.progress.epoch < self.recipe.epochs:
            lr = self.train_epoch()
            row = self.summary(lr)
            if self.dist.is_first:
                if self.progress.epoch + 1 == self.recipe.epochs:
                    self.choose_ema()
                for name, split in measured.items():
                    row |= self.measure(name, split, self.weights()) if split is not None else {}
                self.run_directory.append_metrics(row)  # before the checkpoint: resuming removes it
                _log_scalars(scalars, row)
            self.progress = Progress(epoch=self.progress.epoch + 1, step=self.progress.step)
            message = self.cadence.threads.after_step(self.progress.step)
            self.save()
            self.say(message)
            self.display.epoch(row)
            if self.progress.epoch < self.recipe.epochs and self.cadence.stop_requested():
                raise Interrupted(self.cadence.stop.signum or signal.SIGTERM)

    def train_epoch(self) -> float:
        """Finish the present epoch; return its last learning rate."""
        start, started, lr = self.progress, time.perf_counter(), 0.0
        # The saved sums are over all processes, and the first process continues them.
        self.trainer.begin_sums(*((start.loss_sum, start.correct) if self.dist.is_first else ()))
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
            self.say(due.message)
            if due.stop:
                raise Interrupted(self.cadence.stop.signum or signal.SIGTERM)
        seconds = start.seconds + time.perf_counter() - started
        self.progress = replace(self.progress, seconds=seconds)
        return lr

    def read_loss(self) -> None:
        """Read the epoch's sums off the device, show them, and stop if the loss is not finite."""
        # All processes learn of a bad step of any, so that they stop together.
        diverged = int(highest(self.trainer.bad_step.clone(), self.dist))
        if diverged >= 0:
            epoch = diverged // self.batches.steps + 1
            lr = learning_rate(self.recipe, diverged, self.batches.steps)
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {diverged + 1}, at learning rate "
                f"{lr:g}; the last good checkpoint stays in {self.run_directory.path}; try a "
                "lower --lr or a longer --warmup-epochs"
            )
        loss_sum, correct = total(self.trainer.sums.clone(), self.dist).tolist()
        self.progress = replace(self.progress, loss_sum=loss_sum, correct=correct)
        at = self.progress
        if self.dist.is_first:
            throughput = at.images / at.seconds
            self.display.step(at.step, loss_sum / at.images, correct / at.images, throughput)
            self.say(self.throughput.update(at.images, at.seconds, self.costs[at.epoch]))

    def say(self, line: str) -> None:
        """Show a line, unless it is empty."""
        if line and self.dist.is_first:
            self.display.say(line)

    def summary(self, lr: float) -> dict[str, Any]:
        """The finished epoch's line of metrics.jsonl."""
        at = self.progress
        return {
            "epoch": at.epoch + 1,
            "step": at.step,
            "lr": lr,
            "train_loss": at.loss_sum / at.images,
            "train_accuracy": at.correct / at.images,
            "images_per_second": at.images / at.seconds,
            "seconds": at.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
            "threads": self.cadence.threads.threads,
        }

    def weights(self) -> Mapping[str, Tensor]:
        """The weights to use."""
        return self.trainer.weights() if self.chosen is None else self.chosen

    def measure(self, name: str, split: Split, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss and accuracy of the network with `weights` on `split`."""
        net = self.config
        model = build(net.arch, classes=len(net.classes)).to(self.device)
        model.load_state_dict(weights)
        try:
            metrics = evaluate(model, split, net.classes, net.mean, net.std, self.precision)
        except NotFiniteError as error:
            raise self._diverged(error) from error
        return {f"{name}_loss": metrics["loss"], f"{name}_accuracy": metrics["accuracy"]}

    def choose_ema(self) -> None:
        """After the last epoch, take the EMA with the highest validation accuracy, if any."""
        candidates: list[tuple[dict[str, Any], Mapping[str, Tensor]]] = []
        for ema in self.trainer.emas:
            reestimated = ema.decay > LONG_DECAY
            weights = self._reestimated(ema.tensors) if reestimated else ema.tensors
            metrics: dict[str, Any] = {"decay": ema.decay, "reestimated": reestimated}
            if self.validation is not None:
                metrics |= self.measure("val", self.validation, weights)
            candidates.append((metrics, weights))
        if candidates:
            # Of equal accuracies the lower loss counts; a single EMA need not be measured.
            best, self.chosen = max(
                candidates,
                key=lambda one: (one[0].get("val_accuracy", 0), -one[0].get("val_loss", 0)),
            )
            tried = [metrics for metrics, _ in candidates]
            self.ema_notes = {"ema_decay": best["decay"], "ema_candidates": tried}
            if len(candidates) > 1:
                self.say(f"of the EMAs, decay {best['decay']:g} is best on the validation images")

    def _reestimated(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`weights` with batch norm's statistics as the last epoch's images give them."""
        model = build(self.config.arch, classes=len(self.config.classes))
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(weights)
        # By one process, whole batches.
        batches = replace(self.batches, rank=0, world_size=1)
        enough = math.ceil(REESTIMATED_ON / batches.global_batch)
        images = (images for images, _ in batches.epoch(self.recipe.epochs - 1))
        reestimate_batch_norm(model, itertools.islice(images, enough), self.precision)
        return model.state_dict()

    def save(self) -> None:
        """Write the checkpoint; TrainingError if a value in it is not finite."""
        self.cadence.saved()
        if not self.dist.is_first:
            return
        metadata = {
            "resnet56": importlib.metadata.version("resnet56"),
            "data": self.fingerprint,
            "weights": "ema" if self.trainer.emas else "final",
            "precision": self.precision,
            "execution": self.forward.execution,
            "loss_scale": self.trainer.scaler.state_dict() or None,
            "threads": self.cadence.threads.state(),
            **self.ema_notes,
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
            remedy = "continue with --resume" if begun else "then start the training again"
            raise RunError(f"{error}; {remedy}") from error

    def _diverged(self, error: NotFiniteError) -> TrainingError:
        return TrainingError(
            f"the training has diverged at step {self.progress.step:,}: {error}; the last good "
            f"checkpoint stays in {self.run_directory.path}; try a lower --lr or a longer "
            "--warmup-epochs"
        )

    def facts(self, dataset: Dataset) -> Environment:
        """What environment.json holds."""
        facts: dict[str, Any] = environment(self.device, self.precision) | {
            "threads": self.cadence.threads.threads,
            "processes": self.dist.world_size,
            "data": {
                "origin": dataset.origin,
                "source": dataset.source,
                "mirrored": self.batches.augmentation.flip,
            },
            "execution": self.forward.execution,
        }
        if self.teachers:
            facts["teachers"] = self.teachers
        if self.forward.reason:
            facts["execution_reason"] = self.forward.reason
        return cast(Environment, facts)

    def _restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint."""
        before = [one["sha256"] for one in saved.metadata.get("teachers", [])]
        if before != [one["sha256"] for one in self.teachers]:
            raise RunError(
                f"{self.run_directory.path} was distilled from other weights than "
                f"{', '.join(self.recipe.teacher)} has now; choose another --out"
            )
        self.progress = saved.progress
        what = f"{self.run_directory.checkpoint_file} does not fit the recipe"
        require_fit(saved.model, self.trainer.weights(), what)
        require_fit(saved.training, self.trainer.state(), what)
        self.trainer.restore(saved.model, saved.training)
        if self.trainer.scaler.is_enabled() and saved.metadata.get("loss_scale"):
            self.trainer.scaler.load_state_dict(dict(saved.metadata["loss_scale"]))
        before = [saved.metadata.get("precision"), saved.metadata.get("execution")]
        now = [self.precision, self.forward.execution]
        if None not in before and before != now:
            self.say(
                f"so far it ran {' '.join(map(str, before))}, it continues {' '.join(now)}: equal "
                "within rounding, not to the bit"
            )


def _trainer(
    recipe: Recipe,
    classes: int,
    device: torch.device,
    precision: Precision,
    dist: Distributed,
    teachers: Teachers | None,
) -> tuple[Trainer, PreparedModel]:
    """The network on its device with its optimizer, and how its steps run."""
    model = build(recipe.arch, classes=classes, seed=recipe.seed)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dist.world_size == 1:
        forward = prepare_model(model, recipe.execution, precision)
        return Trainer(model, forward.module, recipe, precision, teachers), forward
    if recipe.execution not in ("auto", "eager"):
        raise UsageError(f"several processes run eager, not {recipe.execution}")
    model = synchronize_batch_norm(model)  # type: ignore[assignment]
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids)
    # Batch norm's statistics are equal already. (The argument goes by another name in each
    # release of PyTorch.)
    wrapped.broadcast_buffers = False
    forward = PreparedModel(wrapped, "eager", "several processes share their batch norm")
    return Trainer(model, wrapped, recipe, precision, teachers), forward


def _costs(recipe: Recipe) -> list[float]:
    """How long a step takes in each epoch, as a share of one on 32x32 images."""
    rest = [32] * (recipe.epochs - len(recipe.sizes))
    # A fifth does not depend on the size: 16x16 took 0.39 and 24x24 0.64 of the time of 32x32
    # (resnet56, batch 64, two CPU cores: results/fast-seed0).
    return [0.2 + 0.8 * (side / 32) ** 2 for side in (*recipe.sizes, *rest)][: recipe.epochs]


def _load_resumed(run: RunDirectory, recipe: Recipe, source: str, fingerprint: str) -> Checkpoint:
    """The checkpoint to continue from; RunError if it has another recipe or other data."""
    checkpoint = run.load(training=True)
    theirs = from_fields(read_json(run.recipe_file), str(run.recipe_file)).to_json()
    mine = recipe.to_json()
    differing = [
        f"{name} {theirs[name]} -> {mine[name]}" for name in mine if mine[name] != theirs[name]
    ]
    if differing:
        raise RunError(
            f"{run.path} is a run of another recipe ({', '.join(differing)}); resume it with "
            "its own, or choose another --out"
        )
    if checkpoint.metadata.get("data") != fingerprint:
        raise RunError(f"{run.path} was trained on other images than {source}; choose --data")
    return checkpoint


def _prepare(
    run: RunDirectory, recipe: Recipe, facts: Environment, saved: Checkpoint | None
) -> None:
    """Write what is known before the first step."""
    if saved is not None:
        run.rewind_metrics(saved.progress.epoch)
        before = run.read_environment() or facts
        facts = {
            **before,
            "data": facts["data"],  # the same images, perhaps from another folder
            "resumed": [*before.get("resumed", []), facts],
        }
    else:
        run.metrics_file.unlink(missing_ok=True)
        write_json(run.recipe_file, recipe.to_json())
    run.write_environment(facts)


def _log_scalars(scalars: Scalars | None, row: dict[str, Any]) -> None:
    if scalars is not None:
        for name in row.keys() - {"epoch", "step"}:
            scalars.add_scalar(name, row[name], row["step"])


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
