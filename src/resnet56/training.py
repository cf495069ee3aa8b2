"""The story of a training: data -> model -> epochs -> checkpoint -> evaluation."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from resnet56.data.batches import Batches
from resnet56.data.dataset import Dataset, Split, channel_statistics, training_split
from resnet56.distributed import Place, highest, process_group, synchronize_batch_norm, total
from resnet56.errors import RunError, TrainingError, UsageError
from resnet56.evaluation import evaluate, evaluate_run
from resnet56.files import read_json, write_json
from resnet56.model import build
from resnet56.progress import TrainingProgress
from resnet56.recipe import Recipe, from_fields
from resnet56.runs.checkpoint import Checkpoint, Network, Position
from resnet56.runs.directory import RunDirectory
from resnet56.runtime import (
    Resolved,
    environment,
    peak_memory_mb,
    resolve_device,
    resolve_precision,
)
from resnet56.step import Forward, Trainer, learning_rate, make_forward
from resnet56.threads import ThreadControl, ThroughputMonitor

SAVE_EVERY = 300.0  # seconds between checkpoints within an epoch
LOOK_EVERY = 10  # steps between looks at the loss, each of which waits for the device


class Interrupted(Exception):  # noqa: N818 - a wish, not an error
    """Ctrl-C or SIGTERM came; the checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


class Scalars(Protocol):
    """What is wanted of a TensorBoard writer."""

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
    progress: TrainingProgress | None = None,
) -> dict[str, Any]:
    """Train by `recipe` on `dataset`, leave the run in `out`, and test it.

    Args:
        recipe: how to train; its batch is the global one when torchrun starts several processes.
        dataset: what to train and test on.
        out: the run directory; must be new, or with `resume` hold a run of the same recipe.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        resume: go on from the checkpoint in `out`.
        tensorboard: also write scalars for TensorBoard, in `out/tensorboard`.
        test_every_epoch: also record the test loss and accuracy after each epoch, for curves;
            nothing is chosen by them, and training does not depend on them.
        threads: CPU threads; by default as many as other programs leave cores free, reconsidered
            during the training.
        progress: where to show it; nothing is shown without.

    Returns:
        The content of evaluation.json.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the checkpoint is written.
        TrainingError: the loss is not finite.
        RunError: `out` cannot be used or written.
        UsageError: the device is not there, or the held-out part is too large.
    """
    where = resolve_device(device)
    precision = resolve_precision(recipe.precision, where)
    progress = progress or TrainingProgress(quiet=True)
    run = RunDirectory(out)
    with process_group(where) as here, _stop_signals() as stop, contextlib.ExitStack() as held:
        alone_on_cpu = where.type == "cpu" and here.world_size == 1
        control = held.enter_context(ThreadControl(threads, adaptive=alone_on_cpu))
        data = {"origin": dataset.origin, "source": dataset.source}
        facts = environment(where, precision) | {"processes": here.world_size, "data": data}
        fingerprint = dataset.fingerprint()
        if resume and here.is_first:
            held.enter_context(run.alone())
        saved = _take_up(run, recipe, dataset.source, fingerprint) if resume else None
        training, held_out = training_split(dataset, recipe.holdout)
        mean, std = channel_statistics(training.images)
        network = Network(recipe.arch, dataset.classes, mean, std)
        recorded = saved.notes.get("threads") if saved is not None else None
        line = control.begin(saved.position.step if saved is not None else 0, recorded)
        if line and here.is_first:
            progress.say(line)
        facts |= {"threads": control.threads}
        loop = _Loop(run, recipe, network, where, precision, here, fingerprint, progress, control)
        loop.set_up(training, flip=recipe.flip and dataset.mirror, saved=saved)
        facts |= {"execution": loop.forward.execution}
        if loop.forward.reason:
            facts |= {"execution_reason": loop.forward.reason}
        if loop.forward.remedy and here.is_first:
            progress.say(
                f"training is slower than it could be: {loop.forward.reason}; {loop.forward.remedy}"
            )
        try:
            with _tensorboard(tensorboard and here.is_first, run, loop.position.step) as scalars:
                if here.is_first:  # not before all that can be refused has been
                    if saved is None:
                        run.create()
                        held.enter_context(run.alone())
                    _prepare(run, recipe, facts, resumed=saved is not None)
                test = dataset.test if test_every_epoch else None
                loop.epochs({"holdout": held_out, "test": test}, stop, scalars)
        finally:
            del loop  # DistributedDataParallel goes before the group that it talks through
    if stop.signum is not None:  # asked for in the last moment
        raise Interrupted(stop.signum)
    if not here.is_first:
        return {}
    with control:
        return evaluate_run(
            run,
            dataset,
            holdout=recipe.holdout,
            flip=recipe.flip and dataset.mirror,
            padding=recipe.padding,
            cutout=recipe.cutout,
            trivial_augment=recipe.trivial_augment,
            device=where,
            show=progress.measuring,
        )


