"""Ours against the loop people write: whole training steps on real images, in turns."""

import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet56.benchmark.baseline import Pictures, StockLoop
from resnet56.benchmark.baseline import norm_relu as stock_norm_relu
from resnet56.benchmark.interleave import Contestant, compared, take_turns
from resnet56.benchmark.roofline import floor, machine_limits
from resnet56.cadence import READ_LOSS_EVERY
from resnet56.data.batches import Batches
from resnet56.data.dataset import Dataset, Split, Triple, channel_statistics
from resnet56.errors import MissingExtraError, UsageError
from resnet56.evaluation import predict_logits
from resnet56.export import to_onnx
from resnet56.inference import InferenceForm
from resnet56.model import build
from resnet56.predict import OnnxBackend
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import Checkpoint, Network, Position
from resnet56.runs.directory import RunDirectory
from resnet56.runtime import (
    Resolved,
    environment,
    peak_memory_mb,
    resolve_device,
    resolve_precision,
)
from resnet56.step import Trainer, learning_rate, make_forward

STARTS = 3  # of each command whose start-up is timed
Say = Callable[[str], None]


@dataclass(frozen=True)
class Course:
    """Where the contest runs, and on what."""

    split: Split  # training images
    mean: Triple
    std: Triple
    device: torch.device
    precision: Resolved
    classes: int = 10  # of the images: the outputs of all contestants

    def pictures(self) -> Pictures:
        """The same images, as the stock loop has them."""
        return Pictures(self.split, self.mean, self.std)

    def our_step(self, arch: str, batch: int, execution: str) -> Callable[[], None]:
        """One step as `resnet56 train` makes it, with its data and its readings of the loss."""
        recipe = Recipe(arch=arch, batch_size=batch, execution=execution)  # type: ignore[arg-type]
        model = build(arch, classes=self.classes)
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward = make_forward(model.train(), execution, self.precision)
        trainer = Trainer(model, forward.module, recipe, self.precision)
        batches = Batches(
            Split(self.split.images.to(self.device), self.split.labels.to(self.device)),
            torch.tensor(self.mean, device=self.device),
            torch.tensor(self.std, device=self.device),
            batch_size=batch,
            seed=0,
        )
        steps: Iterator[tuple[int, tuple[Tensor, Tensor]]] = enumerate(
            itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
        )

        def once() -> None:
            step, (images, labels) = next(steps)
            trainer.step(images, labels, learning_rate(recipe, step, batches.steps), step)
            if step % READ_LOSS_EVERY == 0:
                trainer.sums.tolist()

        return once


def executions(device: torch.device, precision: Resolved, compiled: bool) -> list[str]:
    """The ways to run a step that this machine has, in the order of their daring."""
    ways = ["compiled", "eager"] if compiled else ["eager"]
    for way in ("fused", "native"):
        with contextlib.suppress(UsageError):
            make_forward(build("resnet8").to(device), way, precision)
            ways.append(way)
    return ways


