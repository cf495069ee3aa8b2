"""The command `resnet56`: one function a subcommand, each importing what it needs when it runs."""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from resnet56 import __version__
from resnet56 import recipe as recipes
from resnet56.errors import Error, UsageError

if TYPE_CHECKING:
    import torch

    from resnet56.data import Dataset, Split
    from resnet56.rundir import RunDirectory

Options = TypeVar("Options")

PROBLEM = 2  # exit code of a call that is wrong
INTERRUPTED = 130  # of Ctrl-C, as shells have it

Data = Annotated[str | None, tyro.conf.arg(aliases=("--data-dir",), metavar="NAME|DIR")]
Out = Annotated[Path | None, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]


@dataclass(frozen=True)
class TrainOptions:
    """Train a network, keep the run in a directory, and test it."""

    data: Data = None
    """Images: digits (the default; no download), cifar10, cifar100, or a folder."""

    out: Out = None
    """Run directory; by default a new one, runs/RECIPE-DATA."""

    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""

    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:N, mps."""

    tensorboard: bool = False
    """Also write scalars for TensorBoard, in RUN/tensorboard."""

    quiet: bool = False
    """Print errors only."""

    recipe: tyro.conf.OmitArgPrefixes[recipes.Recipe] = field(default_factory=recipes.Recipe)


def train(arguments: list[str]) -> int:
    """resnet56 train [RECIPE] [options]."""
    from resnet56.parallel import place

    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    base = recipes.find(name) if name else recipes.Recipe()
    options = _parse_train(arguments, name, base)
    if name is None and options.resume and options.out:
        file = options.out / "recipe.json"
        if file.is_file():  # a flag then changes the run's own recipe, which is refused later
            options = _parse_train(arguments, name, recipes.read(file))
    chosen = options.recipe
    if name is None and not options.resume:
        raise UsageError(
            f"which recipe? resnet56 train RECIPE, with {', '.join(recipes.RECIPES)}, or a file"
        )
    if options.out is None and place().world_size > 1:
        raise UsageError("several processes need --out RUN, so that they agree on the directory")
    if options.resume and options.out is None:
        raise UsageError("--resume needs --out RUN, the directory of the run to go on with")

    # Checked before anything slow, or on the disk, happens.
    from resnet56 import model, runtime

    model.Architecture.parse(chosen.arch)
    runtime.resolve_device(options.device)

    from resnet56.progress import TrainingProgress, percent
    from resnet56.rundir import RunDirectory, next_free
    from resnet56.training import Interrupted
    from resnet56.training import train as run_training

    data = options.data or _data_of_resumed(options) or "digits"
    stem = Path(name).stem if name else "run"
    out = options.out or next_free(Path("runs") / f"{stem}-{Path(data).resolve().name}")
    run = RunDirectory(out)
    if options.resume:
        run.load()  # says so now if there is nothing to resume
    else:
        run.refuse_taken()
    quiet = options.quiet or not place().is_first
    words = ["resnet56", "train", "--resume", "--out", str(out)]
    again = shlex.join(words if options.device == "auto" else [*words, "--device", options.device])
    with TrainingProgress(quiet=quiet) as progress:
        dataset = load_data(data)
        progress.say(f"{chosen.arch} on {dataset.source}")
        progress.say(f"run: {out}")
        try:
            result = run_training(
                chosen,
                dataset,
                out,
                device=options.device,
                resume=options.resume,
                tensorboard=options.tensorboard,
                progress=progress,
            )
        except Interrupted as interrupted:
            if place().is_first:
                _say(f"\nstopped; the checkpoint is written; go on with: {again}")
            return interrupted.exit_code
        except KeyboardInterrupt:
            _say(f"\nstopped; go on with: {again}")
            return INTERRUPTED
        if result:
            test, seen = result["test"], result["train"]
            low, high = test["accuracy_interval"]
            progress.say(
                f"test accuracy {percent(test['accuracy'])} "
                f"(95 % interval {100 * low:.2f} to {100 * high:.2f}), loss {test['loss']:.4f}, "
                f"{test['n']:,} images"
            )
            progress.say(
                f"training accuracy {percent(seen['accuracy'])}, loss {seen['loss']:.4f}, "
                f"{seen['n']:,} images, no augmentation"
            )
            progress.say("writing the report")
            from resnet56.report import write_report

            progress.say(f"the run lies in {out}, its report is {write_report([out])}")
    return 0


def _parse_train(arguments: Sequence[str], name: str | None, base: recipes.Recipe) -> TrainOptions:
    named = "\n".join(f"  {key:7} {text}" for key, text in recipes.ABOUT.items())
    return parse(
        TrainOptions,
        arguments,
        f"resnet56 train {name or 'RECIPE'}",
        default=TrainOptions(recipe=base),
        description=(
            "Train a network, keep the run in a directory, and test it.\n\nRECIPE is a .json or "
            f".toml file (a run's recipe.json is one), or one of\n{named}\n\n"
            "Each of its fields is a flag below."
        ),
    )


def _data_of_resumed(options: TrainOptions) -> str | None:
    """With --resume and no --data, what the run was trained on."""
    from resnet56.rundir import RunDirectory

    if not (options.resume and options.out):
        return None
    return RunDirectory(options.out).data_origin()


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's weights on this machine; on its own data, write it down in the run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Directory of a run."""

    data: Data = None
    """Other images than the run's own: a name, a folder, or CIFAR-10-C's or 10.1's .npy files."""

    split: Literal["test", "train"] = "test"
    """Which images to show; both are measured."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:N, mps."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass."""

    robustness: int = 500
    """Test images to corrupt in ten ways and five severities; 0 for none."""

    parity: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Only compare two devices (cpu,cuda) or precisions (fp32,bf16) on the test images."""

    json: bool = False
    """Print everything as JSON."""


def evaluate(arguments: list[str]) -> int:
    """resnet56 evaluate RUN."""
    options = parse(EvaluateOptions, arguments, "resnet56 evaluate")
    from resnet56 import runtime, tables
    from resnet56.evaluation import Subject, evaluate_run, restore
    from resnet56.readers import is_benchmark, load_benchmark
    from resnet56.rundir import RunDirectory, read_json

    if options.robustness < 0:
        raise UsageError(f"--robustness must be at least 0, not {options.robustness}")
    device = runtime.resolve_device(options.device)
    precision = runtime.resolve_precision(options.precision, device)
    run = RunDirectory(options.run)
    checkpoint = run.load()
    net = checkpoint.network
    subject = Subject(restore(checkpoint, device), net, precision)
    if options.data and is_benchmark(Path(options.data)):
        if options.parity is not None:
            raise UsageError("--parity compares on one set of images; leave --data out")
        figures = {}
        for name, images in load_benchmark(Path(options.data), len(net.classes)):
            with _show(f"{len(images):,} images ({name})", len(images)) as tick:
                figures[name] = subject.figures(images, tick)
        print(json.dumps(figures)) if options.json else tables.show_accuracies(figures)
        return 0

    dataset = load_data(options.data or run.data_origin() or "digits")
    if dataset.classes != net.classes:
        raise UsageError(
            f"{dataset.source} has other classes ({', '.join(dataset.classes[:3])}, ...) than "
            f"the run ({', '.join(net.classes[:3])}, ...); choose --data"
        )
    own = dataset.fingerprint() == checkpoint.notes.get("data")
    if not own:
        _say("these are not the images of the run: nothing is written")
    if options.parity is not None:
        found = _compare(run, options.parity, device, dataset.test)
        if own:
            run.keep_comparison(found)
        print(json.dumps(found)) if options.json else tables.show_comparison(found)
        return 0
    title = f"{net.arch}, {options.split} images of {dataset.source}"
    if not own:
        split = dataset.test if options.split == "test" else dataset.train
        with _show(f"{len(split):,} images", len(split)) as tick:
            other = subject.figures(split, tick)
        print(json.dumps(other)) if options.json else tables.show_figures(other, title)
        return 0
    recipe = recipes.from_fields(read_json(run.recipe_file), str(run.recipe_file))
    result = evaluate_run(
        run,
        dataset,
        holdout=recipe.holdout,
        flip=recipe.flip and dataset.mirror,
        padding=recipe.padding,
        device=device,
        precision=precision,
        robustness=min(options.robustness, len(dataset.test)),
        speed=True,
        show=_show,
    )
    if options.json:
        print(json.dumps(result))
    else:
        tables.show_figures(result[options.split], title)
        tables.show_extras(result)
    return 0


def _compare(
    run: "RunDirectory", sides: str, device: "torch.device", split: "Split"
) -> dict[str, Any]:
    """`--parity A,B`: measure on both sides."""
    from resnet56 import runtime
    from resnet56.evaluation import compare, subject_of

    names, subjects = [], []
    for side in sides.split(","):
        by_precision = side in runtime.DTYPES
        where = device if by_precision else runtime.resolve_device(side)
        precision = runtime.resolve_precision(side if by_precision else "fp32", where)
        names.append(f"{where} {precision}")
        subjects.append(subject_of(run, where, precision))
    if len(names) != 2:
        raise UsageError(f"--parity wants two sides, as in cpu,cuda or fp32,bf16, not {sides!r}")
    return compare(subjects[0], subjects[1], (names[0], names[1]), split, _show)


def _say(line: str) -> None:
    """A remark on stderr: stdout is for results."""
    print(line, file=sys.stderr)


def _show(what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A sign of life on stderr."""
    from rich.console import Console

    from resnet56.progress import measuring

    return measuring(what, total, Console(stderr=True, highlight=False))


