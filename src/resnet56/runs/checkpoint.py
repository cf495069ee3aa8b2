"""A checkpoint: a network's weights, and the state that resuming a training needs.

A checkpoint is several files. Its JSON is written last and names the tensor files with their
SHA-256; the previous ones are removed only then. Whenever the power fails, the JSON on disk names
files that are there.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from resnet56.errors import NotFiniteError, RunError, one_line
from resnet56.files import read_json, write_bytes, write_json
from resnet56.runs.schema import (
    MAX_INTEGER,
    Amount,
    Count,
    EmaCandidate,
    Loss,
    Ordinal,
    Share,
    Teacher,
    Text,
    check,
)

if TYPE_CHECKING:  # what reads no tensors starts without PyTorch
    from torch import Tensor

FORMAT = 1  # of the checkpoint; a reader refuses a newer one
ATTEMPTS = 10  # to read a checkpoint that a training replaces meanwhile

Mean = Annotated[float, Meta(ge=-1000, le=1000)]
Deviation = Annotated[float, Meta(ge=1e-9, le=1000)]  # images are divided by it, in fp32


@dataclass(frozen=True)
class Network:
    """What must be known to use the weights."""

    arch: Text
    classes: Annotated[tuple[Text, ...], Meta(min_length=1)]
    mean: tuple[Mean, Mean, Mean]  # of the training images, in units of [0, 1]
    std: tuple[Deviation, Deviation, Deviation]

    def __post_init__(self) -> None:
        """Answers are told apart by the names of their classes."""
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")


@dataclass(frozen=True)
class Position:
    """Where a training stands, and what its unfinished epoch has summed up so far."""

    epoch: Count = 0  # epochs finished
    step: Count = 0  # steps taken, over all epochs
    epoch_step: Count = 0  # steps of the unfinished epoch
    loss_sum: Loss = 0.0  # of the unfinished epoch
    correct: Amount = 0.0  # a fraction of an image where targets are probabilities
    images: Count = 0
    seconds: Amount = 0.0


class LossScale(TypedDict):
    """The state of PyTorch's GradScaler."""

    scale: Amount
    growth_factor: Amount
    backoff_factor: Amount
    growth_interval: Ordinal
    _growth_tracker: Count


class Threads(TypedDict):
    """The number of CPU threads over a training."""

    fixed: bool  # whether the user chose it
    changes: Annotated[list[tuple[Count, Ordinal]], Meta(min_length=1)]  # first step, threads


class Notes(TypedDict, total=False):
    """What else is known of a checkpoint."""

    resnet56: Text  # the version that wrote it
    data: Text | None  # the fingerprint of the images
    weights: Text  # "averaged", "last", "shipped" or "imported"
    ema_decay: Share  # of the weights, once the training is finished
    ema_candidates: list[EmaCandidate]  # what it was chosen from
    teachers: list[Teacher]
    precision: Text
    execution: Text
    loss_scale: LossScale | None
    threads: Threads
    file: Text  # that it was imported from


