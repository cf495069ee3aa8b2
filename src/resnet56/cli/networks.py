"""Functions that several commands share: load the data of a network, and evaluate the network."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from resnet56 import recipe as recipes
from resnet56.cli.common import for_classes, load_data, say, show_progress
from resnet56.errors import Error, UsageError

if TYPE_CHECKING:
    from resnet56.classifiers import Network
    from resnet56.data.augment import Augmentation
    from resnet56.data.dataset import Dataset, Split
    from resnet56.recipe import Recipe
    from resnet56.report.read import RunFacts
    from resnet56.runs.directory import RunDirectory
    from resnet56.runs.schema import Environment, Evaluation

ROBUSTNESS = 500  # default number of test images in the robustness test


def data_for(network: "Network", data: str | None, *, skip_broken: bool = False) -> "Dataset":
    """Load a data set, and match its labels to the classes of a network.

    By default, load the data set of the network's run.

    Raises:
        UsageError: no data set is given, or the data set contains none of the classes.
        DataError: the data set cannot be read.
    """
    run = network.run
    own = run.data_origin() if run else None
    if data is None and (run is None or (own is None and run.is_imported())):
        reason = "not a run" if run is None else "an imported network without a data set"
        raise UsageError(
            f"{network.path} is {reason}, so --data is required: the name of a data set or a "
            "directory"
        )
    dataset = load_data(data, own=own, evaluation=True, skip_broken=skip_broken)
    return for_classes(dataset, network.config.classes)


def require_images(split: "Split", name: str) -> "Split":
    """Return the split, or raise UsageError if it is empty."""
    if not len(split):
        raise UsageError(
            f"the data set has no {name} images of the model's classes; choose another data set "
            "or another --split"
        )
    return split


def evaluate_and_save(
    network: "Network", dataset: "Dataset", *, robustness: int, split: str = "test"
) -> "Evaluation":
    """Evaluate a run's network on the run's data set, save the results, and return them.

    Args:
        network: a network that belongs to a run.
        dataset: the data set of the run.
        robustness: number of test images in the robustness test, or 0 for no test.
        split: the requested split.

    Raises:
        UsageError: `split` contains no images.
    """
    from resnet56.evaluation import EvaluatedModel, evaluate_checkpoint, measure_extras
    from resnet56.files import read_json

    run, classifier = network.run, network.classifier
    assert run is not None
    assert isinstance(classifier, EvaluatedModel)
    recipe = None
    if not run.is_imported():
        recipe = recipes.from_fields(read_json(run.recipe_file), str(run.recipe_file))
    val_size = recipe.val_size if recipe else 0
    if split == "validation" and val_size == 0:
        raise UsageError(f"{run.path} has no validation images; train with --val-size N")
    if split == "train":
        require_images(dataset.train, "train")
    require_images(dataset.test, "test")
    evaluation = evaluate_checkpoint(
        run,
        network.checkpoint,
        classifier,
        dataset,
        val_size=val_size,
        augmentation=_augmentation(recipe, dataset),
        progress=show_progress,
    )
    measure_extras(evaluation, classifier, dataset.test, robustness, show_progress)
    run.write_evaluation(evaluation)
    return evaluation


def _augmentation(recipe: "Recipe | None", dataset: "Dataset") -> "Augmentation":
    """Return the augmentation for sample images.

    Without a recipe, return a default augmentation, which the report does not show.
    """
    from resnet56.data.augment import CROP_AND_FLIP
    from resnet56.training import augmentation_of

    if recipe is None:
        return CROP_AND_FLIP
    return augmentation_of(recipe, allow_flip=dataset.allow_flip)


def read_networks(
    names: Sequence[str],
    data: str | None,
    *,
    skip_broken: bool = False,
    on_error: Callable[[Error], None] | None = None,
) -> "list[RunFacts]":
    """Read the results of runs, and evaluate other networks on a data set.

    With --data, an imported network without results is also evaluated, and its results are saved.
    If there are several networks, those that are not runs are evaluated only on the test images.

    Args:
        names: names or paths of networks.
        data: the value of --data. By default, networks are evaluated on the data set of the first
            run.
        skip_broken: the value of --skip-broken.
        on_error: called with the error for each unreadable network, if there are several networks.
            By default, the error is raised.

    Raises:
        UsageError: --data is required but missing, or --data or --skip-broken is given but not
            used.
        Error: a network cannot be read.
    """
    from resnet56.report.read import read_run
    from resnet56.runs.sources import find_run

    errors: list[Error] = []

    def handle(error: Error) -> None:
        if on_error is None or len(names) == 1:
            raise error
        on_error(error)
        errors.append(error)

    runs: list[tuple[str, RunDirectory | None]] = []
    for name in names:
        try:
            runs.append((name, find_run(name)))
        except Error as error:
            handle(error)
    pending = [run is None or (data is not None and _lacks_results(run)) for _, run in runs]
    if (data is not None or skip_broken) and runs and not any(pending):
        flag = "--data" if data is not None else "--skip-broken"
        raise UsageError(
            f"{flag} is not used, because the report shows the saved results of runs; to evaluate "
            "a run, use resnet56 evaluate"
        )
    found = []
    for (name, run), is_pending in zip(runs, pending, strict=True):
        try:
            if run is not None and not is_pending:
                found.append(read_run(run.path))
                continue
            if data is None:
                data = next((o for _, r in runs if r and (o := r.data_origin())), None)
                if data is not None:
                    say(f"evaluating on the data set of the first run: {data}")
            all_images = len(names) == 1
            found.append(_evaluate(name, data, skip_broken=skip_broken, all_images=all_images))
        except Error as error:
            handle(error)
    if errors and not found:
        raise errors[-1]
    return found


def _lacks_results(run: "RunDirectory") -> bool:
    """Return whether a run is an imported network that has not been evaluated."""
    return run.is_imported() and not run.evaluation_file.exists()


def _evaluate(name: str, data: str | None, *, skip_broken: bool, all_images: bool) -> "RunFacts":
    """Evaluate a network, and save the results if it is an imported network.

    Args:
        name: name or path of the network.
        data: the value of --data.
        skip_broken: the value of --skip-broken.
        all_images: whether to evaluate the training images, and to measure speed and robustness.
    """
    from resnet56.classifiers import open_network
    from resnet56.evaluation import measure, measure_extras
    from resnet56.report.read import facts_from_results, read_run
    from resnet56.runtime import Precision, environment

    network = open_network(name)
    dataset = data_for(network, data, skip_broken=skip_broken)
    if network.run is not None:
        if not network.has_own_data(dataset):
            raise UsageError(f"--data is not the data set of {name}; omit --data")
        evaluate_and_save(network, dataset, robustness=ROBUSTNESS)
        return read_run(network.run.path)
    classifier, test = network.classifier, require_images(dataset.test, "test")
    recipe = _recipe(network)
    results = measure(
        classifier,
        dataset,
        network.weights,
        training=all_images,
        augmentation=_augmentation(recipe, dataset),
        progress=show_progress,
    )
    if all_images:
        measure_extras(results.evaluation, classifier, test, ROBUSTNESS, show_progress)
    machine = environment(classifier.device, cast(Precision, classifier.precision))
    origin = {"origin": dataset.origin, "source": dataset.source}
    return facts_from_results(
        network.path,
        network.config,
        results,
        environment=cast("Environment", machine | {"data": origin}),
        fingerprint=dataset.fingerprint(),
        recipe=recipe,
    )


def _recipe(network: "Network") -> "Recipe | None":
    """Return the recipe of pretrained weights, or None for other networks."""
    if network.weights["weights"] != "pretrained":
        return None
    from resnet56.runs import pretrained

    name = str(network.path)
    recipe = pretrained.card(name).get("recipe")
    return recipes.from_fields(recipe, name) if recipe else None
