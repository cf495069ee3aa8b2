"""The `resnet56 import` command."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Data, for_classes, load_data, say
from resnet56.cli.networks import ROBUSTNESS, evaluate_and_save, require_images
from resnet56.data.class_names import PUBLISHED
from resnet56.errors import UsageError
from resnet56.progress import percent


@dataclass(frozen=True)
class ImportOptions:
    """Convert a checkpoint from another project to a run. Code in the file is never executed.

    With --data, also evaluate the network as resnet56 evaluate does.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE|DIR|NAME")]
    """Checkpoint (torch.save or safetensors), exported file, model hub directory, run directory, or
    name of a pretrained model."""

    out: Annotated[Path, tyro.conf.arg(aliases=("--output-dir",), metavar="RUN")]
    """Run directory to create."""

    data: Data = None
    """Data set on which to evaluate the network. It becomes the data set of the run."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""

    arch: str | None = None
    """Architecture. By default, detected from the names and shapes of the tensors. Required for
    plain networks, whose tensors have the same names and shapes as those of residual networks."""

    prefix: str | None = None
    """Prefix of the model's tensor names, such as student or model_ema.module. Required if the file
    contains several models."""

    mean: tuple[float, float, float] | None = None
    """Channel means of the training images, from 0 to 1. By default, the values in the file, or
    the values that the authors of the model used."""

    std: tuple[float, float, float] | None = None
    """Channel standard deviations of the training images, with the same defaults as --mean."""

    classes: tuple[str, ...] = ()
    """Class names in the order of the outputs, a text file with one name per line, cifar10,
    cifar100, digits, or a run with the same classes. By default, the classes in the file, or the
    classes of CIFAR-10 or CIFAR-100."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 import`."""
    options = parse(ImportOptions, arguments, "resnet56 import")
    from resnet56.classifiers import network_of
    from resnet56.runs.directory import RunDirectory
    from resnet56.runs.sources import import_model

    directory = RunDirectory(options.out)
    if options.skip_broken and options.data is None:
        raise UsageError("--skip-broken requires --data")
    if not all(0 <= value <= 1 for value in options.mean or ()):
        raise UsageError("--mean requires values from 0 to 1, the range of the pixel values")
    if not all(0 < value <= 1 for value in options.std or ()):
        raise UsageError("--std requires positive values of at most 1")
    directory.require_unused()
    imported = import_model(
        options.file,
        options.arch,
        prefix=options.prefix,
        mean=options.mean,
        std=options.std,
        classes=_names(options.classes),
    )
    config = imported.checkpoint.config
    device = "cpu" if options.data is None else "auto"
    # Raises an error if the outputs are not finite.
    network = network_of(options.out, imported.checkpoint, directory, device=device)
    dataset = None
    if options.data is not None:  # Load the data before writing, so that an error leaves no files.
        dataset = load_data(options.data, evaluation=True, skip_broken=options.skip_broken)
        dataset = for_classes(dataset, config.classes)
        require_images(dataset.test, "test")
    directory.create()
    directory.save(imported.checkpoint)
    for remark in imported.remarks:
        say(remark)
    if dataset is None:
        command = f"resnet56 evaluate {shlex.quote(str(options.out))} --data DIR"
        say(f"imported {config.arch}; evaluate it with: {command}")
    else:
        test = evaluate_and_save(network, dataset, robustness=ROBUSTNESS)["test"]
        command = f"resnet56 report {shlex.quote(str(options.out))}"
        say(
            f"imported {config.arch}: test accuracy {percent(test['accuracy'])} on {test['n']:,} "
            f"images; for a report, use: {command}"
        )
    print(options.out)
    return 0


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names that the values of --classes specify."""
    if len(given) != 1:
        return given
    if given[0] in PUBLISHED:
        return PUBLISHED[given[0]]
    from resnet56.runs.sources import open_model

    file = Path(given[0])
    try:
        if file.is_dir():
            return open_model(file).checkpoint.config.classes
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            "--classes must be names, a text file with one name per line, cifar10, cifar100, "
            f"digits or a run, not {file}"
        ) from None
    return tuple(line.strip() for line in lines if line.strip())
