"""Evaluate a model: metrics, robustness and inference speed."""

import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from resnet56.data.augment import CROP_AND_FLIP, Augmentation
from resnet56.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, evenly_spaced
from resnet56.data.dataset import Dataset, Split, training_split
from resnet56.errors import RunError
from resnet56.inference import BATCH, folded, predict_logits, restore, restore_custom
from resnet56.metrics import metrics_table, split_metrics
from resnet56.progress import ProgressCallback, ProgressFactory, no_progress, percent
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import (
    BatchSpeed,
    Comparison,
    Environment,
    Evaluation,
    Metrics,
    Origin,
    Robustness,
    Speed,
)
from resnet56.runtime import Precision, environment, peak_memory_mb
from resnet56.samples import augmented_samples, select_mistakes

_EMA_FIELDS = ("ema_decay", "ema_candidates")  # metadata of a checkpoint with EMA weights


def evaluate(
    model: nn.Module,
    split: Split,
    classes: tuple[str, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Precision = "fp32",
) -> Metrics:
    """Return the metrics of `model` on `split`, in the format of evaluation.json.

    Args:
        model: a model that maps normalized images (N, 3, 32, 32) to logits (N, C). The function
            puts the model in evaluation mode, and restores the previous mode afterward.
        split: images and labels.
        classes: names of the C classes.
        mean: channel means of the training images, for pixels in [0, 1].
        std: channel standard deviations of the training images, for pixels in [0, 1].
        precision: precision of the forward pass.

    Raises:
        UsageError: there are no images, or the logits or labels do not match the classes.
        NotFiniteError: a logit is not finite.
    """
    training = model.training
    try:
        logits = predict_logits(model.eval(), split.images, mean, std, precision)
    finally:
        model.train(training)
    return split_metrics(logits, split, classes)


class Classifier(Protocol):
    """A model that returns logits: an `EvaluatedModel`, or a model in another runtime."""

    @property
    def config(self) -> ModelConfig:
        """The configuration, which contains the classes and channel statistics."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    @property
    def precision(self) -> str:
        """The precision of the forward pass."""
        ...

    @property
    def runtime(self) -> str:
        """The library that runs the model: PyTorch or ONNX Runtime."""
        ...

    def logits(self, images: Tensor, batch: int = BATCH, advance: ProgressCallback = ...) -> Tensor:
        """Return the logits on the CPU: uint8 (N, 3, 32, 32) -> float32 (N, C)."""
        ...

    def metrics(self, split: Split, advance: ProgressCallback = ...) -> Metrics:
        """Return the metrics on `split`, in the format of evaluation.json."""
        ...


@dataclass(frozen=True)
class EvaluatedModel:
    """A model in evaluation mode, with its configuration and precision."""

    model: nn.Module
    config: ModelConfig
    precision: Precision
    runtime: str = "PyTorch"

    def logits(
        self, images: Tensor, batch: int = BATCH, advance: ProgressCallback = lambda count: None
    ) -> Tensor:
        """Return the logits on the CPU: uint8 (N, 3, 32, 32) -> float32 (N, C)."""
        mean, std = self.config.mean, self.config.std
        model, precision = self._inference
        return predict_logits(model, images, mean, std, precision, batch, advance)

    @cached_property
    def _inference(self) -> tuple[nn.Module, Precision]:
        """The model, converted for inference, and the precision to pass to `predict_logits`."""
        return folded(self.model, self.precision)

    def metrics(self, split: Split, advance: ProgressCallback = lambda count: None) -> Metrics:
        """Return the metrics on `split`, in the format of evaluation.json."""
        return split_metrics(self.logits(split.images, advance=advance), split, self.config.classes)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device


def evaluated_model(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: Precision = "fp32",
    model: nn.Module | None = None,
) -> EvaluatedModel:
    """Restore a model on `device` from a checkpoint, for evaluation.

    If the checkpoint is from a custom model, `model` is its module. This function loads the weights
    of the checkpoint into `model`.
    """
    net = restore(checkpoint, device) if model is None else restore_custom(model, checkpoint)
    return EvaluatedModel(net, checkpoint.config, precision)


class EvaluationDict(dict[str, Any]):
    """An `Evaluation` with a short representation."""

    def __repr__(self) -> str:
        test = self["test"]
        return f"Evaluation(test accuracy {percent(test['accuracy'])} on {test['n']:,} images)"

    def _repr_html_(self) -> str:
        splits = {name: self[name] for name in ("test", "train", "validation") if name in self}
        caption = f"{self['data']}; {self['weights']} weights after epoch {self['epoch']}"
        return metrics_table(splits, caption)


@dataclass(frozen=True)
class Results:
    """The results of an evaluation: the contents of three files in a run directory."""

    evaluation: Evaluation
    predictions: dict[str, npt.NDArray[Any]]  # arrays of predictions.npz
    samples: dict[str, npt.NDArray[Any]]  # arrays of samples.npz


def measure(
    classifier: Classifier,
    dataset: Dataset,
    weights: Mapping[str, Any],
    *,
    training: bool = True,
    val_size: int = 0,
    augmentation: Augmentation = CROP_AND_FLIP,
    progress: ProgressFactory = no_progress,
) -> Results:
    """Evaluate any network on the images of a data set, without augmentation.

    Args:
        classifier: the network.
        dataset: a data set with test images, whose classes are those of the network.
        weights: the fields of `Evaluation` that describe the weights, from `describe_weights`.
        training: whether to evaluate training and validation images, if there are any.
        val_size: number of training images to use for validation.
        augmentation: augmentation of the sample images.
        progress: displays the progress of the evaluation.
    """
    training_images, validation = training_split(dataset, val_size)
    splits = {"test": dataset.test, "train": training_images, "validation": validation}
    metrics: dict[str, Metrics] = {}
    logits: dict[str, Tensor] = {}
    for name, split in splits.items():
        if split and (training or name == "test"):
            with progress(f"{len(split):,} images ({name})", len(split)) as advance:
                logits[name] = classifier.logits(split.images, advance=advance)
            metrics[name] = split_metrics(logits[name], split, classifier.config.classes)
    evaluation = cast(Evaluation, {**metrics, **weights, **conditions(classifier, dataset)})
    test_logits, test_labels = logits["test"].numpy(), dataset.test.labels.cpu().numpy()
    config = classifier.config
    samples = augmented_samples(
        training_images or dataset.test, config.mean, config.std, augmentation
    )
    return Results(
        evaluation,
        predictions={
            "logits": test_logits,
            "labels": test_labels,
            "indices": np.arange(len(test_labels)),
        },
        samples=samples | select_mistakes(test_logits, dataset.test),
    )


def conditions(classifier: Classifier, dataset: Dataset) -> dict[str, str]:
    """Return the fields of `Evaluation` that describe the device, the precision and the data."""
    fields = {
        "device": str(classifier.device),
        "precision": classifier.precision,
        "data": dataset.source,
    }
    if classifier.runtime != "PyTorch":
        fields["runtime"] = classifier.runtime
    return fields


def describe_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the fields of `Evaluation` that describe the weights of a checkpoint."""
    fields = {key: checkpoint.metadata[key] for key in _EMA_FIELDS if key in checkpoint.metadata}
    return {
        "weights": checkpoint.metadata.get("weights", "final"),
        **fields,
        "epoch": checkpoint.progress.epoch,
        "step": checkpoint.progress.step,
    }


def evaluate_run(
    run: RunDirectory,
    dataset: Dataset,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    val_size: int = 0,
    augmentation: Augmentation = CROP_AND_FLIP,
    model: nn.Module | None = None,
    progress: ProgressFactory = no_progress,
) -> Evaluation:
    """Restore the weights of a run, and evaluate them with `evaluate_checkpoint`.

    Args:
        run: a run directory with a checkpoint.
        dataset: the data set of the run.
        device, precision: device and precision of the forward pass.
        val_size, augmentation, progress: as in `evaluate_checkpoint`.
        model: the module of a run with a custom model. This function loads the weights of the run
            into the module.

    Returns:
        The content of evaluation.json.
    """
    checkpoint = run.load()
    return evaluate_checkpoint(
        run,
        checkpoint,
        evaluated_model(checkpoint, device, precision, model),
        dataset,
        val_size=val_size,
        augmentation=augmentation,
        progress=progress,
    )


def evaluate_checkpoint(
    run: RunDirectory,
    checkpoint: Checkpoint,
    model: EvaluatedModel,
    dataset: Dataset,
    *,
    val_size: int = 0,
    augmentation: Augmentation = CROP_AND_FLIP,
    progress: ProgressFactory = no_progress,
) -> Evaluation:
    """Evaluate the weights of a run on its data set, and write the results to the run directory.

    The function evaluates training, validation and test images without augmentation. It writes
    evaluation.json, predictions.npz (logits, labels and indices of the test images) and samples.npz
    (images for the report). It keeps the results of `measure_extras` if the weights, the device and
    the precision are unchanged.

    For an imported network, the first evaluation records `dataset` as the data set of the run.

    Args:
        run: the run directory.
        checkpoint: the checkpoint of the run.
        model: the model from the checkpoint.
        dataset: the data set of the run.
        val_size: number of validation images, as in the recipe of the run.
        augmentation: augmentation of the run, for the images in samples.npz. If the run has a
            custom augmentation that is not passed, the function keeps the existing images.
        progress: displays the progress of the evaluation.

    Returns:
        The content of evaluation.json.
    """
    unknown = "augment" in checkpoint.metadata.get("custom", {}) and augmentation.function is None
    if unknown:
        augmentation = Augmentation(padding=0, flip=False)
    results = measure(
        model,
        dataset,
        describe_weights(checkpoint),
        val_size=val_size,
        augmentation=augmentation,
        progress=progress,
    )
    evaluation, samples = results.evaluation, results.samples
    if unknown:
        with suppress(RunError):
            earlier = run.read_samples() or {}
            kept = ("originals", "original_labels", "augmented")
            samples |= {name: earlier[name] for name in kept if name in earlier}
    previous = None
    with suppress(RunError):  # replace a damaged file
        previous = run.read_evaluation(checkpoint.progress.step)
    if previous and all(previous[key] == evaluation[key] for key in ("device", "precision")):
        if "speed" in previous:
            evaluation["speed"] = previous["speed"]
        if "robustness" in previous:
            evaluation["robustness"] = previous["robustness"]
    if run.is_imported() and checkpoint.metadata.get("data") is None:
        _record_data(run, dataset, model.device, model.precision)
    run.write_predictions(results.predictions)
    run.write_samples(samples)
    run.write_evaluation(evaluation)
    return cast(Evaluation, EvaluationDict(evaluation))


def _record_data(
    run: RunDirectory, dataset: Dataset, device: torch.device, precision: Precision
) -> None:
    """Record the data set of an imported network, and the machine that evaluates the network."""
    data: Origin = {"origin": dataset.origin, "source": dataset.source}
    run.write_environment(cast(Environment, environment(device, precision) | {"data": data}))
    checkpoint = run.load(training=True)
    metadata = {**checkpoint.metadata, "data": dataset.fingerprint()}
    run.save(replace(checkpoint, metadata=metadata))


def measure_extras(
    evaluation: Evaluation,
    classifier: Classifier,
    test: Split,
    robustness: int,
    progress: ProgressFactory = no_progress,
) -> None:
    """Measure inference speed and robustness, and add them to an evaluation.

    Args:
        evaluation: the evaluation of the network, changed in place.
        classifier: the network.
        test: the test images.
        robustness: number of images to corrupt. 0 keeps the earlier result. If `test` contains
            fewer images, the function corrupts all of them.
        progress: displays the progress of the robustness test.
    """
    evaluation["speed"] = inference_speed(classifier, test.images)
    count = min(robustness, len(test))
    if count:
        evaluation["robustness"] = measure_robustness(classifier, test, count, progress)


def measure_robustness(
    classifier: Classifier, split: Split, count: int, progress: ProgressFactory = no_progress
) -> Robustness:
    """Return the accuracy on `count` evenly spaced images for each corruption and severity."""
    index = evenly_spaced(len(split), count)
    images, labels = split.images[index].cpu(), split.labels[index].cpu()

    def accuracy(inputs: Tensor, advance: ProgressCallback = lambda count: None) -> float:
        logits = classifier.logits(inputs, advance=advance)
        return float((logits.argmax(dim=1) == labels).double().mean())

    repeats = len(CORRUPTIONS) * len(SEVERITIES)
    description = f"{len(index):,} images with {repeats} corruptions"
    with progress(description, repeats * len(index)) as advance:
        corruptions = {
            name: [accuracy(corrupt(images, name, severity), advance) for severity in SEVERITIES]
            for name in CORRUPTIONS
        }
    accuracies = [value for values in corruptions.values() for value in values]
    return {
        "images": len(index),
        "severities": list(SEVERITIES),
        "clean_accuracy": accuracy(images),
        "mean_accuracy": statistics.fmean(accuracies),
        "corruptions": corruptions,
    }


def inference_speed(classifier: Classifier, images: Tensor) -> Speed:
    """Return the inference speed for batch sizes 1 and 256, and the peak memory.

    The speed is the median over several calls, each of which computes logits from uint8 images.
    """
    result: dict[str, BatchSpeed] = {}
    for batch, repeats in ((1, 30), (BATCH, 5)):
        batch_images = images[torch.arange(batch) % len(images)]
        classifier.logits(batch_images, batch)  # warm up
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            classifier.logits(batch_images, batch)  # copying the logits waits for the device
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times) / len(batch_images)
        result[f"batch_{batch}"] = {
            "ms_per_image": 1000 * seconds,
            "images_per_second": 1 / seconds,
        }
    return {
        "batch_1": result["batch_1"],
        "batch_256": result[f"batch_{BATCH}"],
        "peak_memory_mb": peak_memory_mb(classifier.device),
    }


