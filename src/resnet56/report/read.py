"""A run directory's files, read once and checked, as one record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resnet56.errors import RunError
from resnet56.files import read_json
from resnet56.model import Description, describe
from resnet56.recipe import Recipe
from resnet56.recipe import from_fields as recipe_from_fields
from resnet56.runs.checkpoint import Network, Position
from resnet56.runs.directory import RunDirectory

Array = npt.NDArray[Any]

ROW = ("epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "seconds")
METRICS = (
    *("accuracy", "accuracy_interval", "top2", "top3", "loss", "n", "confusion_matrix"),
    *("per_class", "macro", "weighted", "most_confused", "calibration"),
)
COMPARISON = (
    *("a", "b", "images", "accuracy_a", "accuracy_b", "changed"),
    *("median_difference", "largest_difference", "verdict"),
)
ROBUSTNESS = ("images", "severities", "clean_accuracy", "mean_accuracy", "corruptions")
SPEED = ("milliseconds_an_image", "images_per_second")


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
    environment: dict[str, Any]  # empty if the run kept none
    rows: list[dict[str, Any]]  # metrics.jsonl, a row an epoch
    network: Network
    position: Position
    images: str | None  # the data's fingerprint, where the checkpoint knows it
    description: Description
    evaluation: dict[str, Any] | None  # of these weights: one made earlier in the training is not
    parity: dict[str, Any] | None  # the same
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
    def test(self) -> dict[str, Any] | None:
        """The metrics on the test images, once there are any."""
        return self.evaluation["test"] if self.evaluation else None

    @property
    def train(self) -> dict[str, Any] | None:
        """The metrics on the training images without augmentation, once there are any."""
        return self.evaluation.get("train") if self.evaluation else None

    @property
    def holdout(self) -> dict[str, Any] | None:
        """The metrics on the held-out images, where there are any."""
        return self.evaluation.get("holdout") if self.evaluation else None

    @property
    def source(self) -> str | None:
        """The sentence that says which images these are."""
        data = self.environment.get("data")
        said = data.get("source") if isinstance(data, dict) else None
        return said or (self.evaluation or {}).get("data")

    @property
    def mirrors(self) -> bool:
        """Whether training images were mirrored, as the run recorded it."""
        data = self.environment.get("data")
        recorded = data.get("mirrored") if isinstance(data, dict) else None
        return self.recipe.flip if recorded is None else bool(recorded)

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
    rows = run.read_metrics()
    for number, row in enumerate(rows, start=1):
        _require(row, ROW, f"{run.metrics_file}:{number}")
    if not run.recipe_file.exists():
        raise RunError(
            f"{path} was not trained here (it has no recipe.json), so there is nothing to report; "
            f"resnet56 evaluate {path} --data DIR measures it"
        )
    step = checkpoint.position.step
    evaluation = run.read_evaluation(step)
    if evaluation is not None:
        _check_evaluation(evaluation, run.evaluation_file, checkpoint.network.classes)
    parity = _optional(path / "parity.json")
    if parity is not None:
        _require(parity, ("comparisons",), str(path / "parity.json"))
        for comparison in parity["comparisons"]:
            _require(comparison, COMPARISON, f"{path / 'parity.json'}, comparisons,")
        of_these = [one for one in parity["comparisons"] if one.get("step", step) == step]
        parity = {"comparisons": of_these} if of_these else None
    return RunFacts(
        path=path,
        recipe=recipe_from_fields(read_json(run.recipe_file), str(run.recipe_file)),
        environment=_optional(run.environment_file) or {},
        rows=rows,
        network=checkpoint.network,
        position=checkpoint.position,
        images=checkpoint.notes.get("data"),
        description=describe(checkpoint.network.arch, len(checkpoint.network.classes)),
        evaluation=evaluation,
        parity=parity,
        samples=_samples(path / "samples.npz", len(checkpoint.network.classes))
        if evaluation
        else None,  # its mistakes are those of the weights that were measured
    )


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _require(content: Any, names: tuple[str, ...], where: str) -> None:
    """RunError if `content` is no object with all of `names`."""
    if not isinstance(content, dict):
        raise RunError(f"{where} is damaged: it holds no JSON object")
    for name in names:
        if name not in content:
            raise RunError(f"{where} is damaged: {name} is missing")


def _check_evaluation(evaluation: dict[str, Any], file: Path, classes: tuple[str, ...]) -> None:
    _require(evaluation, ("test", "weights", "epoch", "step", "device", "precision"), str(file))
    for part in ("test", "train", "holdout"):
        if part in evaluation:
            metrics = evaluation[part]
            _require(metrics, METRICS, f"{file}, {part},")
            _require(metrics["per_class"], classes, f"{file}, {part}, per_class,")
            matrix = metrics["confusion_matrix"]
            rows = matrix if isinstance(matrix, list) else []
            sizes = [len(row) if isinstance(row, list) else 0 for row in rows]
            if sizes != [len(classes)] * len(classes):
                raise RunError(
                    f"{file}, {part}, is damaged: its confusion matrix is not of "
                    f"{len(classes)} classes"
                )

    if evaluation.get("robustness"):
        _require(evaluation["robustness"], ROBUSTNESS, f"{file}, robustness,")
    for name, figures in (evaluation.get("speed") or {}).items():
        if name.startswith("batch_"):
            _require(figures, SPEED, f"{file}, speed, {name},")


def _samples(path: Path, classes: int) -> Samples | None:
    """The pictures, if they were kept."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            samples = Samples(**{name: file[name] for name in Samples.__dataclass_fields__})
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damage can make the readers of zip and npy raise anything
        raise RunError(f"{path} is damaged: {error}") from None
    shown, made = len(samples.originals), len(samples.mistakes)
    labels = (samples.original_labels, samples.mistake_true, samples.mistake_predicted)
    good = (
        samples.originals.shape[1:] == samples.mistakes.shape[1:] == (3, 32, 32)
        and (samples.augmented.shape[0], *samples.augmented.shape[2:]) == (shown, 3, 32, 32)
        and len(samples.original_labels) == shown
        and all(
            len(getattr(samples, f"mistake_{name}")) == made
            for name in ("index", "true", "predicted", "confidence")
        )
        and all(not part.size or (part.min() >= 0 and part.max() < classes) for part in labels)
    )
    if not good:
        raise RunError(f"{path} is damaged: its arrays do not fit together")
    return samples
