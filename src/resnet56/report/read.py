"""Read and check the files of a run for a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from resnet56.errors import RunError
from resnet56.files import read_json
from resnet56.model import Description, describe
from resnet56.recipe import Recipe
from resnet56.recipe import from_fields as recipe_from_fields
from resnet56.report import recipe_words
from resnet56.runs.checkpoint import CheckpointMetadata, ModelConfig, Progress
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import (
    Comparison,
    CustomPart,
    Environment,
    EpochMetrics,
    Evaluation,
    Metrics,
    Robustness,
    check_evaluation,
)

if TYPE_CHECKING:
    from resnet56.evaluation import Results

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """The images in samples.npz: K training images with V augmented versions each, and M mistakes.

    Images are uint8. The mistakes are in descending order of confidence.
    """

    originals: Array  # (K, 3, 32, 32)
    original_labels: Array  # (K,)
    augmented: Array  # (K, V, 3, 32, 32)
    mistakes: Array  # (M, 3, 32, 32)
    mistake_index: Array  # (M,), indices into the test set
    mistake_true: Array  # (M,)
    mistake_predicted: Array  # (M,)
    mistake_confidence: Array  # (M,)


@dataclass(frozen=True)
class Predictions:
    """The predictions of a run for the test images."""

    labels: Array  # true classes of shape (N,)
    correct: npt.NDArray[np.bool_]  # whether each of the N images is classified correctly


@dataclass(frozen=True)
class RunFacts:
    """The data for a report on a run, or on a network that has no run directory.

    A network from another project has no recipe. Only training runs have training curves.
    """

    path: Path  # the run directory, or the name or path of a network without one
    stored: bool  # whether there is a run directory, which contains predictions.npz
    environment: Environment  # environment.json, or an empty dictionary
    rows: list[EpochMetrics]  # metrics.jsonl, with one row per epoch
    recipe: Recipe | None  # None if training is not recorded
    config: ModelConfig
    progress: Progress
    metadata: CheckpointMetadata
    description: Description
    evaluation: Evaluation | None  # evaluation of the current weights
    comparisons: list[Comparison]  # comparisons of devices or precisions, for the current weights
    samples: Samples | None
    predictions: Mapping[str, Array] | None = None  # predictions, if the network is not a run

    @property
    def name(self) -> str:
        """The name of the directory, file or pretrained weights."""
        return self.path.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the outputs."""
        return self.config.classes

    @property
    def images(self) -> str | None:
        """The fingerprint of the data set, if it is recorded."""
        return self.metadata.get("data")

    @property
    def test(self) -> Metrics | None:
        """The metrics on the test images, if they were measured."""
        return self.evaluation["test"] if self.evaluation else None

    @property
    def train(self) -> Metrics | None:
        """The metrics on the training images without augmentation, if they were measured."""
        return self.evaluation.get("train") if self.evaluation else None

    @property
    def validation(self) -> Metrics | None:
        """The metrics on the validation images, if they were measured."""
        return self.evaluation.get("validation") if self.evaluation else None

    @property
    def robustness(self) -> Robustness | None:
        """The accuracy on corrupted test images, if it was measured."""
        return self.evaluation.get("robustness") if self.evaluation else None

    @property
    def validated(self) -> list[EpochMetrics]:
        """The epochs with validation metrics."""
        return [row for row in self.rows if "val_accuracy" in row]

    @property
    def source(self) -> str | None:
        """A sentence that describes the data set."""
        if "data" in self.environment:
            return self.environment["data"]["source"]
        return self.evaluation["data"] if self.evaluation else None

    @property
    def seconds(self) -> float:
        """Training time in seconds, over all finished epochs."""
        return float(sum(row["seconds"] for row in self.rows))

    @property
    def flips(self) -> bool:
        """True if training images were flipped horizontally."""
        if "data" in self.environment and "flip" in self.environment["data"]:
            return self.environment["data"]["flip"]
        return self.recipe is not None and self.recipe.flip

    @property
    def custom(self) -> Mapping[str, CustomPart]:
        """The custom parts that replaced parts of the recipe."""
        return self.metadata.get("custom", {})

    @property
    def augmented(self) -> bool | None:
        """True if training images were augmented, or None if training is not recorded."""
        if self.recipe is None:
            return None
        builtin = recipe_words.is_augmented(self.recipe, flips=self.flips)
        return builtin or "augment" in self.custom

    @property
    def training_augmented(self) -> bool | None:
        """The value of `augmented`, or None if training may have used another data set."""
        return self.augmented if self.stored else None

    @property
    def finished(self) -> bool:
        """True if all epochs of the recipe are finished, or if the run has no recipe."""
        return self.recipe is None or self.progress.epoch >= self.recipe.epochs


