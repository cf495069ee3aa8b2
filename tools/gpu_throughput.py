"""Measure variants of the training step: python tools/gpu_throughput.py FILE [--device DEVICE]

The tool times training steps of the recipe `best` and of its variants, on random images. The
variants use another execution mode or optimizer, no CutMix, teachers, smaller images or other
depths. The measurements are interleaved. The teachers have random weights. The tool prints a table,
and writes the same numbers to FILE as JSON.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from resnet56.benchmark.benchmark import next_step
from resnet56.benchmark.interleave import Candidate, summarize
from resnet56.data.class_names import CIFAR10
from resnet56.data.dataset import Dataset, Split
from resnet56.distributed import Distributed
from resnet56.errors import Error, UsageError
from resnet56.files import write_json
from resnet56.model import build
from resnet56.recipe import BEST, Recipe
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, Progress
from resnet56.runs.directory import RunDirectory
from resnet56.runtime import environment, resolve_device, resolve_precision
from resnet56.training.setup import set_up

WARMUP_STEPS = 40  # enough to record a CUDA graph for each of four random teachers
IMAGES = 12_800  # number of training images


def variants(teachers: tuple[str, ...]) -> dict[str, Recipe]:
    """Return the recipes to measure. Ratios are relative to the first recipe."""
    return {
        "best": BEST,
        "cuda-graph": replace(BEST, execution="cuda-graph"),
        "AdamW": replace(BEST, optimizer="adamw", lr=0.001, nesterov=False),
        "without CutMix": replace(BEST, mix="none"),
        "one teacher": replace(BEST, teacher=teachers[:1]),
        "a random one of four teachers": replace(BEST, teacher=teachers, teacher_random=True),
        "four teachers": replace(BEST, teacher=teachers),
        "16x16 images": replace(BEST, sizes=(16,) * (BEST.epochs - 1)),
        "24x24 images": replace(BEST, sizes=(24,) * (BEST.epochs - 1)),
        "resnet32": replace(BEST, arch="resnet32"),
        "resnet20": replace(BEST, arch="resnet20"),
    }


def random_dataset() -> Dataset:
    """Return random images with random labels, and the classes of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, len(CIFAR10), (IMAGES,), generator=generator)
    split = Split(images, labels)
    return Dataset("random", CIFAR10, split, split, True, "random images", "random")


def save_teachers(directory: Path) -> tuple[str, ...]:
    """Save four ResNet-56 networks with random weights, and return their paths."""
    config = ModelConfig("resnet56", CIFAR10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    paths = [directory / f"teacher{seed}" for seed in range(4)]
    for seed, path in enumerate(paths):
        weights = build("resnet56", seed=seed).state_dict()
        RunDirectory(path).save(Checkpoint(config, weights, {}, Progress(), {}))
    return tuple(map(str, paths))


def training_step(
    recipe: Recipe, dataset: Dataset, device: torch.device
) -> tuple[Callable[[], None], str]:
    """Return a function that runs one training step, and the execution mode of the step."""
    setup = set_up(recipe, dataset, device, Distributed())
    setup.trainer.train_mode()
    return next_step(recipe, setup.trainer, setup.batches), setup.prepared.execution


def main(file: Path, device: torch.device, rounds: int, steps: int) -> None:
    """Measure all variants, print a table and write the file."""
    dataset = random_dataset()
    candidates = []
    with tempfile.TemporaryDirectory() as directory:
        for name, recipe in variants(save_teachers(Path(directory))).items():
            try:
                run_once, execution = training_step(recipe, dataset, device)
            except UsageError as error:
                print(f"{name}: {error}")
            else:
                candidates.append(Candidate(f"{name} ({execution})", run_once, device))
    for candidate in candidates:
        candidate.time(WARMUP_STEPS)
    for _ in range(rounds):
        for candidate in candidates:
            candidate.seconds.append(candidate.time(steps))
    rows = summarize(candidates, BEST.batch_size, baseline=candidates[0].name)
    print("| step | ms | images/s | ratio | range of ratios |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['ms']:.2f} | {row['images_per_second']:,.0f} | "
            f"{row['ratio']:.2f}x | {row['ratio_min']:.2f} to {row['ratio_max']:.2f} |"
        )
    machine = environment(device, resolve_precision("auto", device))
    write_json(file, {"machine": machine, "rounds": rounds, "steps": steps, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure variants of the training step.")
    parser.add_argument("file", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda", help="device, such as cuda, cuda:1 or cpu")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements per variant")
    parser.add_argument("--steps", type=int, default=60, help="number of steps per measurement")
    options = parser.parse_args()
    try:
        main(options.file, resolve_device(options.device), options.rounds, options.steps)
    except Error as error:
        parser.error(str(error))