@dataclass(frozen=True)
class _TensorFile:
    name: Annotated[str, Meta(pattern=r"^[\w.-]{1,200}\.safetensors$")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class _TensorFiles:
    model: _TensorFile
    training: _TensorFile


@dataclass(frozen=True)
class _Head:
    """The content of checkpoint.json."""

    format: Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
    network: Network
    position: Position
    notes: Notes
    files: _TensorFiles


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights and, for resuming, the state of its training."""

    network: Network
    model: Mapping[str, "Tensor"]  # the weights to use: the averaged ones where there are any
    training: Mapping[str, "Tensor"] = field(default_factory=dict)  # momentum, raw weights
    position: Position = field(default_factory=Position)
    notes: Mapping[str, Any] = field(default_factory=dict)  # see Notes


def save_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint; the old one stays whole until the new one is.

    Args:
        file: checkpoint.json; the tensor files are written beside it.
        checkpoint: what to write.

    Raises:
        NotFiniteError: a tensor has values that are not finite; the old one is intact.
        RunError: it could not be written (a full disk); the old one is intact.
    """
    import safetensors.torch

    if names := not_finite(checkpoint.model) + not_finite(checkpoint.training):
        raise NotFiniteError(f"values are not finite in {_some(names)}")
    directory = file.parent
    files = {}
    for part in ("model", "training"):
        tensors = {name: t.detach().contiguous() for name, t in getattr(checkpoint, part).items()}
        content = safetensors.torch.save(tensors)
        name = f"{part}-{checkpoint.position.step:08d}.safetensors"
        write_bytes(directory / name, content)
        files[part] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    head = {
        "format": FORMAT,
        "network": asdict(checkpoint.network),
        "position": asdict(checkpoint.position),
        "notes": dict(checkpoint.notes),
        "files": files,
    }
    check(head, _Head, str(file))
    write_json(file, head)
    named = {entry["name"] for entry in files.values()} | {file.name}
    for path in directory.iterdir():
        if path.name not in named:
            with contextlib.suppress(OSError):  # on Windows another process may read it
                path.unlink()


def load_checkpoint(file: Path, *, training: bool = False) -> Checkpoint:
    """Read the checkpoint; with `training`, also what only resuming needs.

    One that a training replaces meanwhile is read again.

    Raises:
        RunError: there is none, it is damaged, or a newer version wrote it.
    """
    head = _read_head(file)
    for _ in range(ATTEMPTS):
        try:
            return _load_parts(file, head, training)
        except RunError:
            newer = _read_head(file)
            if newer == head:
                raise
            head = newer
    raise RunError(f"{file} is replaced again and again; try once more")


def _read_head(file: Path) -> _Head:
    content = read_json(file)
    found = content.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise RunError(
            f"{file} is of format {found}, newer than this version reads ({FORMAT}); update "
            "resnet56"
        )
    head = check(content, _Head, str(file))
    return replace(head, notes=content["notes"])  # with what other versions write there


def _load_parts(file: Path, head: _Head, training: bool) -> Checkpoint:
    model = _read_tensors(file.parent, head.files.model)
    state = _read_tensors(file.parent, head.files.training) if training else {}
    return Checkpoint(head.network, model, state, head.position, dict(head.notes))


def _read_tensors(directory: Path, entry: _TensorFile) -> dict[str, "Tensor"]:
    import safetensors.torch

    path = directory / entry.name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise RunError(f"{path} is damaged: its checksum is not the one in checkpoint.json")
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # types that this version of the library does not know
        raise RunError(f"{path} is damaged: {one_line(error)}") from None
    if names := not_finite(tensors):
        raise RunError(f"{path} is of no use: values are not finite in {_some(names)}")
    return tensors


def not_finite(tensors: Mapping[str, "Tensor"]) -> list[str]:
    """The names of the floating-point tensors with values that are not finite."""
    import torch

    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    if not floating:
        return []
    # All at once, so that a GPU is waited for only once.
    finite = torch.stack([t.isfinite().all() for t in floating.values()]).tolist()
    return [name for name, good in zip(floating, finite, strict=True) if not good]


def require_fit(
    tensors: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"], what: str
) -> None:
    """RunError unless the tensors have the expected names, shapes and kinds of numbers."""
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    for problem, names in (("are missing", missing), ("do not belong there", unknown)):
        if names:
            raise RunError(f"{what}: {len(names)} tensors {problem} ({_some(names)})")
    for name, like in expected.items():
        found = tensors[name]
        if found.shape != like.shape or found.is_floating_point() != like.is_floating_point():
            raise RunError(
                f"{what}: {name} is {_size(found)} {found.dtype}, expected {_size(like)} "
                f"{like.dtype}"
            )


def _size(tensor: "Tensor") -> str:
    return "x".join(map(str, tensor.shape)) or "a single"


def _some(names: list[str]) -> str:
    return ", ".join([*map(one_line, names[:3]), *(["..."] if len(names) > 3 else [])])
