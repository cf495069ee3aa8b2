"""The search space: the values that the fields of a recipe take in the trials of a sweep."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from resnet56.errors import UsageError, option
from resnet56.model import Architecture
from resnet56.recipe import Recipe

if TYPE_CHECKING:
    import optuna

MAX_COMBINATIONS = 10_000  # maximum size of a grid, and of combinations to check in advance
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

    def stored(self) -> list[Scalar]:
        """Return the values in the form that Optuna stores."""
        return [*map(to_scalar, self.values)]

    def find(self, stored: object) -> Any:
        """Return the value whose representation in Optuna is `stored`."""
        return next(value for value in self.values if to_scalar(value) == stored)


Space = Mapping[str, Range | Choices]


def check_space(recipe: Recipe, space: Space, *, grid: bool = False) -> None:
    """Raise UsageError if a field, a value or a combination of values is invalid."""
    types = get_type_hints(Recipe)
    if recipe.val_size == 0:
        raise UsageError(
            "a sweep requires validation images to compare trials; for example, set "
            f"{option('val_size', 5000)}"
        )
    if not space:
        raise UsageError(f"a sweep requires a setting to vary; use {option('vary')}")
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
                    f"{option('grid', True)} requires a list of values for {name}, not a range"
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


def grid_size(space: Space) -> int:
    """Return the number of combinations of the choices."""
    return math.prod(len(c.values) for c in space.values() if isinstance(c, Choices))


# Convert values to and from the formats of Optuna and sweep.json.


def to_scalar(value: Any) -> Scalar:
    """Return a value in the form that Optuna stores. Optuna cannot store tuples."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return cast(Scalar, value)


def suggest(trial: "optuna.Trial", name: str, values: Range | Choices) -> Any:
    """Return the value that Optuna suggests for a field in a trial."""
    if isinstance(values, Choices):
        return values.find(trial.suggest_categorical(name, values.stored()))
    if get_type_hints(Recipe)[name] is int:
        return trial.suggest_int(name, int(values.low), int(values.high), log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def distribution(name: str, values: Range | Choices) -> Any:
    """Return the Optuna distribution of a field."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choices):
        return CategoricalDistribution(values.stored())
    if get_type_hints(Recipe)[name] is int:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def to_json(values: Range | Choices) -> dict[str, Any]:
    """Convert values to the format of sweep.json."""
    if isinstance(values, Range):
        return {"low": values.low, "high": values.high, "log": values.log}
    return {"choices": [list(v) if isinstance(v, tuple) else v for v in values.values]}


def from_json(values: Mapping[str, Any]) -> Range | Choices:
    """Convert values from the format of sweep.json."""
    if "choices" in values:
        return Choices(tuple(map(to_scalar, values["choices"])))
    return Range(values["low"], values["high"], values["log"])


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings on one line: {"lr": 0.1} -> "lr 0.1"."""
    return ", ".join(f"{name} {format_setting(value)}" for name, value in settings.items())


def format_setting(value: Any) -> str:
    """Format the value of a setting: 0.1234567 -> "0.1235", (16, 16) -> "16 16"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(to_scalar(value)) or "none"