def _take_up(run: RunDirectory, recipe: Recipe, source: str, fingerprint: str) -> Checkpoint:
    """The checkpoint to go on from; RunError if the run is of another recipe or other data."""
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
    if checkpoint.notes.get("data") != fingerprint:
        raise RunError(f"{run.path} was trained on other images than {source}; choose --data")
    return checkpoint


def _prepare(run: RunDirectory, recipe: Recipe, facts: dict[str, Any], *, resumed: bool) -> None:
    """Write what is known before the first step."""
    if resumed:
        before = read_json(run.environment_file) if run.environment_file.exists() else facts
        earlier = before.get("resumed", [])
        facts = before | {
            "data": facts["data"],  # the same images, perhaps from another folder
            "resumed": [*(earlier if isinstance(earlier, list) else []), facts],
        }
    else:
        run.rewind_metrics(0)
        write_json(run.recipe_file, recipe.to_json())
    write_json(run.environment_file, facts)


def _costs(recipe: Recipe) -> list[float]:
    """How long a step takes in each epoch, as a share of one on 32x32 images."""
    rest = [32] * (recipe.epochs - len(recipe.sizes))
    # A fifth does not depend on the size: 16x16 took 0.39 and 24x24 0.64 of the time of 32x32
    # (resnet56, batch 64, two CPU cores: results/fast-seed0).
    return [0.2 + 0.8 * (side / 32) ** 2 for side in (*recipe.sizes, *rest)][: recipe.epochs]


