"""A run's weights over images: predictions, and all that is measured of them."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from resnet56.data.augment import PLAIN_CROPS, Augmentation, normalize
from resnet56.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, evenly_spaced
from resnet56.data.dataset import Dataset, Split, training_split
from resnet56.errors import NotFiniteError, RunError
from resnet56.inference import UNUSABLE, InferenceForm, restore
from resnet56.metrics import measure
from resnet56.model import ResNet
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import BatchSpeed, Comparison, Evaluation, Metrics, Robustness, Speed
from resnet56.runtime import Precision, autocast, peak_memory_mb
from resnet56.samples import gallery, surest_mistakes

BATCH = 256

ProgressCallback = Callable[[int], None]  # called with the images done since the last call
ProgressFactory = Callable[
    [str, int], AbstractContextManager[ProgressCallback]
]  # what is measured, on how many images


def show_nothing(what: str, total: int) -> AbstractContextManager[ProgressCallback]:
    """The quiet `Show`."""
    return nullcontext(lambda count: None)


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Precision = "fp32",
    batch: int = BATCH,
    advance: ProgressCallback = lambda count: None,
) -> Tensor:
    """Logits of unaugmented images.

    Args:
        model: in evaluation mode; a `ResNet` is run in its inference form.
        images: (N, 3, 32, 32) uint8, on any device.
        mean, std: of the training images, in units of [0, 1].
        precision: of the forward pass.
        batch: images at a time.
        tick: is called after each batch with its size.

    Returns:
        (N, C) float32 on the CPU.
    """
    if isinstance(model, ResNet):
        model, precision = InferenceForm(model, precision), "fp32"
    device = next(model.parameters()).device
    scale = (torch.tensor(mean, device=device), torch.tensor(std, device=device))
    parts = []
    for chunk in images.split(batch):
        inputs = normalize(chunk.to(device), *scale).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            parts.append(model(inputs).float())
        advance(len(chunk))
    logits = torch.cat(parts).cpu()
    if not bool(logits.isfinite().all()):
        raise NotFiniteError(UNUSABLE)
    return logits


def evaluate(
    model: nn.Module,
    split: Split,
    classes: tuple[str, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Precision = "fp32",
) -> Metrics:
    """Metrics of `model` on `split`, as evaluation.json holds them."""
    training = model.training
    logits = predict_logits(model.eval(), split.images, mean, std, precision)
    model.train(training)
    return figures_of(logits, split, classes)


def figures_of(logits: Tensor, split: Split, classes: tuple[str, ...]) -> Metrics:
    """Metrics of (N, C) logits on `split`, as an entry of evaluation.json."""
    return measure(logits.numpy(), split.labels.cpu().numpy(), classes)


@dataclass(frozen=True)
class EvaluatedModel:
    """What is measured: a network with its constants, and how it is run."""

    model: nn.Module
    config: ModelConfig
    precision: Precision

    def logits(
        self, images: Tensor, batch: int = BATCH, advance: ProgressCallback = lambda count: None
    ) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N, C) float32 on the CPU."""
        net = self.config
        return predict_logits(self.model, images, net.mean, net.std, self.precision, batch, advance)

    def metrics(self, split: Split, advance: ProgressCallback = lambda count: None) -> Metrics:
        """Metrics on `split`, as an entry of evaluation.json."""
        return figures_of(self.logits(split.images, advance=advance), split, self.config.classes)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device


def evaluated_model(
    checkpoint: Checkpoint, device: torch.device, precision: Precision = "fp32"
) -> EvaluatedModel:
    """The checkpoint's network on `device`, ready to be measured."""
    return EvaluatedModel(restore(checkpoint, device), checkpoint.config, precision)


def evaluate_run(
    run: RunDirectory,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    val_size: int = 0,
    augmentation: Augmentation = PLAIN_CROPS,
    show: ProgressFactory = show_nothing,
) -> Evaluation:
    """Measure the run's weights on the data it was trained on, and write the results down.

    Training and test images are measured the same way, without augmentation. Robustness and speed
    stay if `measure_extras` has measured them with the same weights, device and precision. Writes
    evaluation.json, predictions.npz (the test images' logits, labels and indices) and
    samples.npz (a few images for the report).

    Args:
        run: with a checkpoint.
        dataset: the run's own.
        device, precision: of the forward pass.
        holdout: as in the run's recipe; these images are measured apart.
        augmentation: of the run's training, for the report to show.
        show: shows what is being measured.

    Returns:
        The content of evaluation.json.
    """
    checkpoint = run.load()
    evaluated = evaluated_model(checkpoint, device, precision)
    training, validation = training_split(dataset, val_size)
    splits = {"test": dataset.test, "train": training, "validation": validation}
    metrics: dict[str, Metrics] = {}
    logits: dict[str, Tensor] = {}
    for name, split in splits.items():
        if split is not None:
            with show(f"{len(split):,} images ({name})", len(split)) as advance:
                logits[name] = evaluated.logits(split.images, advance=advance)
            metrics[name] = figures_of(logits[name], split, checkpoint.config.classes)
    result: Evaluation = {
        **metrics,  # type: ignore[typeddict-item]
        "weights": checkpoint.metadata.get("weights", "final"),
        "epoch": checkpoint.progress.epoch,
        "step": checkpoint.progress.step,
        "device": str(device),
        "precision": precision,
        "data": dataset.source,
    }
    for key in ("ema_decay", "ema_candidates"):
        if key in checkpoint.metadata:
            result[key] = checkpoint.metadata[key]
    before = None
    with suppress(RunError):  # a damaged file is about to be replaced
        before = run.read_evaluation(checkpoint.progress.step)
    if before and (before["device"], before["precision"]) == (result["device"], precision):
        if "speed" in before:
            result["speed"] = before["speed"]
        if "robustness" in before:
            result["robustness"] = before["robustness"]
    test_logits, test_labels = logits["test"].numpy(), dataset.test.labels.cpu().numpy()
    indices = np.arange(len(test_labels))
    run.write_predictions({"logits": test_logits, "labels": test_labels, "indices": indices})
    net = evaluated.config
    shown = gallery(training, net.mean, net.std, augmentation)
    run.write_samples(shown | surest_mistakes(test_logits, dataset.test))
    run.write_evaluation(result)
    return result


