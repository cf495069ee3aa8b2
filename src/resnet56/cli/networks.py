"""Evaluation of a network on a data set, for several commands."""

from typing import TYPE_CHECKING

from resnet56 import recipe as recipes
from resnet56.cli.common import for_classes, load_data, show_progress
from resnet56.errors import UsageError

if TYPE_CHECKING:
    from resnet56.classifiers import Network
    from resnet56.data.dataset import Dataset, Split
    from resnet56.runs.schema import Evaluation

ROBUSTNESS = 500  # default number of test images in the robustness test


def data_for(network: "Network", data: str | None, *, skip_broken: bool = False) -> "Dataset":
    """Load a data set with the classes of a network. By default, load the data of its run.

    Raises:
        UsageError: there is no data set, or it has none of the classes.
        DataError: the data set cannot be read.
    """
    run = network.run
    own = run.data_origin() if run else None
    if data is None and (run is None or (own is None and run.is_imported())):
        reason = "not a run" if run is None else "an imported network without data"
        raise UsageError(f"{network.path} is {reason}, so --data is required")
    dataset = load_data(data, own=own, evaluation=True, skip_broken=skip_broken)
    return for_classes(dataset, network.config.classes)


def require_images(split: "Split", name: str) -> "Split":
    """Return the split, or raise UsageError if it is empty."""
    if not len(split):
        raise UsageError(
            f"the data set has no {name} images of the model's classes; choose another data set or "
            "--split"
        )
    return split


def evaluate_run(
    network: "Network", dataset: "Dataset", *, robustness: int, split: str = "test"
) -> "Evaluation":
    """Evaluate the network of a run on its own data and save the results.

    Args:
        network: a network that belongs to a run.
        dataset: the data set of the run.
        robustness: number of test images in the robustness test, or 0 for no test.
        split: the requested split.

    Raises:
        UsageError: there are no images of `split`.
    """
    from resnet56 import evaluation
    from resnet56.data.augment import CROP_AND_FLIP
    from resnet56.evaluation import EvaluatedModel
    from resnet56.files import read_json
    from resnet56.training import augmentation_of

    run, classifier = network.run, network.classifier
    assert run is not None
    assert isinstance(classifier, EvaluatedModel)
    val_size, augmentation = 0, CROP_AND_FLIP
    if not run.is_imported():
        recipe = recipes.from_fields(read_json(run.recipe_file), str(run.recipe_file))
        val_size = recipe.val_size
        augmentation = augmentation_of(recipe, allow_flip=dataset.allow_flip)
    if split == "validation" and val_size == 0:
        raise UsageError(f"{run.path} has no validation images; train with --val-size N")
    if split == "train":
        require_images(dataset.train, "train")
    require_images(dataset.test, "test")
    device, precision = classifier.device, classifier.precision
    evaluation.evaluate_run(
        run,
        dataset,
        device=device,
        precision=precision,
        val_size=val_size,
        augmentation=augmentation,
        progress=show_progress,
    )
    return evaluation.measure_extras(
        run,
        dataset,
        device=device,
        precision=precision,
        robustness=min(robustness, len(dataset.test)),
        progress=show_progress,
    )