@dataclass
class _Loop:
    """The epochs of one training, and where it stands in them."""

    run: RunDirectory
    recipe: Recipe
    network: Network
    device: torch.device
    precision: Resolved
    here: Place
    fingerprint: str
    progress: TrainingProgress
    control: ThreadControl
    position: Position = field(default_factory=Position)

    def set_up(self, training: Split, *, flip: bool, saved: Checkpoint | None) -> None:
        """Put model and data on the device, as they were when `saved` was."""
        recipe, device = self.recipe, self.device
        model = build(recipe.arch, classes=len(self.network.classes), seed=recipe.seed)
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.here.world_size > 1:
            if recipe.execution not in ("auto", "eager"):
                raise UsageError(f"several processes run eager, not {recipe.execution}")
            model = synchronize_batch_norm(model)  # type: ignore[assignment]
            ids = [device] if device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=ids)
            # Batch norm's statistics are equal already. (The argument goes by another name in each
            # release of PyTorch.)
            wrapped.broadcast_buffers = False
            self.forward = Forward(wrapped, "eager", "several processes share their batch norm")
        else:
            self.forward = make_forward(model, recipe.execution, self.precision)
        self.trainer = Trainer(model, self.forward.module, recipe, self.precision)
        if saved is not None:
            self.position = saved.position
            self.trainer.restore(saved.model, saved.training)
            if self.trainer.scaler.is_enabled() and saved.notes.get("loss_scale"):
                self.trainer.scaler.load_state_dict(dict(saved.notes["loss_scale"]))
            if self.here.is_first:
                self._say_what_changed(saved)
                self.run.rewind_metrics(self.position.epoch)
        self.batches = Batches(
            Split(training.images.to(device), training.labels.to(device)),
            torch.tensor(self.network.mean, device=device),
            torch.tensor(self.network.std, device=device),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            padding=recipe.padding,
            flip=flip,
            alternate_flip=recipe.alternate_flip,
            cutout=recipe.cutout,
            trivial_augment=recipe.trivial_augment,
            sizes=recipe.sizes,
            rank=self.here.rank,
            world_size=self.here.world_size,
        )

    def _say_what_changed(self, saved: Checkpoint) -> None:
        """Another machine may compute in another way: the run goes on, not to the same bits."""
        was = [saved.notes.get("precision"), saved.notes.get("execution")]
        now = [self.precision, self.forward.execution]
        if None not in was and was != now:
            self.progress.say(
                f"so far it ran {' '.join(map(str, was))}, it goes on {' '.join(now)}: the same "
                "within rounding, not to the bit"
            )

    def epochs(
        self, measured: dict[str, Split | None], stop: "_Stop", scalars: Scalars | None
    ) -> None:
        """Train from the present position to the last epoch.

        Args:
            measured: splits to evaluate after each epoch, by their name in metrics.jsonl.
            stop: the stop request.
            scalars: a TensorBoard writer.
        """
        self.costs = _costs(self.recipe)
        self.progress.begin(self.costs, self.batches.steps, self.position.step)
        self.throughput = ThroughputMonitor(self.control, self.device.type)
        if self.position.step == 0:
            self._save()  # from here on there is something to resume
        while self.position.epoch < self.recipe.epochs:
            lr = self._epoch(stop)
            row = self._row(lr)
            for name, split in measured.items():
                if split is not None:
                    row |= self._evaluated(name, split)
            if self.here.is_first:
                # The line first: should the power go now, resuming takes it back.
                self.run.append_metrics(row)
                if scalars is not None:
                    for name in row.keys() - {"epoch", "step"}:
                        scalars.add_scalar(name, row[name], row["step"])
            self.position = Position(epoch=self.position.epoch + 1, step=self.position.step)
            line = self.control.after_step(self.position.step)
            self._save()
            self._say(line)
            self.progress.epoch(row)
            if self.position.epoch < self.recipe.epochs and self._any(stop.signum is not None):
                raise Interrupted(stop.signum or signal.SIGTERM)

    def _epoch(self, stop: "_Stop") -> float:
        """Finish the present epoch; return its last learning rate."""
        trainer, batches, at = self.trainer, self.batches, self.position
        # The saved sums are over all processes; the first one goes on with them.
        trainer.begin_sums(*((at.loss_sum, at.correct) if self.here.is_first else ()))
        trainer.model.train()
        begun = saved = time.perf_counter()
        lr = 0.0
        for images, labels in batches.epoch(at.epoch, at.epoch_step):
            step = self.position.step
            lr = learning_rate(self.recipe, step, batches.steps)
            trainer.step(images, labels, lr, step)
            epoch_step = self.position.epoch_step + 1
            now = time.perf_counter()
            self.position = replace(
                self.position,
                step=step + 1,
                epoch_step=epoch_step,
                images=epoch_step * batches.global_batch,
                seconds=at.seconds + now - begun,
            )
            last = epoch_step == batches.steps
            if last or epoch_step % LOOK_EVERY == 0:
                self._look()
            # Several processes must stop or save at the same step, and have a clock each: they
            # ask each other as they look.
            if last or (self.here.world_size > 1 and epoch_step % LOOK_EVERY != 0):
                continue
            # A change of threads is saved: resumed from there, a run computes the same bits.
            line = self.control.after_step(step + 1)
            stopping = self._any(stop.signum is not None)
            if stopping or line or self._any(now - saved > SAVE_EVERY):
                self._look()
                self._save()
                saved = time.perf_counter()
            self._say(line)
            if stopping:
                raise Interrupted(stop.signum or signal.SIGTERM)
        self.position = replace(self.position, seconds=at.seconds + time.perf_counter() - begun)
        return lr

    def _look(self) -> None:
        """Read the epoch's sums off the device, show them, and stop if the loss is not finite."""
        # Where one process sees it all do, so that they stop together.
        diverged = int(highest(self.trainer.bad_step.clone(), self.here))
        if diverged >= 0:
            epoch = diverged // self.batches.steps + 1
            lr = learning_rate(self.recipe, diverged, self.batches.steps)
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {diverged + 1}, at learning rate "
                f"{lr:g}; the last good checkpoint stays in {self.run.path}; try a lower --lr "
                "or a longer --warmup-epochs"
            )
        loss_sum, correct = total(self.trainer.sums.clone(), self.here).tolist()
        self.position = replace(self.position, loss_sum=loss_sum, correct=int(correct))
        at = self.position
        if self.here.is_first:
            speed = at.images / at.seconds
            self.progress.step(at.step, loss_sum / at.images, correct / at.images, speed)
            cost = self.costs[at.epoch]
            self._say(self.throughput.update(at.images, at.seconds, cost))

    def _say(self, line: str) -> None:
        if line:
            self.progress.say(line)

    def _any(self, mine: bool) -> bool:
        """Whether it is so in any of the processes."""
        if self.here.world_size == 1:
            return mine
        return bool(highest(torch.tensor(float(mine), device=self.device), self.here) > 0)

    def _row(self, lr: float) -> dict[str, Any]:
        at = self.position
        return {
            "epoch": at.epoch + 1,
            "step": at.step,
            "lr": lr,
            "train_loss": at.loss_sum / at.images,
            "train_accuracy": at.correct / at.images,
            "images_per_second": at.images / at.seconds,
            "seconds": at.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
            "threads": self.control.threads,
        }

    def _evaluated(self, name: str, split: Split) -> dict[str, float]:
        net = self.network
        model = build(self.recipe.arch, classes=len(net.classes)).to(self.device)
        model.load_state_dict(self.trainer.weights())
        figures = evaluate(model, split, net.classes, net.mean, net.std, self.precision)
        return {f"{name}_loss": figures["loss"], f"{name}_accuracy": figures["accuracy"]}

    def _save(self) -> None:
        """Write the checkpoint, unless the weights are no numbers."""
        if not self.here.is_first:
            return
        if not self.trainer.is_finite():
            raise TrainingError(
                f"the weights are not finite after step {self.position.step}; the last good "
                f"checkpoint stays in {self.run.path}; try a lower --lr"
            )
        notes = {
            "resnet56": metadata.version("resnet56"),
            "data": self.fingerprint,
            "weights": "averaged" if self.trainer.average is not None else "last",
            "precision": self.precision,
            "execution": self.forward.execution,
            "loss_scale": self.trainer.scaler.state_dict() or None,
            "threads": self.control.state(),
        }
        weights, state = self.trainer.weights(), self.trainer.state()
        try:
            self.run.save(Checkpoint(self.network, weights, state, self.position, notes))
        except RunError as error:
            raise RunError(f"{error}; go on with --resume") from error


@dataclass
class _Stop:
    """The signal that asked to stop, once one has."""

    signum: int | None = None


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a wish; a second one acts as it always does."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform == "win32":
        signals.append(signal.SIGBREAK)  # Ctrl-Break, the one that reaches a process group
    before = {s: signal.getsignal(s) for s in signals}

    def wish(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, wish)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _tensorboard(wanted: bool, run: RunDirectory, step: int) -> Iterator[Scalars | None]:
    if not wanted:
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
