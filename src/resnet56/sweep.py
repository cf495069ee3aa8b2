"""Search with Optuna for recipe settings that maximize the validation accuracy.

Several processes on one or more machines can work on the same sweep. They share only the database
that contains the trials. Each trial has a run directory for each seed. A sweep never uses the test
images.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import psutil

from resnet56.data.dataset import Dataset, training_split
from resnet56.errors import (
    MissingExtraError,
    NotFiniteError,
    RunError,
    TrainingError,
    UsageError,
    one_line,
    option,
)
from resnet56.files import StrPath
from resnet56.model import Architecture
from resnet56.progress import Output, TrainingDisplay, percent
from resnet56.recipe import Recipe
from resnet56.runs import schema
from resnet56.runs.directory import RunDirectory
from resnet56.runs.schema import EpochMetrics, Sweep, SweepTrial
from resnet56.training import CallbackError, train

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FILE = "sweep.json"
# Seconds between heartbeats of a worker. A worker without a heartbeat for twice this time counts as
# dead.
HEARTBEAT = 60
MAX_RETRIES = 5  # maximum number of retries for a trial whose workers died
MAX_COMBINATIONS = 10_000  # maximum size of a grid, and of combinations to check in advance
POLL = 1.0  # seconds between queries while other workers run the last trials
FIXED = ("seed", "val_size")  # fields that cannot vary in a sweep

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, sampled uniformly or log-uniformly."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choices:
    """A list of values."""

    values: tuple[Any, ...]


Space = Mapping[str, Range | Choices]


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
        recipe: the settings that do not vary. `val_size` must be above 0.
        space: the values of each field that varies.
        dataset: the data set. The sweep does not use its test images.
        out: directory of the sweep. The name of the directory is the name of the study.
        trials: number of trials, over all processes. If `grid` is True, this argument is ignored.
        seeds: seeds of each trial. The value of a trial is the mean over its seeds. By default, the
            seed of the recipe.
        grid: try all combinations of the choices. By default, Optuna's tree-structured Parzen
            estimator (TPE) suggests values.
        prune: stop a trial early if its validation accuracy is in the lower half after a quarter or
            half of the epochs (successive halving).
        storage: SQLAlchemy URL of a database. By default, the SQLite file `out/study.db`, which
            supports several processes on one machine.
        device, threads: as in `train`.
        base: a recipe and its name. The command that trains the best recipe starts from this
            recipe.
        output: shows a line per trial.
        heartbeat: number of seconds between heartbeats of a worker.

    Raises:
        UsageError: a setting is invalid, or the study has other settings.
        RunError: the storage does not respond, or a run cannot be written.
        MissingExtraError: Optuna is not installed.
        KeyboardInterrupt: the process received Ctrl-C or SIGTERM. The next call continues the
            current trial.
    """
    optuna = import_optuna()
    check_space(recipe, space, grid=grid)
    total = math.prod(len(c.values) for c in space.values() if isinstance(c, Choices))
    total = total if grid else trials
    if total < 1:
        raise UsageError(f"{option('trials')} must be at least 1, not {trials}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{option('seeds')} must be different, not {' '.join(map(str, seeds))}")
    try:
        recipes = [replace(recipe, seed=seed) for seed in seeds or (recipe.seed,)]
    except UsageError as error:
        raise UsageError(f"{option('seeds')}: {error}") from None
    withheld = without_test(dataset)
    training_split(withheld, recipe.val_size)  # raises if the data set is too small
    content: Sweep = {
        "study": Path(out).resolve().name,
        "recipe": recipe.to_json(),
        "data": dataset.source,
        "origin": dataset.origin,
        "fingerprint": withheld.fingerprint(),
        "space": {name: _described(values) for name, values in space.items()},
        "seeds": [one.seed for one in recipes],
        "grid": grid,
        "trials": [],
    }
    directory = _prepare(Path(out), content)
    with _storage_errors(), _quiet(optuna):
        study = _open_study(content, storage, directory, heartbeat)
        if not grid:
            sampler: Callable[[int], Any] = _tpe
        else:
            values = {name: [*map(_key, cast(Choices, c).values)] for name, c in space.items()}
            sampler_of_grid = optuna.samplers.GridSampler(values, seed=0)
            sampler = lambda _: sampler_of_grid  # noqa: E731
        study.sampler = sampler(0)
        if prune:
            # Half of the trials continue after a quarter of the epochs. Half of the remaining
            # trials continue after half of the epochs. Earlier pruning would favor settings that
            # converge fast.
            study.pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(1, recipe.epochs // 4), reduction_factor=2
            )
        else:
            study.pruner = optuna.pruners.NopPruner()
        worker = _Worker(
            study=study,
            sampler=sampler,
            space=space,
            recipes=recipes,
            dataset=withheld,
            directory=directory,
            content=content,
            base=base or ("", Recipe()),
            total=total,
            unique=grid,
            options={"device": device, "threads": threads},
            output=output or Output(),
            heartbeat=heartbeat,
        )
        return worker.work()