def compare(
    first: Classifier,
    second: Classifier,
    names: tuple[str, str],
    split: Split,
    progress: ProgressFactory = no_progress,
) -> Comparison:
    """Compare the predictions of a model on two devices, runtimes or precisions.

    Returns:
        An entry of parity.json: both accuracies, the number of images whose predicted classes
        differ, the median and largest absolute difference between logits, and a verdict.
    """
    labels = split.labels.cpu()
    with progress(f"{len(labels):,} images, twice", 2 * len(labels)) as advance:
        a, b = (classifier.logits(split.images, advance=advance) for classifier in (first, second))
    distance = (a - b).abs()
    correct = [int((logits.argmax(dim=1) == labels).sum()) for logits in (a, b)]
    changed = int((a.argmax(dim=1) != b.argmax(dim=1)).sum())
    return {
        "a": names[0],
        "b": names[1],
        "images": len(labels),
        "accuracy_a": correct[0] / len(labels),
        "accuracy_b": correct[1] / len(labels),
        "changed": changed,
        "median_difference": float(distance.median()),
        "largest_difference": float(distance.max()),
        "verdict": _verdict(names, len(labels), changed, correct[1] - correct[0]),
    }


def _verdict(names: tuple[str, str], images: int, changed: int, gained: int) -> str:
    """State how many predictions differ, and how much of an accuracy gap they explain.

    Args:
        names: names of the two models.
        images: number of images.
        changed: number of images whose predicted classes differ.
        gained: correct predictions of the second model minus correct predictions of the first.
    """
    no_gap = "so the choice between the two does not explain any accuracy gap."
    if not changed:
        return (
            f"{names[0]} and {names[1]} predict the same class for all {images:,} images, {no_gap}"
        )
    points = 100 * gained / images
    effect = (
        f"Accuracy changes by {points:+.2f} points from {names[0]} to {names[1]}, so the choice "
        f"between the two explains at most {abs(points):.2f} points of an accuracy gap."
        if gained
        else f"Accuracy does not change from {names[0]} to {names[1]}, {no_gap}"
    )
    return (
        f"{names[0]} and {names[1]} predict different classes for {changed:,} of {images:,} images "
        f"({100 * changed / images:.2f} %). {effect}"
    )
