"""Benchmark training, inference, memory use and start-up against a standard PyTorch loop."""

import contextlib
import functools
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

from resnet56.backends import OnnxBackend
from resnet56.benchmark.baseline import AugmentedImages, BaselineLoop
from resnet56.benchmark.baseline import norm_relu as baseline_norm_relu
from resnet56.benchmark.interleave import Candidate, interleave, summarize
from resnet56.benchmark.roofline import machine_limits, roofline_times
from resnet56.cadence import READ_LOSS_EVERY
from resnet56.data.batches import Batches
from resnet56.data.dataset import Dataset, Split, Triple, channel_statistics
from resnet56.errors import MissingExtraError, UsageError, option
from resnet56.execution import prepare_model
from resnet56.export import to_onnx
from resnet56.inference import InferenceModel, predict_logits
from resnet56.model import build
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, Progress
from resnet56.runs.directory import RunDirectory
from resnet56.runtime import (
    Precision,
    environment,
    peak_memory_mb,
    resolve_device,
    resolve_precision,
)
from resnet56.step import Trainer, learning_rate

START_REPEATS = 3  # number of times to start each program
Log = Callable[[str], None]


@dataclass(frozen=True)
class BenchmarkSetup:
    """Data, device and precision for a benchmark."""

    split: Split  # training images
    mean: Triple
    std: Triple
    device: torch.device
    precision: Precision
    classes: int = 10  # number of classes

    def augmented_images(self) -> AugmentedImages:
        """Return the images for the baseline loop."""
        return AugmentedImages(self.split, self.mean, self.std)

    def package_step(self, arch: str, batch: int, execution: str) -> Callable[[], None]:
        """Return a function that runs one step of `resnet56 train`, including its data loading."""
        recipe = Recipe(arch=arch, batch_size=batch, execution=execution)  # type: ignore[arg-type]
        model = build(arch, classes=self.classes)
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        forward = prepare_model(model.train(), execution, self.precision)
        trainer = Trainer(
            model, forward.module, recipe, self.precision, cuda_graphs=forward.cuda_graphs
        )
        batches = Batches(self.split.to(self.device), self.mean, self.std, batch_size=batch, seed=0)
        return next_step(recipe, trainer, batches)


def next_step(recipe: Recipe, trainer: Trainer, batches: Batches) -> Callable[[], None]:
    """Return a function that runs the next training step each time it is called."""
    steps: Iterator[tuple[int, tuple[Tensor, Tensor]]] = enumerate(
        itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    )

    def run_once() -> None:
        step, (images, targets) = next(steps)
        trainer.step(images, targets, learning_rate(recipe, step, batches.steps), step)
        if step % READ_LOSS_EVERY == 0:
            trainer.sums.tolist()

    return run_once


def available_modes(device: torch.device, precision: Precision, compiled: bool) -> list[str]:
    """Return the execution modes that are available on this machine."""
    modes = ["compiled", "eager"] if compiled else ["eager"]
    for mode in ("fused", "native", "cuda-graph"):
        with contextlib.suppress(UsageError):
            prepare_model(build("resnet8").to(device), mode, precision)
            modes.append(mode)
    return modes


def bench_training(
    setup: BenchmarkSetup, arch: str, batch: int, modes: Sequence[str], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Time training steps in each execution mode and in the baseline loop (0 and 2 workers).

    Return one row per candidate, as `summarize` does.
    """
    loops = {
        f"baseline, {workers} workers": BaselineLoop(
            arch, setup.augmented_images(), batch, setup.device, workers, setup.classes
        )
        for workers in (0, 2)
    }
    candidates = [Candidate(n, loop.step, setup.device) for n, loop in loops.items()]
    for mode in modes:
        run_once = setup.package_step(arch, batch, mode)
        candidates.append(Candidate(mode, run_once, setup.device))
    try:
        interleave(candidates, rounds, seconds)
    finally:
        for loop in loops.values():
            loop.close()
    return summarize(candidates, batch, baseline="baseline")


def bench_inference(
    setup: BenchmarkSetup, arch: str, batch: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Time the model in evaluation mode, an `InferenceModel`, and ONNX Runtime.

    Return one row per candidate, as `summarize` does.
    """
    pixels = setup.split.images[torch.arange(batch) % len(setup.split)]
    images = pixels.float().to(setup.device) / 255
    model = build(arch).to(setup.device).eval()
    model.set_norm_relu(baseline_norm_relu)
    runners: dict[str, nn.Module] = {"baseline": model, "folded, fp32": InferenceModel(model)}
    if setup.precision != "fp32":
        runners[f"folded, {setup.precision}"] = InferenceModel(model, setup.precision)

    def run_once(runner: nn.Module) -> None:
        # By default, PyTorch uses TF32 for convolutions on CUDA, but this package disables it.
        tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=runner is model)
        with torch.inference_mode(), tf32:
            runner(images).argmax(dim=1).tolist()

    candidates = [
        Candidate(name, lambda runner=runner: run_once(runner), setup.device)  # type: ignore[misc]
        for name, runner in runners.items()
    ]
    if setup.device.type == "cpu":
        with contextlib.suppress(MissingExtraError):  # skip ONNX Runtime if it is missing
            content = _exported(arch, setup.mean, setup.std)
            exported = OnnxBackend(content, arch, torch.get_num_threads())
            array = pixels.numpy()
            candidates.append(
                Candidate(
                    "ONNX Runtime", lambda: exported.run(array)[0].argmax(axis=1), setup.device
                )
            )
    interleave(candidates, rounds, seconds)
    return summarize(candidates, batch, baseline="baseline")


