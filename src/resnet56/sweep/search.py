"""Run a sweep."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resnet56.data.dataset import Dataset, training_split
from resnet56.errors import UsageError, option
from resnet56.files import StrPath
from resnet56.progress import Output
from resnet56.recipe import Recipe
from resnet56.runs.schema import Sweep
from resnet56.sweep.sampling import grid_sampler, halving_pruner, tpe_sampler
from resnet56.sweep.space import Space, check_space, grid_size, to_json
from resnet56.sweep.storage import (
    ignore_experimental_warnings,
    import_optuna,
    open_study,
    prepare_directory,
    storage_errors,
)
from resnet56.sweep.trials import Trials
from resnet56.sweep.worker import Worker

# Seconds between heartbeats of a worker. A worker without a heartbeat for twice this time is
# considered dead.
HEARTBEAT = 60


def sweep(
    recipe: Recipe,
    space: Space,
    dataset: Dataset,
    out: StrPath,
    *,
    trials: int = 20,
    seeds: Sequence[int] = (),
    grid: bool = False,
    prune: bool = True,
    storage: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    base: tuple[str, Recipe] | None = None,
    output: Output | None = None,
    heartbeat: int = HEARTBEAT,
) -> Sweep:
    """Train with different settings. Return all trials and the number of the best trial.

    To continue an interrupted sweep, call this function again. Several processes can call the
    function at the same time, with the same `out` or the same `storage`.

    Args:
        recipe: the settings that do not vary. `val_size` must be positive.
        space: the values of each field that varies.
        dataset: the data set. The sweep does not use its test images.
        out: directory of the sweep. The name of the directory is the name of the study.
        trials: number of trials across all processes. If `grid` is True, this argument is ignored.
        seeds: seeds for each trial. The value of a trial is the mean validation accuracy over its
            seeds. By default, the seed of the recipe.
        grid: try all combinations of the choices. By default, Optuna's tree-structured Parzen
            estimator (TPE) suggests values.
        prune: repeatedly stop the half of the remaining trials with the lower validation accuracies
            (successive halving). The sweep compares trials after a quarter of the epochs, and again
            whenever the number of epochs, summed over the seeds, has doubled.
        storage: SQLAlchemy URL of a database. By default, the SQLite file `out/study.db`, which
            supports several processes on one machine.
        device, threads: as in `train`.
        base: a pair (name, recipe). The command for training the best recipe is based on this
            recipe.
        output: display that shows a line per trial.
        heartbeat: number of seconds between heartbeats of a worker.

    Raises:
        UsageError: a setting is invalid, or differs from the settings of the study.
        RunError: the storage does not respond, or a run cannot be written.
        MissingExtraError: Optuna is not installed.
        KeyboardInterrupt: the process received Ctrl-C or SIGTERM. The next call continues the
            current trial.
    """
    optuna = import_optuna()
    check_space(recipe, space, grid=grid)
    total = grid_size(space) if grid else trials
    if total < 1:
        raise UsageError(f"{option('trials')} must be at least 1, not {trials}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{option('seeds')} must be distinct, not {' '.join(map(str, seeds))}")
    try:
        recipes = [replace(recipe, seed=seed) for seed in seeds or (recipe.seed,)]
    except UsageError as error:
        raise UsageError(f"{option('seeds')}: {error}") from None
    withheld = without_test(dataset)
    training_split(withheld, recipe.val_size)  # raises an error if the data set is too small
    content: Sweep = {
        "study": Path(out).resolve().name,
        "recipe": recipe.to_json(),
        "data": dataset.source,
        "origin": dataset.origin,
        "fingerprint": withheld.fingerprint(),
        "space": {name: to_json(values) for name, values in space.items()},
        "seeds": [one.seed for one in recipes],
        "grid": grid,
        "trials": [],
    }
    directory = Path(out)
    prepare_directory(directory, content)
    with storage_errors(), ignore_experimental_warnings():
        study = open_study(content, storage, directory, heartbeat)
        sampler: Callable[[int], Any] = tpe_sampler
        if grid:
            shared = grid_sampler(space)
            sampler = lambda _: shared  # noqa: E731
        study.sampler = sampler(0)
        study.pruner = halving_pruner(recipe.epochs) if prune else optuna.pruners.NopPruner()
        worker = Worker(
            trials=Trials(study, total, unique=grid, heartbeat=heartbeat),
            sampler=sampler,
            space=space,
            recipes=recipes,
            dataset=withheld,
            directory=directory,
            content=content,
            base=base or ("", Recipe()),
            options={"device": device, "threads": threads},
            output=output or Output(),
        )
        return worker.work()


def without_test(dataset: Dataset) -> Dataset:
    """Return the data set with an empty test split."""
    train = dataset.train
    empty = replace(train, images=train.images[:0], labels=train.labels[:0])
    return replace(dataset, test=empty)