@dataclass(frozen=True)
class ReportOptions:
    """Write a page about one run, or one that compares several."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of runs."""

    out: Path | None = None
    """File to write; by default report.html in the run, or comparison.html here."""

    format: Literal["html", "md"] = "html"
    """One self-contained page, or Markdown with pictures beside it."""


def report(arguments: list[str]) -> int:
    """resnet56 report RUN [RUN ...]."""
    options = parse(ReportOptions, arguments, "resnet56 report")
    if not options.runs:
        raise UsageError("which run? resnet56 report RUN [RUN ...]; see resnet56 report --help")
    from resnet56.report import write_report

    print(write_report(options.runs, options.out, format=options.format))
    return 0


@dataclass(frozen=True)
class DescribeOptions:
    """Print a network's stages, blocks, layers, parameters and multiply-accumulates."""

    arch: str = "resnet56"
    """Network: resnet56 (basic blocks, shortcut A), resnet56-b, resnet56-bottleneck, ..."""

    classes: int = 10
    """Number of outputs."""

    json: bool = False
    """Print JSON."""


def describe(arguments: list[str]) -> int:
    """resnet56 describe [--arch NAME]."""
    options = parse(DescribeOptions, arguments, "resnet56 describe")
    from resnet56.model import describe as describe_network

    network = asdict(describe_network(options.arch, options.classes))
    if options.json:
        print(json.dumps(network))
        return 0
    from resnet56.tables import show_network

    show_network(network)
    return 0


