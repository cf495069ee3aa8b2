"""The results of a sweep: sweep.json, the best trial, and the command that trains it."""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from resnet56.errors import UsageError
from resnet56.progress import percent
from resnet56.recipe import Recipe
from resnet56.runs import schema
from resnet56.runs.schema import Sweep, SweepTrial
from resnet56.sweep.space import Choices, Space, format_settings

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FILE = "sweep.json"


def read_sweep(directory: Path) -> Sweep:
    """Read sweep.json. Raises RunError if the file is missing or damaged."""
    return schema.read(directory / FILE, Sweep)


def write_sweep(directory: Path, content: Sweep) -> None:
    """Replace sweep.json. Raises RunError if writing fails."""
    schema.write(directory / FILE, content, Sweep)


def with_trials(
    content: Sweep,
    trials: Iterable["FrozenTrial"],
    space: Space,
    recipe: Recipe,
    base: tuple[str, Recipe],
) -> Sweep:
    """Return the content of sweep.json: settings, trials, the best trial, and its training command.

    Args:
        content: the settings of the sweep.
        trials: the trials. Trials without a value for every field are omitted.
        space: the values of each field that varies.
        recipe: the settings that do not vary.
        base: a pair (name, recipe). The command is based on this recipe.
    """
    records = [_record(trial, space) for trial in trials if trial.params.keys() == space.keys()]
    result: Sweep = {**content, "trials": sorted(records, key=lambda record: record["number"])}
    complete = [record for record in result["trials"] if record["state"] == "complete"]
    if complete:
        best = max(complete, key=lambda record: record["value"])
        result["best"] = best["number"]
        best_recipe = replace(recipe, **best["settings"])
        result["command"] = train_command(base, best_recipe, content["origin"])
    return result


def _record(trial: "FrozenTrial", space: Space) -> SweepTrial:
    """Convert a trial to the format of sweep.json."""
    states = {"FAIL": "failed", "COMPLETE": "complete", "PRUNED": "pruned"}
    settings = dict(trial.params)
    for name, values in space.items():
        if isinstance(values, Choices):
            value = values.find(settings[name])
            settings[name] = list(value) if isinstance(value, tuple) else value
    record: dict[str, Any] = {
        "number": trial_number(trial),
        "state": states.get(trial.state.name, "unfinished"),
        "settings": settings,
        "epochs": [value for _, value in sorted(trial.intermediate_values.items())],
        "accuracies": trial.user_attrs.get("accuracies", []),
    }
    if trial.state.name == "COMPLETE":
        record["value"] = trial.value
    if "diverged" in trial.user_attrs:
        record["error"] = trial.user_attrs["diverged"]
    return cast(SweepTrial, record)


def trial_number(trial: "FrozenTrial | optuna.Trial") -> int:
    """Return the trial number that users see. A retry has the same number as the first attempt."""
    return int(trial.user_attrs.get("directory", trial.number))


def describe_trial(trial: "FrozenTrial", content: Sweep) -> str:
    """Return a line that describes a finished trial and the best trial."""
    if trial.state.name == "COMPLETE":
        result = percent(cast(float, trial.value))
    elif "diverged" in trial.user_attrs:
        result = "diverged"
    else:
        result = f"pruned after epoch {max(trial.intermediate_values)}"
    best = next((t for t in content["trials"] if t["number"] == content.get("best")), None)
    suffix = f"; best {percent(best['value'])}, trial {best['number']}" if best else ""
    return f"trial {trial_number(trial)}: {result} ({format_settings(trial.params)}){suffix}"


def train_command(base: tuple[str, Recipe], best: Recipe, data: str) -> str:
    """Return the command that trains the best recipe on all training images.

    Args:
        base: a pair (name, recipe). The command is based on this recipe.
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
