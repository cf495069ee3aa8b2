"""A checkpoint: a network's weights, and the state that resuming a training needs.

A checkpoint is several files. Its JSON is written last and names the tensor files with their
SHA-256; the previous ones are removed only then. Whenever the power fails, the JSON on disk names
files that are there.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet56.errors import RunError
from resnet56.files import read_json, write_bytes, write_json

if TYPE_CHECKING:  # what reads no tensors starts without PyTorch
    from torch import Tensor

FORMAT = 1  # of the checkpoint; a reader refuses a newer one


@dataclass(frozen=True)
class Network:
    """What must be known to use the weights."""

    arch: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]  # of the training images, in units of [0, 1]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Position:
    """Where a training stands, and what its unfinished epoch has summed up so far."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps taken, over all epochs
    epoch_step: int = 0  # steps of the unfinished epoch
    loss_sum: float = 0.0  # of the unfinished epoch, in nats
    correct: int = 0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights and, for resuming, the state of its training."""

    network: Network
    model: Mapping[str, "Tensor"]  # the weights to use: the averaged ones where there are any
    training: Mapping[str, "Tensor"] = field(default_factory=dict)  # momentum, raw weights
    position: Position = field(default_factory=Position)
    notes: Mapping[str, Any] = field(default_factory=dict)  # precision, data, loss scale, ...


def save_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint; the old one stays whole until the new one is.

    Args:
        file: checkpoint.json; the tensor files are written beside it.
        checkpoint: what to write.

    Raises:
        RunError: it could not be written (a full disk); the old one is intact.
    """
    import safetensors.torch

    directory = file.parent
    files = {}
    for part in ("model", "training"):
        tensors = {name: t.detach().contiguous() for name, t in getattr(checkpoint, part).items()}
        content = safetensors.torch.save(tensors)
        name = f"{part}-{checkpoint.position.step:08d}.safetensors"
        write_bytes(directory / name, content)
        files[part] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    write_json(
        file,
        {
            "format": FORMAT,
            "network": asdict(checkpoint.network),
            "position": asdict(checkpoint.position),
            "notes": dict(checkpoint.notes),
            "files": files,
        },
    )
    named = {entry["name"] for entry in files.values()} | {file.name}
    for path in directory.iterdir():
        if path.name not in named:
            with contextlib.suppress(OSError):  # on Windows another process may read it
                path.unlink()


def load_checkpoint(file: Path, *, training: bool = False) -> Checkpoint:
    """Read the checkpoint; with `training`, also what only resuming needs.

    Raises:
        RunError: there is none, it is damaged, or a newer version wrote it.
    """
    head = read_json(file)
    if isinstance(head.get("format"), int) and head["format"] > FORMAT:
        raise RunError(
            f"{file} is of format {head['format']}, newer than this version "
            f"reads ({FORMAT}); update resnet56"
        )
    try:
        network = Network(**{**head["network"], **_tuples(head["network"])})
        position = Position(**head["position"])
        notes = dict(head["notes"])
        parts = {
            part: _read_tensors(file.parent, head["files"][part])
            for part in (("model", "training") if training else ("model",))
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged: {error!r}") from None
    return Checkpoint(network, position=position, notes=notes, **parts)


def _read_tensors(directory: Path, entry: Mapping[str, str]) -> dict[str, "Tensor"]:
    import safetensors.torch

    path = directory / Path(entry["name"]).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise RunError(f"{path} is damaged: its checksum is not the one in checkpoint.json")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise RunError(f"{path} is damaged: {error}") from None


def _tuples(network: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(network[name]) for name in ("classes", "mean", "std")}
