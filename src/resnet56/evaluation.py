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
from resnet56.runs.checkpoint import Checkpoint, Network
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import BatchSpeed, Comparison, Evaluation, Metrics, Robustness, Speed
from resnet56.runtime import Resolved, autocast, peak_memory_mb
from resnet56.samples import gallery, surest_mistakes

BATCH = 256

Tick = Callable[[int], None]  # called with the images done since the last call
Show = Callable[[str, int], AbstractContextManager[Tick]]  # what is measured, on how many images


def show_nothing(what: str, total: int) -> AbstractContextManager[Tick]:
    """The quiet `Show`."""
    return nullcontext(lambda count: None)


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Resolved = "fp32",
    batch: int = BATCH,
    tick: Tick = lambda count: None,
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
        tick(len(chunk))
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
    precision: Resolved = "fp32",
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
class Subject:
    """What is measured: a network with its constants, and how it is run."""

    model: nn.Module
    network: Network
    precision: Resolved

    def logits(self, images: Tensor, batch: int = BATCH, tick: Tick = lambda count: None) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N, C) float32 on the CPU."""
        net = self.network
        return predict_logits(self.model, images, net.mean, net.std, self.precision, batch, tick)

    def figures(self, split: Split, tick: Tick = lambda count: None) -> Metrics:
        """Metrics on `split`, as an entry of evaluation.json."""
        return figures_of(self.logits(split.images, tick=tick), split, self.network.classes)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device


def subject_of(
    checkpoint: Checkpoint, device: torch.device, precision: Resolved = "fp32"
) -> Subject:
    """The checkpoint's network on `device`, ready to be measured."""
    return Subject(restore(checkpoint, device), checkpoint.network, precision)


def evaluate_run(
    run: RunDirectory,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: Resolved = "fp32",
    holdout: int = 0,
    augmentation: Augmentation = PLAIN_CROPS,
    show: Show = show_nothing,
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
    subject = subject_of(checkpoint, device, precision)
    training, held_out = training_split(dataset, holdout)
    splits = {"test": dataset.test, "train": training, "holdout": held_out}
    metrics: dict[str, Metrics] = {}
    logits: dict[str, Tensor] = {}
    for name, split in splits.items():
        if split is not None:
            with show(f"{len(split):,} images ({name})", len(split)) as tick:
                logits[name] = subject.logits(split.images, tick=tick)
            metrics[name] = figures_of(logits[name], split, checkpoint.network.classes)
    result: Evaluation = {
        **metrics,  # type: ignore[typeddict-item]
        "weights": checkpoint.notes.get("weights", "last"),
        "epoch": checkpoint.position.epoch,
        "step": checkpoint.position.step,
        "device": str(device),
        "precision": precision,
        "data": dataset.source,
    }
    for key in ("ema_decay", "ema_candidates"):
        if key in checkpoint.notes:
            result[key] = checkpoint.notes[key]
    before = None
    with suppress(RunError):  # a damaged file is about to be replaced
        before = run.read_evaluation(checkpoint.position.step)
    if before and (before["device"], before["precision"]) == (result["device"], precision):
        if "speed" in before:
            result["speed"] = before["speed"]
        if "robustness" in before:
            result["robustness"] = before["robustness"]
    test_logits, test_labels = logits["test"].numpy(), dataset.test.labels.cpu().numpy()
    indices = np.arange(len(test_labels))
    run.write_predictions({"logits": test_logits, "labels": test_labels, "indices": indices})
    net = subject.network
    shown = gallery(training, net.mean, net.std, augmentation)
    run.write_samples(shown | surest_mistakes(test_logits, dataset.test))
    run.write_evaluation(result)
    return result


def measure_extras(
    run: RunDirectory,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: Resolved = "fp32",
    robustness: int = 0,
    show: Show = show_nothing,
) -> Evaluation:
    """Measure what takes longer, and add it to the evaluation.json that `evaluate_run` wrote.

    Args:
        run, dataset, device, precision, show: as for `evaluate_run`.
        robustness: test images to corrupt in every way; 0 keeps an earlier measurement.

    Returns:
        The content of evaluation.json, with the inference speed and, if measured, the robustness.
    """
    checkpoint = run.load()
    subject = subject_of(checkpoint, device, precision)
    result = run.read_evaluation(checkpoint.position.step)
    if result is None:
        raise RunError(f"{run.path} is not evaluated yet")
    result["speed"] = inference_speed(subject, dataset.test.images)
    if robustness:
        result["robustness"] = measure_robustness(subject, dataset.test, robustness, show)
    run.write_evaluation(result)
    return result


def measure_robustness(
    subject: Subject, split: Split, count: int, show: Show = show_nothing
) -> Robustness:
    """Accuracy on `count` evenly spaced images under each corruption and severity."""
    index = evenly_spaced(len(split), count)
    images, labels = split.images[index].cpu(), split.labels[index].cpu()

    def accuracy(changed: Tensor, tick: Tick = lambda count: None) -> float:
        logits = subject.logits(changed, tick=tick)
        return float((logits.argmax(dim=1) == labels).double().mean())

    rounds = len(CORRUPTIONS) * len(SEVERITIES)
    what = f"{len(index):,} images, corrupted in {rounds} ways"
    with show(what, rounds * len(index)) as tick:
        corruptions = {
            name: [accuracy(corrupt(images, name, severity), tick) for severity in SEVERITIES]
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


def inference_speed(subject: Subject, images: Tensor) -> Speed:
    """Time from bytes to logits, one image and 256 at a time: the median of several."""
    result: dict[str, BatchSpeed] = {}
    if isinstance(subject.model, ResNet):  # else every call would begin with folding
        form = InferenceForm(subject.model, subject.precision)
        subject = replace(subject, model=form, precision="fp32")  # it needs no autocast
    for batch, repeats in ((1, 30), (BATCH, 5)):
        batch_images = images[torch.arange(batch) % len(images)]
        subject.logits(batch_images, batch)  # warm up
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            subject.logits(batch_images, batch)  # ends on the CPU, so the device is done
            times.append(time.perf_counter() - begun)
        seconds = statistics.median(times) / len(batch_images)
        result[f"batch_{batch}"] = {
            "milliseconds_an_image": 1000 * seconds,
            "images_per_second": 1 / seconds,
        }
    return {
        "batch_1": result["batch_1"],
        "batch_256": result[f"batch_{BATCH}"],
        "peak_memory_mb": peak_memory_mb(subject.device),
    }


class Measured(Protocol):
    """Whatever gives logits: a `Subject`, or the network in another program."""

    @property
    def network(self) -> Network:
        """Its classes and constants."""
        ...

    def logits(self, images: Tensor, batch: int = BATCH, tick: Tick = ...) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N, C) float32 on the CPU."""
        ...


def compare(
    one: Measured,
    other: Measured,
    names: tuple[str, str],
    split: Split,
    show: Show = show_nothing,
) -> Comparison:
    """Does it matter where, or in which precision, the network is run?

    Returns:
        Both accuracies, the images whose class changes, the median and largest difference of
        logits, and a sentence with the verdict: an entry of parity.json.
    """
    labels = split.labels.cpu()
    with show(f"{len(labels):,} images, twice", 2 * len(labels)) as tick:
        a, b = (side.logits(split.images, tick=tick) for side in (one, other))
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
