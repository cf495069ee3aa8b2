"""The `resnet56 sweep` command."""

import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from resnet56 import recipe as recipes
from resnet56.cli import INTERRUPTED
from resnet56.cli.arguments import integer, number, parse, suggestion
from resnet56.cli.common import Data, Out, Threads, load_data, say
from resnet56.errors import UsageError, one_line

if TYPE_CHECKING:
    from resnet56.runs.schema import Sweep
    from resnet56.sweep.space import Choices, Range


@dataclass(frozen=True)
class SweepOptions:
    """Search for the recipe settings with the highest validation accuracy."""

    vary: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FIELD=VALUES")
    ] = ()
    """A field of the recipe and its values: lr=0.05..0.4 (a range), lr=0.05..0.4:log (sampled on a
    logarithmic scale), or nesterov=true,false (a list). Separate the items of a value with spaces:
    "drop_epochs=10 20,15 25". To specify several fields, repeat this flag."""

    trials: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of trials across all workers (default: 20). A grid runs all combinations."""

    grid: bool = False
    """Try all combinations of the listed values. By default, the tree-structured Parzen estimator
    (TPE) suggests values based on earlier trials."""

    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = ()
    """Seeds for each trial. The value of a trial is the mean validation accuracy over its seeds. By
    default, the seed of the recipe."""

    no_prune: bool = False
    """Train all trials to the end. By default, the worse half of the remaining trials stops after a
    quarter of the epochs, and again whenever the number of epochs, summed over the seeds, has
    doubled (successive halving)."""

    data: Data = None
    """Data set: digits (the default, no download), cifar10, cifar100 or a directory."""

    out: Out = None
    """Directory of the sweep, which contains a run directory per trial. Required."""

    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Database that coordinates several machines, such as postgresql://user:password@host/name. Run
    the same command on each machine. By default, OUT/study.db, which only processes on
    the same machine can share."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per idle core, adjusted during training."""

    json: bool = False
    """Print the content of sweep.json to stdout at the end, and progress to stderr."""

    quiet: bool = False
    """Print only the result and errors."""

    recipe: tyro.conf.OmitArgPrefixes[recipes.Recipe] = field(default_factory=recipes.Recipe)


def run(arguments: list[str]) -> int:
    """Run `resnet56 sweep`."""
    given = shlex.join(["resnet56", "sweep", *arguments])
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    base = recipes.find(name) if name else recipes.Recipe()
    options = _parse(arguments, name, base)
    if name is None:
        raise UsageError(
            "no recipe given; use resnet56 sweep RECIPE, where RECIPE is "
            f"{', '.join(recipes.RECIPES)} or a file"
        )
    if options.out is None:
        raise UsageError("--out DIR is required; the same command continues a sweep in DIR")
    if options.grid and options.trials is not None:
        raise UsageError("--grid runs all combinations; omit --trials")
    space = parse_space(options.vary)

    from resnet56.distributed import Distributed
    from resnet56.progress import Output, stream_output
    from resnet56.runtime import resolve_device
    from resnet56.sweep.search import sweep
    from resnet56.sweep.space import check_space
    from resnet56.sweep.storage import import_optuna
    from resnet56.threads import check_threads

    if Distributed.from_environment().world_size > 1:
        raise UsageError("a sweep does not run under torchrun; start the command once per process")
    import_optuna()
    check_space(options.recipe, space, grid=options.grid)
    resolve_device(options.device)
    if options.threads is not None:
        check_threads(options.threads)
    dataset = load_data(options.data, skip_broken=options.skip_broken)
    output = (
        Output() if options.quiet else stream_output(sys.stderr if options.json else sys.stdout)
    )
    output.log(f"{options.recipe.arch} on {dataset.source}")
    try:
        content = sweep(
            options.recipe,
            space,
            dataset,
            options.out,
            trials=20 if options.trials is None else options.trials,
            seeds=options.seeds,
            grid=options.grid,
            prune=not options.no_prune,
            storage=options.storage,
            device=options.device,
            threads=options.threads,
            base=(name, base),
            output=output,
        )
    except KeyboardInterrupt as interrupted:
        say("")  # Start a new line after the ^C that the terminal prints.
        say(f"stopped without losing a trial; continue with: {given}")
        return getattr(interrupted, "exit_code", INTERRUPTED)
    finally:
        output.end()
    _show(content, options)
    return 0


def _show(content: "Sweep", options: SweepOptions) -> None:
    """Print the result of a sweep."""
    from resnet56.files import to_json
    from resnet56.progress import percent
    from resnet56.sweep.space import format_settings

    if options.json:
        print(to_json(content))
        return
    best = next((t for t in content["trials"] if t["number"] == content.get("best")), None)
    if best is None:
        print("no trial is complete")
        return
    print(
        f"best: trial {best['number']}, {percent(best['value'])} validation accuracy with "
        f"{format_settings(best['settings'])}"
    )
    print(f"to train with these settings on all training images: {content['command']}")
    print(f"report: resnet56 report {shlex.quote(str(options.out))}")


def parse_space(texts: tuple[str, ...]) -> "dict[str, Range | Choices]":
    """Parse the values of --vary.

    Raises:
        UsageError: a field is unknown or given twice, or a value has the wrong type.
    """
    from resnet56.sweep.space import Choices, Range

    types = get_type_hints(recipes.Recipe)
    space: dict[str, Range | Choices] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(
                f"--vary {one_line(text)}: expected FIELD=LOW..HIGH or FIELD=VALUE,VALUE"
            )
        if name not in types:
            raise UsageError(
                f"--vary: a recipe has no field {one_line(name)}{suggestion(name, [*types])}"
            )
        if name in space:
            raise UsageError(f"--vary: {name} is given twice")
        try:
            low, dots, high = values.partition("..")
            if dots and types[name] in (int, float):
                high, colon, scale = high.partition(":")
                if colon and scale != "log":
                    raise ValueError(f"expected :log after a range, not :{one_line(scale)}")
                space[name] = Range(
                    _value(low, types[name]), _value(high, types[name]), scale == "log"
                )
            else:
                space[name] = Choices(tuple(_value(v, types[name]) for v in values.split(",")))
        except ValueError as error:
            raise UsageError(f"--vary {name}: {error}") from None
    return space


def _value(text: str, field_type: Any) -> Any:
    """Parse a value of a field. Raises ValueError if the value is invalid."""
    if get_origin(field_type) is tuple:
        return tuple(_value(item, get_args(field_type)[0]) for item in text.split())
    text = text.strip()
    if get_origin(field_type) is Literal:
        choices = get_args(field_type)
        if text not in choices:
            raise ValueError(f"{one_line(repr(text))} is not one of {', '.join(choices)}")
        return text
    if field_type is bool:
        if text not in ("true", "false"):
            raise ValueError(f"expected true or false, not {one_line(repr(text))}")
        return text == "true"
    if field_type is int:
        return integer(text)
    if field_type is float:
        return number(text)
    return text


def _parse(arguments: list[str], name: str | None, base: recipes.Recipe) -> SweepOptions:
    return parse(
        SweepOptions,
        arguments,
        f"resnet56 sweep {name or 'RECIPE'}",
        default=SweepOptions(recipe=base),
        description=(
            "Search for the recipe settings with the highest validation accuracy. The test images "
            "are not used.\n\nRECIPE is the name of a recipe or a file, as in resnet56 train. Each "
            "field of a recipe is also a flag. The same command continues an interrupted sweep, "
            "and several processes can run it at the same time."
        ),
    )
