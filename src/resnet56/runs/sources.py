"""A network by path or name: the one way by which every command opens one.

It may be a run, a file of a run's checkpoint, a network that comes with the package, a file that
`resnet56 export` wrote, or a hub's folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet56.errors import RunError
from resnet56.files import read_json
from resnet56.runs import pretrained
from resnet56.runs.checkpoint import Checkpoint
from resnet56.runs.directory import RunDirectory

if TYPE_CHECKING:
    from resnet56.runs.convert import Imported, Triple


@dataclass(frozen=True)
class Source:
    """A network, and where it comes from."""

    checkpoint: Checkpoint
    run: RunDirectory | None = None  # where it is a run's
    pretrained: str | None = None  # its name, where it comes with the package


def open_network(what: str | Path) -> Source:
    """The network at a path or of a name, if it states its classes and constants.

    What lies at the path goes before a network of the package that has the same name.

    Raises:
        RunError: it is not there, damaged, or does not state what must be known to use it.
        MissingExtraError: an ONNX file without the extra `onnx`.
    """
    source = _own(what)
    if source is None:
        from resnet56.runs import convert  # imports PyTorch

        source = Source(convert.read(Path(what), stated_only=True).checkpoint)
    return source


def import_network(
    what: str | Path,
    arch: str | None = None,
    *,
    mean: "Triple | None" = None,
    std: "Triple | None" = None,
    classes: Sequence[str] = (),
    prefix: str | None = None,
) -> "Imported":
    """Like `open_network`, but also of files of other projects, as `convert.read` takes them."""
    from resnet56.runs import convert

    source = _own(what)
    if source is None:
        return convert.read(Path(what), arch, mean=mean, std=std, classes=classes, prefix=prefix)
    return convert.restated(source.checkpoint, str(what), arch, mean, std, classes)


def _own(what: str | Path) -> Source | None:
    """The run or the network of the package that `what` names; None for another file or folder."""
    path = Path(what)
    run = _run_of(path)
    if run is not None:
        return Source(run.load(), run=run)
    if path.is_dir() and _has_weights(path):
        return None
    if str(what) in pretrained.names():
        return Source(pretrained.load(str(what)), pretrained=str(what))
    if path.is_dir():
        run = RunDirectory(path)
        return Source(run.load(), run=run)  # says what is missing
    if path.exists():
        return None
    there = ", ".join(pretrained.names()) or "none"
    raise RunError(
        f"there is no run at {what} and no shipped network of that name (shipped: {there}); give "
        "the directory of a training, or a file that resnet56 export wrote"
    )


def _run_of(path: Path) -> RunDirectory | None:
    """The run that a path names: its directory, its checkpoint's, or a file there."""
    if RunDirectory(path).checkpoint_file.exists():
        return RunDirectory(path)
    folder = path if path.is_dir() else path.parent
    if folder.resolve().name != "checkpoint":
        return None
    run = RunDirectory(folder / "..")
    if not run.checkpoint_file.exists():
        return None
    run = RunDirectory(folder.resolve().parent)
    if path.is_file() and path.name != run.checkpoint_file.name:
        files = read_json(run.checkpoint_file).get("files")
        model = files.get("model") if isinstance(files, dict) else None
        if not isinstance(model, dict) or model.get("name") != path.name:
            raise RunError(f"{path} does not hold the weights of its run; give {run.path}")
    return run


def _has_weights(folder: Path) -> bool:
    from resnet56.runs.convert import SUFFIXES

    try:
        return any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}") from None
