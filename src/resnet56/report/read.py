"""A run directory's files, read once and checked, as one record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from resnet56.errors import RunError
from resnet56.files import read_json
from resnet56.model import Description, describe
from resnet56.recipe import Recipe
from resnet56.recipe import from_fields as recipe_from_fields
from resnet56.runs.checkpoint import Network, Position
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import (
    Comparison,
    Environment,
    EpochMetrics,
    Evaluation,
    Metrics,
    check_evaluation,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """Pictures that an evaluation kept; uint8, (..., 3, 32, 32)."""

    originals: Array  # (K, 3, 32, 32)
    original_labels: Array  # (K,)
    augmented: Array  # (K, V, 3, 32, 32)
    mistakes: Array  # (M, 3, 32, 32), the most confident first
    mistake_index: Array  # (M,), within the test set
    mistake_true: Array  # (M,)
    mistake_predicted: Array  # (M,)
    mistake_confidence: Array  # (M,)


@dataclass(frozen=True)
class RunFacts:
    """All that a report knows about one run."""

    path: Path
    recipe: Recipe
    environment: Environment  # empty if the run kept none
    rows: list[EpochMetrics]  # metrics.jsonl, a row an epoch
    network: Network
    position: Position
    images: str | None  # the data's fingerprint, where the checkpoint knows it
    description: Description
    evaluation: Evaluation | None  # of these weights: one made earlier in the training is not
    comparisons: list[Comparison]  # of devices and precisions; the same
    samples: Samples | None

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the network's outputs."""
        return self.network.classes

    @property
    def test(self) -> Metrics | None:
        """The metrics on the test images, once there are any."""
        return self.evaluation["test"] if self.evaluation else None

    @property
    def train(self) -> Metrics | None:
        """The metrics on the training images without augmentation, once there are any."""
        return self.evaluation.get("train") if self.evaluation else None

    @property
    def holdout(self) -> Metrics | None:
        """The metrics on the held-out images, where there are any."""
        return self.evaluation.get("holdout") if self.evaluation else None

    @property
    def source(self) -> str | None:
        """The sentence that says which images these are."""
        if "data" in self.environment:
            return self.environment["data"]["source"]
        return self.evaluation["data"] if self.evaluation else None

    @property
    def mirrors(self) -> bool:
        """Whether training images were mirrored, as the run recorded it."""
        if "data" in self.environment and "mirrored" in self.environment["data"]:
            return self.environment["data"]["mirrored"]
        return self.recipe.flip

    @property
    def seconds(self) -> float:
        """Time in the training loop, over all finished epochs."""
        return float(sum(row["seconds"] for row in self.rows))

    @property
    def finished(self) -> bool:
        """Whether all epochs of the recipe are behind."""
        return self.position.epoch >= self.recipe.epochs


def read_run(path: Path) -> RunFacts:
    """Read a run.

    Raises:
        RunError: there is no run, or one of its files is damaged; the file is named.
        UsageError: recipe.json says what no recipe can say.
    """
    run = RunDirectory(path)
    checkpoint = run.load()
    if not run.recipe_file.exists():
        raise RunError(
            f"{path} was not trained here (it has no recipe.json), so there is nothing to report; "
            f"resnet56 evaluate {path} --data DIR measures it"
        )
    network, step = checkpoint.network, checkpoint.position.step
    evaluation = run.read_evaluation(step)
    if evaluation is not None:
        check_evaluation(evaluation, run.evaluation_file, network.classes)
    return RunFacts(
        path=path,
        recipe=recipe_from_fields(read_json(run.recipe_file), str(run.recipe_file)),
        environment=run.read_environment() or {},
        rows=run.read_metrics(),
        network=network,
        position=checkpoint.position,
        images=checkpoint.notes.get("data"),
        description=describe(network.arch, len(network.classes)),
        evaluation=evaluation,
        comparisons=run.read_comparisons(step),
        # The mistakes among them are those of the weights that were measured.
        samples=_samples(run, len(network.classes)) if evaluation else None,
    )


def _samples(run: RunDirectory, classes: int) -> Samples | None:
    """The images that an evaluation kept, if it did."""
    arrays = run.read_samples()
    if arrays is None:
        return None
    samples = Samples(**arrays)
    for labels in (samples.original_labels, samples.mistake_true, samples.mistake_predicted):
        if labels.size and labels.max() >= classes:
            raise RunError(f"{run.samples_file} is damaged: it has labels of no class")
    return samples