def bench_training(
    course: Course, arch: str, batch: int, ways: Sequence[str], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Stock loops with 0 and 2 workers against every way in `ways` to run our step."""
    stocks = {
        f"stock, {workers} workers": StockLoop(
            arch, course.pictures(), batch, course.device, workers, course.classes
        )
        for workers in (0, 2)
    }
    contestants = [Contestant(n, loop.step, course.device) for n, loop in stocks.items()]
    for way in ways:
        once = course.our_step(arch, batch, way)
        contestants.append(Contestant(f"ours, {way}", once, course.device))
    try:
        take_turns(contestants, rounds, seconds)
    finally:
        for loop in stocks.values():
            loop.close()
    return compared(contestants, batch, stock="stock")


def bench_inference(
    course: Course, arch: str, batch: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """The plain network in evaluation mode against the inference form, and ONNX Runtime."""
    pixels = course.split.images[torch.arange(batch) % len(course.split)]
    images = pixels.float().to(course.device) / 255
    stock = build(arch).to(course.device).eval()
    stock.use(stock_norm_relu)
    runners: dict[str, nn.Module] = {"stock": stock, "ours, fp32": InferenceForm(stock)}
    if course.precision != "fp32":
        runners[f"ours, {course.precision}"] = InferenceForm(stock, course.precision)

    def once(runner: nn.Module) -> None:
        with torch.inference_mode():
            runner(images).argmax(dim=1).tolist()

    contestants = [
        Contestant(name, lambda runner=runner: once(runner), course.device)  # type: ignore[misc]
        for name, runner in runners.items()
    ]
    if course.device.type == "cpu":
        with contextlib.suppress(MissingExtraError):  # optional: one row less without it
            network = Network(arch, tuple("0123456789"), course.mean, course.std)
            checkpoint = Checkpoint(network, stock.state_dict())
            content = to_onnx(checkpoint, checked=False)
            exported = OnnxBackend(content, arch, torch.get_num_threads())
            array = pixels.numpy()
            contestants.append(
                Contestant(
                    "ours, ONNX", lambda: exported.run(array)[0].argmax(axis=1), course.device
                )
            )
    take_turns(contestants, rounds, seconds)
    return compared(contestants, batch, stock="stock")


def peak_of(course: Course, arch: str, batch: int, way: str) -> float:
    """Peak memory in MB of a few steps in a process of their own, without the data set."""
    if way.startswith("stock"):
        pictures = course.pictures()
        once = StockLoop(arch, pictures, batch, course.device, 0, course.classes).step
    else:
        once = course.our_step(arch, batch, way)
    for _ in range(3):
        once()
    return peak_memory_mb(course.device)


def peaks(course: Course, arch: str, batch: int, ways: Sequence[str]) -> dict[str, float]:
    """Peak memory of each of `ways`, and of the stock loop without workers."""
    few = slice(0, 4 * batch)  # cloned: a slice would take the whole storage along
    split = Split(course.split.images[few].clone(), course.split.labels[few].clone())
    course = replace(course, split=split)
    found = {}
    for way in ("stock", *ways):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[way] = pool.submit(peak_of, course, arch, batch, way).result()
    return found


def bench_rest(course: Course, dataset: Dataset, load_seconds: float) -> dict[str, float]:
    """What is not training, in seconds: start-up, data, a checkpoint, an evaluation."""

    def started(*arguments: str) -> float:
        times = []
        for _ in range(STARTS):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    model = build("resnet56").to(course.device)
    trainer = Trainer(model, model, Recipe(), "fp32")
    network = Network("resnet56", dataset.classes, course.mean, course.std)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        begun = time.perf_counter()
        run.save(Checkpoint(network, trainer.weights(), trainer.state(), Position(), {}))
        saved = time.perf_counter() - begun
    begun = time.perf_counter()
    predict_logits(model.eval(), dataset.test.images, course.mean, course.std, course.precision)
    evaluated = time.perf_counter() - begun
    return {
        "resnet56 --help": started("-m", "resnet56", "--help"),
        "import resnet56": started("-c", "import resnet56"),
        "import torch": started("-c", "import torch"),
        f"load {len(dataset.train) + len(dataset.test):,} images": load_seconds,
        "write a checkpoint": saved,
        f"evaluate {len(dataset.test):,} images in {course.precision}": evaluated,
    }


def bench(
    load: Callable[[], Dataset],
    *,
    archs: Sequence[str],
    batches: Sequence[int],
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    rounds: int = 7,
    seconds: float = 1.5,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        load: reads the data set; it is timed too.
        archs: architectures.
        batches: batch sizes in training.
        device: "auto", "cpu", "cuda", ...
        precision: of our side: "auto", "fp32", "bf16" or "fp16".
        compiled: also measure torch.compile, which needs a minute for each comparison.
        rounds: turns that each contestant takes.
        seconds: how long a turn is.
        say: is told what is being measured.

    Returns:
        machine, limits, training, inference and rest, ready for JSON.
    """
    where = resolve_device(device)
    resolved = resolve_precision(precision, where)
    begun = time.perf_counter()
    dataset = load()
    load_seconds = time.perf_counter() - begun
    if max(batches) > len(dataset.train):
        raise UsageError(
            f"a batch of {max(batches)} is more than the {len(dataset.train)} training images; "
            "choose a smaller --batch or other --data"
        )
    mean, std = channel_statistics(dataset.train.images)
    course = Course(dataset.train, mean, std, where, resolved, len(dataset.classes))
    say("the machine's limits")
    limits = machine_limits(where, resolved)
    ways = executions(where, resolved, compiled)
    training, inference = [], []
    for arch, batch in itertools.product(archs, batches):
        say(f"training {arch}, batch {batch}")
        rows = bench_training(course, arch, batch, ways, rounds, seconds)
        memory = peaks(course, arch, batch, ways)
        least = floor(arch, batch, resolved, limits)
        for row in rows:
            way = row["name"].removeprefix("ours, ").replace("stock, 0 workers", "stock")
            row["peak_memory_mb"] = memory.get(way)
        training.append({"arch": arch, "batch": batch, "floor": least, "rows": rows})
    for arch, batch in itertools.product(archs, (1, 256)):
        say(f"inference {arch}, batch {batch}")
        rows = bench_inference(course, arch, batch, rounds, seconds / 3)
        inference.append({"arch": arch, "batch": batch, "rows": rows})
    say("the rest of the time")
    return {
        "machine": environment(where, resolved),
        "data": dataset.source,
        "rounds": rounds,
        "limits": limits,
        "training": training,
        "inference": inference,
        "rest": bench_rest(course, dataset, load_seconds),
    }