@functools.cache  # export once for all batch sizes
def _exported(arch: str, mean: Triple, std: Triple) -> bytes:
    config = ModelConfig(arch, tuple("0123456789"), mean, std)
    return to_onnx(Checkpoint(config, build(arch).state_dict()), checked=False)


def _peak_memory(setup: BenchmarkSetup, arch: str, batch: int, mode: str) -> float:
    """Run a few steps and return the peak memory of this process in MB."""
    if mode.startswith("baseline"):
        images = setup.augmented_images()
        run_once = BaselineLoop(arch, images, batch, setup.device, 0, setup.classes).step
    else:
        run_once = setup.package_step(arch, batch, mode)
    for _ in range(3):
        run_once()
    return peak_memory_mb(setup.device)


def peak_memory(
    setup: BenchmarkSetup, arch: str, batch: int, modes: Sequence[str]
) -> dict[str, float]:
    """Return the peak memory of the baseline loop and of each execution mode, in MB.

    Every measurement runs in a new process.
    """
    subset = slice(0, 4 * batch)
    # Clone the images, because pickling a view copies its entire storage.
    split = Split(setup.split.images[subset].clone(), setup.split.labels[subset].clone())
    setup = replace(setup, split=split)
    peaks = {}
    for mode in ("baseline", *modes):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[mode] = pool.submit(_peak_memory, setup, arch, batch, mode).result()
    return peaks


def bench_other(setup: BenchmarkSetup, dataset: Dataset, load_seconds: float) -> dict[str, float]:
    """Return how many seconds start-up, data loading, checkpoint writing and evaluation take."""

    def start_time(*arguments: str) -> float:
        times = []
        for _ in range(START_REPEATS):
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    model = build("resnet56").to(setup.device)
    trainer = Trainer(model, model, Recipe(), "fp32")
    config = ModelConfig("resnet56", dataset.classes, setup.mean, setup.std)
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory(Path(directory))
        started = time.perf_counter()
        run.save(Checkpoint(config, trainer.weights(), trainer.state(), Progress(), {}))
        saved = time.perf_counter() - started
    started = time.perf_counter()
    predict_logits(model.eval(), dataset.test.images, setup.mean, setup.std, setup.precision)
    evaluated = time.perf_counter() - started
    return {
        "resnet56 --help": start_time("-m", "resnet56", "--help"),
        "import resnet56": start_time("-c", "import resnet56"),
        "import torch": start_time("-c", "import torch"),
        f"load {len(dataset.train) + len(dataset.test):,} images": load_seconds,
        "write a checkpoint": saved,
        f"evaluate {len(dataset.test):,} images in {setup.precision}": evaluated,
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
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Run all benchmarks.

    Args:
        load: function that loads the data set. The benchmark also times this function.
        archs: names of architectures.
        batches: batch sizes for training.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "fp32", "bf16" or "fp16". The baseline loop always uses fp32.
        compiled: whether to include torch.compile. This adds a minute per comparison.
        rounds: number of rounds per comparison.
        seconds: duration of each measurement.
        log: function that is called with a description of each measurement.

    Returns:
        A JSON-serializable dictionary with all measurements and a description of the machine.
    """
    resolved_device = resolve_device(device)
    resolved_precision = resolve_precision(precision, resolved_device)
    started = time.perf_counter()
    dataset = load()
    load_seconds = time.perf_counter() - started
    if max(batches) > len(dataset.train):
        raise UsageError(
            f"batch size {max(batches)} exceeds the {len(dataset.train)} training images; choose a "
            f"smaller {option('batch')} or a larger data set ({option('data')})"
        )
    mean, std = channel_statistics(dataset.train.images)
    setup = BenchmarkSetup(
        dataset.train, mean, std, resolved_device, resolved_precision, len(dataset.classes)
    )
    log("limits of the machine")
    limits = machine_limits(resolved_device, resolved_precision)
    modes = available_modes(resolved_device, resolved_precision, compiled)
    training, inference = [], []
    for arch, batch in itertools.product(archs, batches):
        log(f"training {arch}, batch {batch}")
        rows = bench_training(setup, arch, batch, modes, rounds, seconds)
        memory = peak_memory(setup, arch, batch, modes)
        for row in rows:
            mode = row["name"].replace("baseline, 0 workers", "baseline")
            row["peak_memory_mb"] = memory.get(mode)
        times = roofline_times(arch, batch, resolved_precision, limits)
        training.append({"arch": arch, "batch": batch, "roofline": times, "rows": rows})
    for arch, batch in itertools.product(archs, (1, 256)):
        log(f"inference {arch}, batch {batch}")
        rows = bench_inference(setup, arch, batch, rounds, seconds / 3)
        inference.append({"arch": arch, "batch": batch, "rows": rows})
    log("start-up, data and evaluation")
    return {
        "machine": environment(resolved_device, resolved_precision),
        "data": dataset.source,
        "rounds": rounds,
        "limits": limits,
        "training": training,
        "inference": inference,
        "other": bench_other(setup, dataset, load_seconds),
    }
