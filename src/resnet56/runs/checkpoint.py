"""Checkpoints: the weights of a model, and the training state for resuming.

A checkpoint consists of several files. checkpoint.json contains the names and SHA-256 hashes of the
tensor files. `save_checkpoint` writes the new tensor files first, then checkpoint.json, and removes
the previous files last. The checkpoint on disk is therefore always complete, even after a power
failure.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from resnet56.errors import NotFiniteError, RunError, abbreviate, one_line
from resnet56.files import read_json, write_bytes, write_json
from resnet56.runs.schema import (
    MAX_INTEGER,
    Count,
    CustomPart,
    EmaCandidate,
    Fraction,
    InitialWeights,
    Loss,
    NonNegative,
    PositiveInt,
    Teacher,
    Text,
    check,
)

if TYPE_CHECKING:  # Commands that do not read tensors start without PyTorch.
    from torch import Tensor

FORMAT = 1  # version of the checkpoint format. Newer versions are rejected.
ATTEMPTS = 10  # number of attempts to read a checkpoint that a training run is replacing

Mean = Annotated[float, Meta(ge=-1000, le=1000)]
Deviation = Annotated[float, Meta(ge=1e-9, le=1000)]  # The lower bound avoids division by zero.


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, classes and normalization that the weights require."""

    arch: Text
    classes: Annotated[tuple[Text, ...], Meta(min_length=1)]
    mean: tuple[Mean, Mean, Mean]  # channel means of the training images, for pixels in [0, 1]
    std: tuple[Deviation, Deviation, Deviation]  # channel standard deviations

    def __post_init__(self) -> None:
        """Check that the class names are unique, because predictions use them as keys."""
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")


@dataclass(frozen=True)
class Progress:
    """The progress of a training run, with running totals for the unfinished epoch."""

    epoch: Count = 0  # number of finished epochs
    step: Count = 0  # number of training steps over all epochs
    epoch_step: Count = 0  # number of completed steps of the unfinished epoch
    loss_sum: Loss = 0.0  # sum of losses over the images processed in the unfinished epoch
    correct: NonNegative = 0.0  # number of correct predictions, fractional for soft targets
    images: Count = 0  # number of images processed in the unfinished epoch
    seconds: NonNegative = 0.0  # training time of the unfinished epoch


class LossScale(TypedDict):
    """The state of PyTorch's GradScaler."""

    scale: NonNegative
    growth_factor: NonNegative
    backoff_factor: NonNegative
    growth_interval: PositiveInt
    _growth_tracker: Count


class Threads(TypedDict):
    """The number of CPU threads during a training run."""

    fixed: bool  # whether the user set the number
    # Pairs of a step and the number of threads from this step on.
    changes: Annotated[list[tuple[Count, PositiveInt]], Meta(min_length=1)]


class CheckpointMetadata(TypedDict, total=False):
    """The metadata of a checkpoint."""

    resnet56: Text  # version of the package that wrote the checkpoint
    data: Text | None  # fingerprint of the data set
    weights: Text  # "ema", "final", "pretrained" or "imported"
    ema_decay: Fraction  # decay of the selected EMA, set at the end of the run
    ema_candidates: list[EmaCandidate]  # all EMAs of the run
    teachers: list[Teacher]  # teachers for knowledge distillation
    initial_weights: InitialWeights  # weights that the run started from
    custom: dict[str, CustomPart]  # custom parts, by name: model, optimizer, loss and augment
    optimizer: dict[str, Any]  # non-tensor state of a custom optimizer
    precision: Text  # fp32, bf16 or fp16
    execution: Text  # execution mode: eager, fused, native, cuda-graph or compiled
    loss_scale: LossScale | None  # null unless the precision is fp16
    threads: Threads  # number of CPU threads during the training run
    file: Text  # name of the file that was imported