def read_run(path: Path) -> RunFacts:
    """Return the data for a report on a training run or an imported network.

    Raises:
        RunError: the run does not exist, or one of its files is damaged.
        UsageError: recipe.json is not a valid recipe.
    """
    run = RunDirectory(path)
    checkpoint = run.load()
    config, step = checkpoint.config, checkpoint.progress.step
    evaluation = run.read_evaluation(step)
    if evaluation is not None:
        check_evaluation(evaluation, run.evaluation_file, config.classes)
    return RunFacts(
        path=path,
        stored=True,
        environment=run.read_environment() or {},
        rows=run.read_metrics(),
        recipe=recipe_from_fields(read_json(run.recipe_file), str(run.recipe_file))
        if run.recipe_file.exists()
        else None,
        config=config,
        progress=checkpoint.progress,
        metadata=cast(CheckpointMetadata, checkpoint.metadata),
        description=_describe(config, checkpoint.metadata.get("custom", {}).get("model")),
        evaluation=evaluation,
        comparisons=run.read_comparisons(step),
        # Without an evaluation, the samples could show mistakes made with other weights.
        samples=read_samples(run, len(config.classes)) if evaluation else None,
    )


def facts_from_results(
    path: Path,
    config: ModelConfig,
    results: "Results",
    *,
    environment: Environment,
    fingerprint: str,
    recipe: Recipe | None,
) -> RunFacts:
    """Return the data for a report on a network that has no run directory.

    Args:
        path: name or path of the network.
        config: its configuration.
        results: its evaluation.
        environment: the machine and the data set of the evaluation.
        fingerprint: fingerprint of the data set.
        recipe: recipe of the network, if it is recorded.
    """
    return RunFacts(
        path=path,
        stored=False,
        environment=environment,
        rows=[],
        recipe=recipe,
        config=config,
        progress=Progress(epoch=recipe.epochs if recipe else 0),
        metadata={"weights": results.evaluation["weights"], "data": fingerprint},
        description=describe(config.arch, len(config.classes)),
        evaluation=results.evaluation,
        comparisons=[],
        samples=Samples(**results.samples),
        predictions=results.predictions,
    )


def _describe(config: ModelConfig, custom: CustomPart | None) -> Description:
    """Describe the network. For a custom model, only the number of parameters is known."""
    if custom is None:
        return describe(config.arch, len(config.classes))
    parameters = custom.get("parameters", 0)
    return Description(config.arch, 0, "custom", "none", 0, (), parameters, 0)


def read_samples(run: RunDirectory, classes: int) -> Samples | None:
    """Read samples.npz, or return None if it does not exist.

    Raises:
        RunError: the file is damaged.
    """
    arrays = run.read_samples()
    if arrays is None:
        return None
    samples = Samples(**arrays)
    for labels in (samples.original_labels, samples.mistake_true, samples.mistake_predicted):
        if labels.size and labels.max() >= classes:
            raise RunError(f"{run.samples_file} is damaged: it contains out-of-range labels")
    return samples


def read_predictions(facts: RunFacts) -> Predictions | None:
    """Read the predictions that the test metrics describe, or return None if there are none.

    Raises:
        RunError: the file is damaged or belongs to another evaluation.
    """
    run = RunDirectory(facts.path)
    arrays = run.read_predictions() if facts.stored else facts.predictions
    if arrays is None or facts.test is None:
        return None
    labels = arrays["labels"]
    correct = arrays["logits"].argmax(axis=1) == labels
    if len(labels) != facts.test["n"] or abs(correct.mean() - facts.test["accuracy"]) > 1e-9:
        raise RunError(
            f"{run.predictions_file} does not match {run.evaluation_file.name}; repeat the "
            f"evaluation: resnet56 evaluate {facts.path}"
        )
    return Predictions(labels, correct)