def measure_extras(
    run: RunDirectory,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    robustness: int = 0,
    show: ProgressFactory = show_nothing,
) -> Evaluation:
    """Measure what takes longer, and add it to the evaluation.json that `evaluate_run` wrote.

    Args:
        run, dataset, device, precision, show: as for `evaluate_run`.
        robustness: test images to corrupt in every way; 0 keeps an earlier measurement.

    Returns:
        The content of evaluation.json, with the inference speed and, if measured, the robustness.
    """
    checkpoint = run.load()
    evaluated = evaluated_model(checkpoint, device, precision)
    result = run.read_evaluation(checkpoint.progress.step)
    if result is None:
        raise RunError(f"{run.path} is not evaluated yet")
    result["speed"] = inference_speed(evaluated, dataset.test.images)
    if robustness:
        result["robustness"] = measure_robustness(evaluated, dataset.test, robustness, show)
    run.write_evaluation(result)
    return result


def measure_robustness(
    evaluated: EvaluatedModel, split: Split, count: int, show: ProgressFactory = show_nothing
) -> Robustness:
    """Accuracy on `count` evenly spaced images under each corruption and severity."""
    index = evenly_spaced(len(split), count)
    images, labels = split.images[index].cpu(), split.labels[index].cpu()

    def accuracy(changed: Tensor, advance: ProgressCallback = lambda count: None) -> float:
        logits = evaluated.logits(changed, advance=advance)
        return float((logits.argmax(dim=1) == labels).double().mean())

    rounds = len(CORRUPTIONS) * len(SEVERITIES)
    what = f"{len(index):,} images, corrupted in {rounds} ways"
    with show(what, rounds * len(index)) as advance:
        corruptions = {
            name: [accuracy(corrupt(images, name, severity), advance) for severity in SEVERITIES]
            for name in CORRUPTIONS
        }
    every = [value for values in corruptions.values() for value in values]
    return {
        "images": len(index),
        "severities": list(SEVERITIES),
        "clean_accuracy": accuracy(images),
        "mean_accuracy": statistics.fmean(every),
        "corruptions": corruptions,
    }


def inference_speed(evaluated: EvaluatedModel, images: Tensor) -> Speed:
    """Time from bytes to logits, one image and 256 at a time: the median of several."""
    result: dict[str, BatchSpeed] = {}
    if isinstance(evaluated.model, ResNet):  # else every call would begin with folding
        form = InferenceForm(evaluated.model, evaluated.precision)
        evaluated = replace(evaluated, model=form, precision="fp32")  # it needs no autocast
    for batch, repeats in ((1, 30), (BATCH, 5)):
        batch_images = images[torch.arange(batch) % len(images)]
        evaluated.logits(batch_images, batch)  # warm up
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            evaluated.logits(batch_images, batch)  # ends on the CPU, so the device is done
            times.append(time.perf_counter() - begun)
        seconds = statistics.median(times) / len(batch_images)
        result[f"batch_{batch}"] = {
            "ms_per_image": 1000 * seconds,
            "images_per_second": 1 / seconds,
        }
    return {
        "batch_1": result["batch_1"],
        "batch_256": result[f"batch_{BATCH}"],
        "peak_memory_mb": peak_memory_mb(evaluated.device),
    }


class Classifier(Protocol):
    """Whatever gives logits: a `Subject`, or the network in another program."""

    @property
    def config(self) -> ModelConfig:
        """Its classes and constants."""
        ...

    def logits(self, images: Tensor, batch: int = BATCH, advance: ProgressCallback = ...) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N, C) float32 on the CPU."""
        ...


def compare(
    one: Classifier,
    other: Classifier,
    names: tuple[str, str],
    split: Split,
    show: ProgressFactory = show_nothing,
) -> Comparison:
    """Does it matter where, or in which precision, the network is run?

    Returns:
        Both accuracies, the images whose class changes, the median and largest difference of
        logits, and a sentence with the verdict: an entry of parity.json.
    """
    labels = split.labels.cpu()
    with show(f"{len(labels):,} images, twice", 2 * len(labels)) as advance:
        a, b = (side.logits(split.images, advance=advance) for side in (one, other))
    distance = (a - b).abs()
    hits = [int((logits.argmax(dim=1) == labels).sum()) for logits in (a, b)]
    changed = int((a.argmax(dim=1) != b.argmax(dim=1)).sum())
    points = 100 * (hits[1] - hits[0]) / len(labels)
    if changed == 0:
        verdict = (
            f"{names[0]} and {names[1]} give every one of the {len(labels):,} images the same "
            "class: where it runs explains none of an accuracy gap."
        )
    else:
        verdict = (
            f"{changed:,} of {len(labels):,} images ({100 * changed / len(labels):.2f} %) change "
            f"their class from {names[0]} to {names[1]}, and the accuracy by {points:+.2f} points: "
            "that much of a gap it can explain, and no more."
        )
    return {
        "a": names[0],
        "b": names[1],
        "images": len(labels),
        "accuracy_a": hits[0] / len(labels),
        "accuracy_b": hits[1] / len(labels),
        "changed": changed,
        "median_difference": float(distance.median()),
        "largest_difference": float(distance.max()),
        "verdict": verdict,
    }