@dataclass(frozen=True)
class _TensorFile:
    name: Annotated[str, Meta(pattern=r"^[\w.-]{1,200}\.safetensors$")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class _TensorFiles:
    model: _TensorFile
    training: _TensorFile


@dataclass(frozen=True)
class _Manifest:
    """The content of checkpoint.json."""

    format: Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
    config: ModelConfig
    progress: Progress
    metadata: CheckpointMetadata
    files: _TensorFiles


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model and, for resuming, its training state."""

    config: ModelConfig
    model: Mapping[str, "Tensor"]  # EMA weights if the run has any, otherwise the raw weights
    training: Mapping[str, "Tensor"] = field(default_factory=dict)  # optimizer state, raw weights
    progress: Progress = field(default_factory=Progress)
    metadata: Mapping[str, Any] = field(default_factory=dict)  # see CheckpointMetadata


def save_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint atomically. If writing fails, the old checkpoint remains intact.

    Args:
        file: path of checkpoint.json. The tensor files are written to the same directory.
        checkpoint: the checkpoint to write.

    Raises:
        NotFiniteError: a tensor has values that are not finite.
        RunError: the checkpoint cannot be written, for example because the disk is full.
    """
    import safetensors.torch

    if names := not_finite(checkpoint.model) + not_finite(checkpoint.training):
        raise NotFiniteError(f"values are not finite in {abbreviate(names)}")
    directory = file.parent
    files = {}
    for part in ("model", "training"):
        content = safetensors.torch.save(_separate(getattr(checkpoint, part)))
        name = f"{part}-{checkpoint.progress.step:08d}.safetensors"
        write_bytes(directory / name, content)
        files[part] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {
        "format": FORMAT,
        "config": asdict(checkpoint.config),
        "progress": asdict(checkpoint.progress),
        "metadata": dict(checkpoint.metadata),
        "files": files,
    }
    check(manifest, _Manifest, str(file))
    write_json(file, manifest)
    named = {entry["name"] for entry in files.values()} | {file.name}
    for path in directory.iterdir():
        if path.name not in named:
            # On Windows, another process may keep the file open.
            with contextlib.suppress(OSError):
                path.unlink()


def _separate(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return contiguous tensors that do not share memory.

    Copy shared tensors, such as tied weights.
    """
    separate: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        memory = contiguous.untyped_storage().data_ptr()
        separate[name] = contiguous.clone() if memory in used else contiguous
        used.add(memory)
    return separate


def load_checkpoint(file: Path, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint, and retry if a training run replaces it while it is being read.

    Args:
        file: path of checkpoint.json.
        training: if True, also read the training state, which is required to resume.

    Raises:
        RunError: the checkpoint does not exist, is damaged, or has a newer format.
    """
    manifest = _read_manifest(file)
    for _ in range(ATTEMPTS):
        try:
            return _load_parts(file, manifest, training)
        except RunError:
            newer = _read_manifest(file)
            if newer == manifest:
                raise
            manifest = newer
    raise RunError(f"{file} is being replaced continuously; try again")


def _read_manifest(file: Path) -> _Manifest:
    content = read_json(file)
    found = content.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise RunError(
            f"{file} has format {found}, but this version of resnet56 supports formats up to "
            f"{FORMAT}; update resnet56"
        )
    manifest = check(content, _Manifest, str(file))
    # Keep the original metadata, because `check` omits unknown fields.
    return replace(manifest, metadata=content["metadata"])


def _load_parts(file: Path, manifest: _Manifest, training: bool) -> Checkpoint:
    model = _read_tensors(file.parent, manifest.files.model)
    state = _read_tensors(file.parent, manifest.files.training) if training else {}
    return Checkpoint(manifest.config, model, state, manifest.progress, dict(manifest.metadata))


def _read_tensors(directory: Path, entry: _TensorFile) -> dict[str, "Tensor"]:
    import safetensors.torch

    path = directory / entry.name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise RunError(f"{path} is damaged: its checksum differs from the one in checkpoint.json")
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # for example, dtypes that this version of safetensors lacks
        raise RunError(f"{path} is damaged: {one_line(error)}") from None
    if names := not_finite(tensors):
        raise RunError(f"{path} is unusable: values are not finite in {abbreviate(names)}")
    return tensors


def not_finite(tensors: Mapping[str, "Tensor"]) -> list[str]:
    """Return the names of floating-point tensors with values that are not finite."""
    import torch

    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    if not floating:
        return []
    # Stack the results to synchronize with a GPU only once.
    finite = torch.stack([t.isfinite().all() for t in floating.values()]).tolist()
    return [name for name, is_finite in zip(floating, finite, strict=True) if not is_finite]


def require_fit(
    tensors: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"], source: str
) -> None:
    """Raise RunError unless the tensors match `expected`.

    The names and shapes must match. A floating-point tensor matches only a floating-point tensor.
    """
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    for problem, names in (("missing", missing), ("unexpected", unknown)):
        if names:
            raise RunError(f"{source}: {len(names)} {problem} tensors ({abbreviate(names)})")
    for name, template in expected.items():
        found = tensors[name]
        is_floating = found.is_floating_point()
        if found.shape != template.shape or is_floating != template.is_floating_point():
            raise RunError(
                f"{source}: {name} is {_size(found)} {found.dtype}; expected {_size(template)} "
                f"{template.dtype}"
            )


def _size(tensor: "Tensor") -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