def import_optuna() -> ModuleType:
    """Import Optuna and disable its log. Raises MissingExtraError if Optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("Optuna", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    module: ModuleType = optuna
    return module


def without_test(dataset: Dataset) -> Dataset:
    """Return the data set with an empty test split."""
    train = dataset.train
    empty = replace(train, images=train.images[:0], labels=train.labels[:0])
    return replace(dataset, test=empty)


def check_space(recipe: Recipe, space: Space, *, grid: bool = False) -> None:
    """Raise UsageError if a field, a value or a combination of values is invalid."""
    types = get_type_hints(Recipe)
    if recipe.val_size == 0:
        raise UsageError(
            "a sweep needs validation images to compare trials; for example, set "
            f"{option('val_size', 5000)}"
        )
    if not space:
        raise UsageError(f"a sweep needs a setting to vary; use {option('vary')}")
    ends: dict[str, Sequence[Any]] = {}
    for name, values in space.items():
        if name in FIXED:
            hint = f"; use {option('seeds')}" if name == "seed" else ""
            raise UsageError(f"{name} cannot vary in a sweep{hint}")
        if isinstance(values, Choices):
            if not values.values:
                raise UsageError(f"{name}: the list of values is empty")
            if len(set(values.values)) < len(values.values):
                raise UsageError(f"{name}: a value is listed twice")
            ends[name] = values.values
        else:
            if types[name] not in (int, float):
                raise UsageError(f"{name} is not a number; list its values instead of a range")
            if grid:
                raise UsageError(
                    f"{option('grid', True)} needs a list of values for {name}, not a range"
                )
            if values.low >= values.high:
                raise UsageError(f"{name}: the range {values.low:g}..{values.high:g} is empty")
            if values.log and values.low <= 0:
                raise UsageError(
                    f"{name}: a logarithmic range must begin above 0, not at {values.low:g}"
                )
            ends[name] = (values.low, values.high)
        for value in ends[name]:
            _check_value(recipe, name, value)
    count = math.prod(map(len, ends.values()))
    if grid and count > MAX_COMBINATIONS:
        raise UsageError(
            f"the grid has {count:,} combinations, more than the limit of {MAX_COMBINATIONS:,}; "
            "list fewer values"
        )
    for combination in itertools.islice(itertools.product(*ends.values()), MAX_COMBINATIONS):
        settings = dict(zip(ends, combination, strict=True))
        try:
            replace(recipe, **settings)
        except UsageError as error:
            raise UsageError(
                f"the combination {format_settings(settings)} is invalid: {error}"
            ) from None


def _check_value(recipe: Recipe, name: str, value: Any) -> None:
    """Check the range of a value, but not requirements that depend on other fields."""
    if name == "arch":
        Architecture.parse(value)
    try:
        replace(recipe, **{name: value})
    except UsageError as error:
        if str(error).startswith(f"{name} must be"):
            raise


def train_command(base: tuple[str, Recipe], best: Recipe, data: str) -> str:
    """Return the command that trains the best recipe on all training images.

    Args:
        base: name of a recipe, and the recipe.
        best: recipe of the best trial.
        data: value of --data.
    """
    with contextlib.suppress(UsageError):  # several EMA decays require validation images
        best = replace(best, val_size=0)
    name, recipe = base
    words = ["resnet56", "train", *([name] if name else []), "--data", data]
    before = dataclasses.asdict(recipe)
    for field, value in dataclasses.asdict(best).items():
        if value == before[field]:
            continue
        flag = field.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)


def read_sweep(directory: Path) -> Sweep:
    """Read sweep.json. Raises RunError if the file is missing or damaged."""
    return schema.read(directory / FILE, Sweep)


def importance(content: Sweep) -> dict[str, float]:
    """Return the fraction of the variance of the accuracy that each setting explains (fANOVA).

    The function uses only completed trials. The result is empty if there are fewer than four
    completed trials, or if all have the same value.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    optuna = import_optuna()
    complete = [trial for trial in content["trials"] if trial["state"] == "complete"]
    if len(complete) < 4 or len({trial["value"] for trial in complete}) == 1:
        return {}
    distributions = {
        name: _distribution(optuna, name, _parsed(values))
        for name, values in content["space"].items()
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.create_trial(
                params={name: _key(value) for name, value in trial["settings"].items()},
                distributions=distributions,
                value=trial["value"],
            )
            for trial in complete
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return shares


# Convert the values of a field to and from the formats of Optuna and sweep.json.


def _key(value: Any) -> Scalar:
    """Return a value in the form that Optuna stores. Optuna cannot store tuples."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return cast(Scalar, value)


def _described(values: Range | Choices) -> dict[str, Any]:
    """Convert values to the format of sweep.json."""
    if isinstance(values, Range):
        return {"low": values.low, "high": values.high, "log": values.log}
    return {"choices": [list(v) if isinstance(v, tuple) else v for v in values.values]}


def _parsed(values: Mapping[str, Any]) -> Range | Choices:
    """Convert values from the format of sweep.json."""
    if "choices" in values:
        return Choices(tuple(map(_key, values["choices"])))
    return Range(values["low"], values["high"], values["log"])


def _distribution(optuna: ModuleType, name: str, values: Range | Choices) -> Any:
    if isinstance(values, Choices):
        return optuna.distributions.CategoricalDistribution([*map(_key, values.values)])
    if get_type_hints(Recipe)[name] is int:
        low, high = int(values.low), int(values.high)
        return optuna.distributions.IntDistribution(low, high, log=values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings on one line: {"lr": 0.1} -> "lr 0.1"."""
    return ", ".join(f"{name} {format_setting(value)}" for name, value in settings.items())


def format_setting(value: Any) -> str:
    """Format the value of a setting: 0.1234567 -> "0.1235", (16, 16) -> "16 16"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(_key(value)) or "none"


# Open the directory and the study.


def _prepare(out: Path, content: Sweep) -> Path:
    """Create the directory of the sweep, or check that it contains the same sweep."""
    if (out / FILE).exists():
        _require_same(content, cast(dict[str, Any], read_sweep(out)), str(out))
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise RunError(f"cannot use {out} for a sweep: {error.strerror or error}") from None
    # Another worker may have created the database and started the first trial.
    others = [n for n in others if not n.startswith(("study.db", "trial-")) and n[-4:] != ".tmp"]
    if others:
        raise RunError(
            f"{out} is not a sweep but contains files such as {others[0]}; choose another "
            f"directory for {option('out')}"
        )
    return out


COMPARED = ("recipe", "fingerprint", "space", "seeds", "grid")


def _require_same(content: Sweep, saved: Mapping[str, Any], place: str) -> None:
    """Raise UsageError if the settings of a sweep differ from saved settings."""
    new: dict[str, Any] = json.loads(json.dumps(content))
    remedy = f"to continue it, repeat its options; otherwise, choose another {option('out')}"
    for key in COMPARED:
        if new[key] == saved.get(key):
            continue
        if key == "fingerprint":
            difference = "other data"
        elif key == "recipe":
            old = saved["recipe"]
            changes = [f"{n} {old.get(n)} -> {v}" for n, v in new["recipe"].items() if v != old[n]]
            difference = f"another recipe ({', '.join(changes)})"
        elif key == "space":
            difference = f"other values to vary ({one_line(json.dumps(saved['space']))})"
        elif key == "seeds":
            difference = f"other seeds ({' '.join(map(str, saved['seeds']))})"
        else:
            difference = "a grid" if saved["grid"] else f"no {option('grid', True)}"
        raise UsageError(f"{place} contains a sweep with {difference}; {remedy}")


def _open_study(content: Sweep, url: str | None, directory: Path, heartbeat: int) -> "optuna.Study":
    """Open or create the study. Check its settings."""
    import optuna

    storage = _open_storage(url, directory, heartbeat)
    study = optuna.create_study(
        study_name=content["study"], storage=storage, direction="maximize", load_if_exists=True
    )
    # Store each setting as an attribute, because some databases limit the length of attributes.
    saved = study.user_attrs
    for key in COMPARED:
        if key not in saved:
            study.set_user_attr(key, content[key])  # type: ignore[literal-required]
    _require_same(content, study.user_attrs, f"the study {content['study']!r}")
    return study


def _open_storage(url: str | None, directory: Path, heartbeat: int) -> Any:
    """Open the database. Raises UsageError or RunError if this fails."""
    import sqlalchemy
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    if url is None:
        parsed = sqlalchemy.URL.create("sqlite", database=str(directory / "study.db"))
    else:
        try:
            parsed = sqlalchemy.make_url(url)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            raise UsageError(
                f"{option('storage')} must be a URL such as postgresql://user:password@host/name, "
                f"not {one_line(repr(url))}"
            ) from None
    dialect = parsed.get_backend_name()
    if dialect == "postgresql" and "+" not in parsed.drivername:
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string(hide_password=True)
    connect = {"timeout": 60} if dialect == "sqlite" else {"connect_timeout": 10}
    for attempt in itertools.count():
        try:
            return RDBStorage(
                # Double the braces, because Optuna calls `str.format` on the URL.
                parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
                engine_kwargs={"connect_args": connect, "pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
            )
        except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise UsageError(
                f"the driver for {parsed.drivername} is not installed: {one_line(error)}"
            ) from None
        except sqlalchemy.exc.DBAPIError as error:
            # If two workers create the tables at the same time, one of them can fail.
            if attempt == 2:
                reason = one_line(error.orig)
                raise RunError(f"the storage {shown} does not respond: {reason}") from None
            time.sleep(1)
        except RuntimeError as error:  # another version of Optuna has created the tables
            raise RunError(f"cannot use the storage {shown}: {one_line(error)}") from None
    raise AssertionError


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Convert database errors in the block to RunError."""
    import sqlalchemy
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = one_line(getattr(cause, "orig", None) or cause or error)
        raise RunError(
            f"the storage of the sweep does not respond: {reason}; run the same command again to "
            "continue"
        ) from error


@contextlib.contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Ignore Optuna's warnings about experimental functions, such as heartbeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _tpe(number: int) -> Any:
    """Return a sampler whose seed is the number of the trial.

    The suggestions of a single worker are then reproducible, and several workers get different
    suggestions.
    """
    import optuna

    # `constant_liar` makes workers avoid the settings of trials that other workers are running.
    return optuna.samplers.TPESampler(seed=number, constant_liar=True)


# Run the trials.


class _SurplusError(Exception):
    """The trial is not needed, because other workers started enough trials or the same trial."""


@dataclass
class _Worker:
    """One process that works on a study."""

    study: "optuna.Study"
    sampler: Callable[[int], Any]  # returns the sampler for the number of a trial
    space: Space
    recipes: Sequence[Recipe]  # one recipe per seed, without the settings of a trial
    dataset: Dataset
    directory: Path
    content: Sweep
    base: tuple[str, Recipe]
    total: int
    unique: bool  # whether to try each combination only once
    options: dict[str, Any]
    output: Output
    heartbeat: int

    def work(self) -> Sweep:
        """Run trials until enough trials are finished. Return the sweep."""
        self._save()
        waiting = False
        done = len(self._finished())
        if done:
            self.output.log(f"{done} of {self.total} trials are finished")
        while True:
            self._recover()
            trials = self._slots()
            finished = self._finished()
            states = [trial.state.name for trial in trials]
            if len(finished) >= self.total:
                return self._save()
            if "WAITING" in states or len(trials) < self.total:
                waiting = False
                self._run_trial()
            else:
                if not waiting:
                    self.output.log("waiting for the trials of other workers")
                waiting = True
                time.sleep(min(POLL, self.heartbeat))

    def _run_trial(self) -> None:
        """Run a trial and show its result."""
        self.number: int | None = None
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(_SurplusError,))
        except BaseException as error:
            trial = None if self.number is None else self.study.trials[self.number]
            if trial is None:
                raise
            if isinstance(error, Exception) and trial.number in self._superseded():
                self.output.log(f"another worker has taken over trial {_directory_number(trial)}")
                return
            if trial.state.name == "FAIL":
                self._retry(trial)
            self._save()
            raise
        assert self.number is not None
        trial = self.study.trials[self.number]
        if trial.state.name != "FAIL":
            content = self._save()
            self.output.log(_line(trial, content))

    def _objective(self, trial: "optuna.Trial") -> float:
        """Train with the settings of a trial. Return the mean validation accuracy."""
        from optuna.exceptions import TrialPruned

        self.number = trial.number
        number = trial.user_attrs.get("directory", trial.number)
        trial.set_user_attr("worker", _this_process())
        trial.set_user_attr("directory", number)
        self.study.sampler = self.sampler(trial.number)
        settings = {name: self._suggest(trial, name) for name in self.space}
        if self._is_surplus(trial):
            trial.set_user_attr("surplus", True)
            raise _SurplusError
        accuracies: list[float] = []
        for index in range(len(self.recipes)):
            recipe = replace(self.recipes[index], **settings)
            try:
                accuracies.append(self._train(trial, number, recipe, index))
            except (TrainingError, NotFiniteError) as error:
                trial.set_user_attr("diverged", one_line(error))
                raise TrialPruned from error
            trial.set_user_attr("accuracies", accuracies)
        return statistics.fmean(accuracies)

    def _suggest(self, trial: "optuna.Trial", name: str) -> Any:
        values = self.space[name]
        if isinstance(values, Choices):
            found = trial.suggest_categorical(name, [*map(_key, values.values)])
            return next(value for value in values.values if _key(value) == found)
        if get_type_hints(Recipe)[name] is int:
            return trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
        return trial.suggest_float(name, values.low, values.high, log=values.log)

    def _train(self, trial: "optuna.Trial", number: int, recipe: Recipe, index: int) -> float:
        """Train with one seed. Report the validation accuracy of each epoch to Optuna."""
        from optuna.exceptions import TrialPruned

        suffix = f"-seed{recipe.seed}" if len(self.recipes) > 1 else ""
        run = RunDirectory(self.directory / f"trial-{number:04d}{suffix}")
        last = recipe.epochs * len(self.recipes)
        accuracy = math.nan

        def report(row: EpochMetrics) -> None:
            nonlocal accuracy
            accuracy = row["val_accuracy"]
            step = index * recipe.epochs + row["epoch"]
            trial.report(accuracy, step)
            if step < last and trial.should_prune():
                raise TrialPruned

        resume = run.checkpoint_file.exists()
        if resume:
            epochs = run.load().progress.epoch
            for row in run.read_metrics()[:epochs]:
                report(row)
        display = TrainingDisplay(_Status(self.output, f"trial {number}{suffix}"))
        with display:
            try:
                train(
                    recipe,
                    self.dataset,
                    run.path,
                    resume=resume,
                    progress=display,
                    callbacks=[report],
                    **self.options,
                )
            except CallbackError as error:
                raise error.__cause__ or error from None
        return accuracy

    # Count the trials.

    def _superseded(self) -> set[int]:
        """Return the numbers of trials that other trials have retried or will retry."""
        trials = self.study.get_trials(deepcopy=False)
        return {n for trial in trials for n in trial.system_attrs.get("retry_history", [])}

    def _slots(self) -> list["FrozenTrial"]:
        """Return the trials that count. Surplus and superseded trials do not count."""
        superseded = self._superseded()
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.number not in superseded and "surplus" not in trial.user_attrs
        ]

    def _finished(self) -> list["FrozenTrial"]:
        """Return the finished trials, including trials that failed too often."""
        return [trial for trial in self._slots() if trial.state.is_finished()]

    def _is_surplus(self, trial: "optuna.Trial") -> bool:
        """Return whether trials with lower numbers make this trial unnecessary."""
        earlier = [other for other in self._slots() if other.number < trial.number]
        if len(earlier) >= self.total:
            return True
        return self.unique and any(other.params == trial.params for other in earlier)

    # Recover the trials of dead workers.

    def _recover(self) -> None:
        """Queue the trials of dead workers for a retry."""
        import optuna

        optuna.storages.fail_stale_trials(self.study)  # finds dead workers by their heartbeats
        # Find dead workers on this machine by their processes, without waiting for heartbeats.
        for trial in self.study.get_trials(deepcopy=False, states=(_state("RUNNING"),)):
            worker = trial.user_attrs.get("worker")
            if worker is not None:
                dead = worker["host"] == platform.node() and not _is_alive(worker)
            else:  # the worker may have died before its first heartbeat
                assert trial.datetime_start is not None
                age = time.time() - trial.datetime_start.timestamp()
                dead = age > 10 * self.heartbeat
            if dead:
                with contextlib.suppress(ValueError):  # another worker has already queued the trial
                    self._retry(self.study.tell(trial.number, state=_state("FAIL")))

    def _retry(self, trial: "FrozenTrial") -> None:
        """Queue a failed trial for a retry. The retry continues from the checkpoint."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback

        RetryHeartbeatStaleTrialCallback()(self.study, trial)

    # Write sweep.json.

    def _save(self) -> Sweep:
        """Write sweep.json with all trials. Return its content."""
        trials = [_record(trial) for trial in self._slots()]
        trials = [trial for trial in trials if trial["settings"].keys() == self.space.keys()]
        for trial in trials:
            for name, values in self.space.items():
                if isinstance(values, Choices):
                    found = trial["settings"][name]
                    value = next(v for v in values.values if _key(v) == found)
                    trial["settings"][name] = list(value) if isinstance(value, tuple) else value
        content: Sweep = {**self.content, "trials": sorted(trials, key=lambda t: t["number"])}
        complete = [trial for trial in content["trials"] if trial["state"] == "complete"]
        if complete:
            best = max(complete, key=lambda trial: trial["value"])
            recipe = replace(self.recipes[0], **best["settings"])
            content["best"] = best["number"]
            content["command"] = train_command(self.base, recipe, self.content["origin"])
        schema.write(self.directory / FILE, content, Sweep)
        return content


class _Status(Output):
    """Shows only the status line of a trial."""

    def __init__(self, output: Output, label: str) -> None:
        self.output, self.label = output, label

    def status(self, label: str, fraction: float, text: str) -> None:
        """Show the status after the name of the trial."""
        self.output.status(f"{self.label}, {label}", fraction, text)

    def end(self) -> None:
        """Remove the status."""
        self.output.end()


def _record(trial: "FrozenTrial") -> SweepTrial:
    """Convert a trial to the format of sweep.json."""
    states = {"FAIL": "failed", "COMPLETE": "complete", "PRUNED": "pruned"}
    record: dict[str, Any] = {
        "number": _directory_number(trial),
        "state": states.get(trial.state.name, "unfinished"),
        "settings": dict(trial.params),
        "epochs": [value for _, value in sorted(trial.intermediate_values.items())],
        "accuracies": trial.user_attrs.get("accuracies", []),
    }
    if trial.state.name == "COMPLETE":
        record["value"] = trial.value
    if "diverged" in trial.user_attrs:
        record["error"] = trial.user_attrs["diverged"]
    return cast(SweepTrial, record)


def _line(trial: "FrozenTrial", content: Sweep) -> str:
    """Return a line that describes a finished trial."""
    number = _directory_number(trial)
    if trial.state.name == "COMPLETE":
        result = percent(cast(float, trial.value))
    elif "diverged" in trial.user_attrs:
        result = "diverged"
    else:
        result = f"pruned after epoch {max(trial.intermediate_values)}"
    best = next((t for t in content["trials"] if t["number"] == content.get("best")), None)
    suffix = f"; best {percent(best['value'])}, trial {best['number']}" if best else ""
    return f"trial {number}: {result} ({format_settings(trial.params)}){suffix}"


def _directory_number(trial: "FrozenTrial") -> int:
    """Return the trial number that users see. A retry has the same number as the first attempt."""
    return int(trial.user_attrs.get("directory", trial.number))


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_alive(worker: Mapping[str, Any]) -> bool:
    """Return whether the process of a worker on this machine still exists."""
    try:
        return bool(psutil.Process(worker["pid"]).create_time() == worker["started"])
    except psutil.Error:
        return False