@dataclass(frozen=True)
class FetchOptions:
    """Download a data set once, to where training looks for it."""

    name: tyro.conf.Positional[Literal["cifar10", "cifar100"]] = "cifar10"
    """Data set."""

    dir: Path | None = None
    """Folder to keep it in; by default RESNET56_DATA, or the user's cache."""

    mirror: tuple[str, ...] = ()
    """Addresses to try before the university's; also RESNET56_MIRROR."""


def data(arguments: list[str]) -> int:
    """resnet56 data fetch [NAME]."""
    usage = "resnet56 data fetch [cifar10|cifar100] [--dir DIR] [--mirror URL]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n  fetch  download a data set once, to where training finds it")
        return 0
    if arguments[0] != "fetch":
        raise UsageError(f"unknown: resnet56 data {arguments[0]}; usage: {usage}")
    options = parse(FetchOptions, arguments[1:], "resnet56 data fetch")
    print(_fetch(options.name, options.dir, options.mirror))
    return 0


def _fetch(name: str, root: Path | None = None, mirrors: Sequence[str] = ()) -> Path:
    from resnet56.download import ARCHIVES, default_root, fetch
    from resnet56.progress import DownloadProgress

    archive = ARCHIVES[name]
    with DownloadProgress(archive.filename) as progress:
        return fetch(archive, root or default_root(), mirrors=mirrors, progress=progress)


def load_data(name: str) -> "Dataset":
    """The data set of that name, downloaded if it must be, or in that folder."""
    from resnet56 import readers
    from resnet56.download import ARCHIVES

    if name == "digits":
        return readers.load_digits()
    if name in ARCHIVES:
        return readers.load_folder(_fetch(name))
    if not Path(name).exists() and not re.search(r"[/\\.]", name):
        raise UsageError(
            f"unknown data {name!r}; use digits, cifar10, cifar100, or a folder that exists"
        )
    return readers.load_folder(Path(name))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (train, "train a network, keep the run in a directory, and test it"),
    "evaluate": (evaluate, "measure a run's weights, on this machine"),
    "report": (report, "write a page about a run, or one that compares several"),
    "describe": (describe, "print a network's layers, parameters and operations"),
    "data": (data, "fetch CIFAR-10 or CIFAR-100"),
}

HELP = """\
usage: resnet56 COMMAND [options]

ResNet-56 on CIFAR-10: train it, test it, explain it.

{commands}

  resnet56 COMMAND --help    its options
  resnet56 --version         the version

Without any download: resnet56 train quick --data digits
"""


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    prog: str,
    *,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Flags to `kind`, a dataclass; what is wrong with them becomes one UsageError line."""
    complaint = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            options: Options = tyro.cli(
                kind, args=arguments, prog=prog, description=description, **extra
            )
            return options
    except SystemExit as stopped:
        if not stopped.code:
            raise  # --help was printed
    # Tyro's complaint is a box: a title, the complaint, then after a rule more of its help.
    box = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
    said = re.split(r"\n\W*───", box.partition("\n")[2])[0]
    line = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split()).rstrip(".")
    raise UsageError(f"{line}; see {prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; every error a user can cause ends as one line and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except Error as error:
        return _fail(str(error), error.exit_code)
    except SystemExit as stopped:  # tyro has printed the help
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone (| head): not our business
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path that the system refuses: no permission, too long
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _fail("out of memory; choose a smaller --batch-size", 1)
        raise


def _run(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if arguments else PROBLEM
    if first in ("-V", "--version"):
        print(f"resnet56 {__version__}")
        return 0
    if first not in COMMANDS:
        raise UsageError(f"unknown command {first!r}; the commands: {', '.join(COMMANDS)}")
    return COMMANDS[first][0](arguments[1:])


def _fail(line: str, code: int) -> int:
    print(f"resnet56: {line}", file=sys.stderr)
    return code
