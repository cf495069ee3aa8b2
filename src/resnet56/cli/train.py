"""The `resnet56 train` command."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from resnet56 import recipe as recipes
from resnet56.cli import INTERRUPTED
from resnet56.cli.arguments import parse
from resnet56.cli.common import Data, Out, Threads, load_data, say
from resnet56.errors import UsageError

if TYPE_CHECKING:
    from resnet56.progress import TrainingDisplay


@dataclass(frozen=True)
class TrainOptions:
    """Train a model, write a run directory and evaluate the model."""

    data: Data = None
    """Data set: digits (the default, no download), cifar10, cifar100 or a directory."""

    out: Out = None
    """Run directory. By default, a new directory runs/RECIPE-DATA."""

    resume: bool = False
    """Continue the run in --out from its last checkpoint."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per idle core, adjusted during training."""

    tensorboard: bool = False
    """Also write TensorBoard logs to RUN/tensorboard."""

    test_every_epoch: bool = False
    """Also record the test loss and accuracy after each epoch, as in Figure 6 of He et al. (2015).
    These metrics do not affect training. To continue to record these metrics when you
    resume a run, pass this flag again."""

    evaluate: bool = True
    """Skip the evaluation after training, which uses the test images. Use this flag to choose
    settings by their validation accuracy, and evaluate the chosen run later with resnet56 evaluate
    RUN."""

    quiet: bool = False
    """Print errors only."""

    recipe: tyro.conf.OmitArgPrefixes[recipes.Recipe] = field(default_factory=recipes.Recipe)


@dataclass(frozen=True)
class _Job:
    """The options of a training run, its run directory, and the data set of a resumed run."""

    options: TrainOptions
    own_data: str | None  # data origin of the run to resume
    out: Path

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        words = ["resnet56", "train", "--resume", "--out", str(self.out)]
        words += [] if self.options.device == "auto" else ["--device", self.options.device]
        words += [] if self.options.threads is None else ["--threads", str(self.options.threads)]
        words += ["--tensorboard"] if self.options.tensorboard else []
        words += ["--test-every-epoch"] if self.options.test_every_epoch else []
        words += [] if self.options.evaluate else ["--no-evaluate"]
        return shlex.join([*words, *(["--skip-broken"] if self.options.skip_broken else [])])


def run(arguments: list[str]) -> int:
    """Run `resnet56 train`."""
    job = _choose(arguments)

    from resnet56.distributed import Distributed
    from resnet56.progress import Output, TrainingDisplay, stream_output
    from resnet56.training import Interrupted

    is_main_process = Distributed.from_environment().is_main_process
    quiet = job.options.quiet or not is_main_process
    with TrainingDisplay(Output() if quiet else stream_output(sys.stdout)) as display:
        try:
            _train(job, display)
        except Interrupted as interrupted:
            if is_main_process:
                say("")  # Start a new line after the ^C that the terminal prints.
                say(f"stopped and saved a checkpoint; continue with: {job.resume_command}")
            return interrupted.exit_code
        except KeyboardInterrupt:
            has_checkpoint = (job.out / "checkpoint" / "checkpoint.json").exists()
            say("")
            if has_checkpoint:
                say(f"stopped; continue with: {job.resume_command}")
            else:
                say("stopped before the first checkpoint")
            return INTERRUPTED
        if is_main_process:
            _write_report(job.out, display)
    return 0


def _choose(arguments: list[str]) -> _Job:
    """Parse the arguments and check them before loading the data."""
    from resnet56.distributed import Distributed

    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    base = recipes.find(name) if name else recipes.Recipe()
    options = _parse_train(arguments, name, base)
    if name is None and options.resume and options.out:
        file = options.out / "recipe.json"
        if file.is_file():  # `train` rejects flags that change the recipe of the run.
            options = _parse_train(arguments, name, recipes.read(file))
    if name is None and not options.resume:
        raise UsageError(
            "no recipe given; use resnet56 train RECIPE, where RECIPE is "
            f"{', '.join(recipes.RECIPES)} or a file"
        )
    if options.out is None and Distributed.from_environment().world_size > 1:
        raise UsageError(
            "training in several processes requires the same --out RUN in every process"
        )
    if options.resume and options.out is None:
        raise UsageError("--resume requires --out RUN, the directory of the run to continue")

    from resnet56 import model, runtime, threads
    from resnet56.files import unused_path
    from resnet56.runs.directory import RunDirectory

    model.Architecture.parse(options.recipe.arch)
    runtime.resolve_device(options.device)
    if options.threads is not None:
        threads.check_threads(options.threads)
    own = _origin_of_resumed(options)
    data = options.data if options.data is not None else own or "digits"
    stem = Path(name).stem if name else "run"
    out = options.out or unused_path(Path("runs") / f"{stem}-{Path(data).resolve().name}")
    run = RunDirectory(out)
    if options.resume:
        run.load()  # Raises an error if there is nothing to resume.
    else:
        run.require_unused()
    return _Job(options, own, out)


def _train(job: _Job, display: "TrainingDisplay") -> None:
    """Load the data and train."""
    from resnet56.training import train

    options = job.options
    dataset = load_data(options.data, own=job.own_data, skip_broken=options.skip_broken)
    display.log(f"{options.recipe.arch} on {dataset.source}")
    display.log(f"run: {job.out}")
    train(
        options.recipe,
        dataset,
        job.out,
        device=options.device,
        resume=options.resume,
        tensorboard=options.tensorboard,
        test_every_epoch=options.test_every_epoch,
        evaluate=options.evaluate,
        threads=options.threads,
        progress=display,
    )
    if not options.evaluate:
        command = shlex.join(["resnet56", "evaluate", str(job.out)])
        display.log(f"training did not use the test images; to evaluate the run: {command}")


def _write_report(out: Path, display: "TrainingDisplay") -> None:
    """Write the report."""
    from resnet56.report import write_report

    display.log("writing the report")
    display.log(f"run: {out}; report: {write_report([out])}")


def _parse_train(arguments: Sequence[str], name: str | None, base: recipes.Recipe) -> TrainOptions:
    names = "\n".join(f"  {key:7} {text}" for key, text in recipes.DESCRIPTIONS.items())
    defaults = f"The defaults are those of {name}."
    if name is None:
        defaults = "To see the values of a recipe, use resnet56 train RECIPE --help."
    return parse(
        TrainOptions,
        arguments,
        f"resnet56 train {name or 'RECIPE'}",
        default=TrainOptions(recipe=base),
        description=(
            "Train a model, write a run directory and evaluate the model.\n\nRECIPE is a .json or "
            f".toml file, such as the recipe.json of a run, or one of\n{names}\n\n"
            f"Each field of a recipe is also a flag. {defaults}"
        ),
    )


def _origin_of_resumed(options: TrainOptions) -> str | None:
    """Return the data origin of the run to resume, if any."""
    from resnet56.runs.directory import RunDirectory

    if not (options.resume and options.out):
        return None
    return RunDirectory(options.out).data_origin()
