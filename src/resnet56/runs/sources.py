"""Open a model by name or path. All commands that read models use this module.

A source is a run directory, a file of its checkpoint, the name of a pretrained model, a file from
`resnet56 export`, or a model hub directory.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet56.errors import RunError, UsageError, option
from resnet56.files import StrPath, read_json
from resnet56.runs import pretrained
from resnet56.runs.checkpoint import Checkpoint
from resnet56.runs.directory import RunDirectory
from resnet56.runs.hub import has_weights

if TYPE_CHECKING:
    from resnet56.runs.convert import ImportedModel
    from resnet56.runs.layouts import Triple


@dataclass(frozen=True)
class Source:
    """A model and its origin."""

    checkpoint: Checkpoint
    run: RunDirectory | None = None  # run that the model belongs to, if any
    pretrained: str | None = None  # name of the model, if the model is pretrained


def open_model(name_or_path: StrPath) -> Source:
    """Open a model by name or path.

    A run or a model hub directory takes precedence over a pretrained model of the same name.

    Raises:
        RunError: the model does not exist, is damaged, or does not declare its classes and
            normalization constants.
        MissingExtraError: the file is in ONNX format and the extra `onnx` is not installed.
    """
    source = _open_own(name_or_path)
    if source is None:
        from resnet56.runs import convert  # imported on demand, because it imports PyTorch

        source = Source(convert.read(Path(name_or_path), require_declared=True).checkpoint)
    return source


def import_model(
    name_or_path: StrPath,
    arch: str | None = None,
    *,
    mean: "Triple | None" = None,
    std: "Triple | None" = None,
    classes: Sequence[str] = (),
    prefix: str | None = None,
) -> "ImportedModel":
    """Open a model as `open_model` does, or convert a file from another project.

    See `convert.read` for the arguments and the errors.
    """
    from resnet56.runs import convert

    source = _open_own(name_or_path)
    if source is None:
        return convert.read(
            Path(name_or_path), arch, mean=mean, std=std, classes=classes, prefix=prefix
        )
    if prefix is not None:
        raise UsageError(
            f"{name_or_path} contains one model, so {option('prefix')} has no effect; omit it"
        )
    return convert.override(source.checkpoint, os.fspath(name_or_path), arch, mean, std, classes)


def find_run(name_or_path: StrPath) -> RunDirectory | None:
    """Return the run at a path, or None if `name_or_path` refers to a network that is not a run.

    For a directory without a network, the function returns a run whose files are missing. Reading
    these files raises an error that states what is missing.

    Raises:
        RunError: no network has this name or path, or the path is a checkpoint file that does
            not contain the weights.
    """
    name, path = os.fspath(name_or_path), Path(name_or_path)
    run = _run_of(path)
    if run is not None or (path.is_dir() and has_weights(path)) or name in pretrained.names():
        return run
    if path.is_dir():
        return RunDirectory(path)
    if path.exists():
        return None
    available = ", ".join(pretrained.names()) or "none"
    raise RunError(
        f"{name} is neither a run nor a pretrained model (available: {available}); choose "
        "a run directory or a file that resnet56 export wrote"
    )


def _open_own(name_or_path: StrPath) -> Source | None:
    """Open a run or a pretrained model, or return None for any other file or directory."""
    name, path = os.fspath(name_or_path), Path(name_or_path)
    run = find_run(name_or_path)
    if run is not None:
        return Source(run.load(), run=run)
    if name in pretrained.names() and not (path.is_dir() and has_weights(path)):
        return Source(pretrained.load(name), pretrained=name)
    return None


def _run_of(path: Path) -> RunDirectory | None:
    """Return the run that a path belongs to, or None.

    The path can be a run directory, its checkpoint directory, or a file of its checkpoint.

    Raises:
        RunError: the path is a checkpoint file that does not contain the weights.
    """
    if RunDirectory(path).checkpoint_file.exists():
        return RunDirectory(path)
    directory = path if path.is_dir() else path.parent
    if directory.resolve().name != "checkpoint":
        return None
    run = RunDirectory(directory / "..")
    if not run.checkpoint_file.exists():
        return None
    run = RunDirectory(directory.resolve().parent)
    if path.is_file() and path.name != run.checkpoint_file.name:
        files = read_json(run.checkpoint_file).get("files")
        model = files.get("model") if isinstance(files, dict) else None
        if not isinstance(model, dict) or model.get("name") != path.name:
            raise RunError(f"{path} does not contain the weights of its run; choose {run.path}")
    return run
