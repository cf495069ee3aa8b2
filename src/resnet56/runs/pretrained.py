"""Pretrained models: `weights/NAME.safetensors` and the model card `weights/NAME.json`.

The weights are stored in half precision and take less than 2 MB per model. The header of the
weight file declares the architecture, the classes and the normalization constants. The model card
documents the training run and the accuracy. Commands accept NAME in place of a run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from resnet56.errors import RunError, one_line
from resnet56.files import read_json, write_bytes, write_json
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

DIRECTORY = Path(__file__).parents[1] / "weights"
MAX_SIZE = 2_000_000  # bytes
HEAD = 512  # number of bytes to read at the start of a file to identify its format


def names() -> list[str]:
    """Return the names of all pretrained models."""
    return sorted(file.stem for file in DIRECTORY.glob("*.safetensors"))


def load(name: str) -> Checkpoint:
    """Load a pretrained model and convert its weights to single precision.

    Raises:
        RunError: there is no pretrained model with this name, or its file is damaged.
    """
    if name not in names():
        available = ", ".join(names()) or "none"
        raise RunError(f"no pretrained model named {name!r}; available: {available}")
    path = DIRECTORY / f"{name}.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = config_from_metadata(file.metadata() or {})
            model = {key: _to_float32(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # Parsers can raise any exception for a damaged file.
        raise RunError(f"{path} is damaged: {one_line(error)}; install the package again") from None
    return Checkpoint(config, model, metadata={"weights": "pretrained"})


def save(run: RunDirectory, name: str, directory: Path) -> Path:
    """Save the half-precision weights and the model card of a run in `directory` under `name`.

    The card contains the recipe and the evaluation of the run, if they exist. The evaluation uses
    the original weights, so evaluate the half-precision weights before a release.

    Returns:
        The path of the weight file.

    Raises:
        RunError: the run cannot be read, its weights overflow half precision, or the file would
            be too large.
    """
    import safetensors.torch

    checkpoint = run.load()
    half = {key: _to_half(key, tensor) for key, tensor in checkpoint.model.items()}
    content = safetensors.torch.save(half, metadata=config_to_metadata(checkpoint.config))
    if len(content) > MAX_SIZE:
        raise RunError(
            f"{run.path} is too large for a pretrained model: {len(content) / 1e6:.1f} MB, more "
            f"than {MAX_SIZE / 1e6:.0f} MB"
        )
    path = directory / f"{name}.safetensors"
    write_json(path.with_suffix(".json"), _card(run, checkpoint))
    # Write the weight file last, so that `names` lists only complete models.
    write_bytes(path, content)
    return path


def card(name: str) -> dict[str, Any]:
    """Return the model card, including the recipe and the evaluation.

    Raises RunError if reading fails.
    """
    return read_json(DIRECTORY / f"{name}.json")


def _card(run: RunDirectory, checkpoint: Checkpoint) -> dict[str, Any]:
    card_fields: dict[str, Any] = {"config": asdict(checkpoint.config)}
    card_fields["weights"] = checkpoint.metadata.get("weights", "final")
    if run.recipe_file.exists():
        card_fields["recipe"] = read_json(run.recipe_file)
    if evaluation := run.read_evaluation(checkpoint.progress.step):
        card_fields["evaluation"] = evaluation
    return card_fields


def config_to_metadata(config: ModelConfig) -> dict[str, str]:
    """Convert a configuration to the metadata of a safetensors or ONNX file."""
    return {"format": "1", **{key: json.dumps(value) for key, value in asdict(config).items()}}


def config_from_metadata(metadata: Mapping[str, str]) -> ModelConfig:
    """Convert the metadata of a safetensors or ONNX file to a configuration.

    Raises ValueError for invalid metadata.
    """
    if metadata.get("format") not in ("1", "pt"):  # Model hub libraries require "pt".
        raise ValueError(f"format {metadata.get('format')!r} is not supported by this version")
    try:
        values = {name: json.loads(metadata[name]) for name in ("arch", "classes", "mean", "std")}
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except RecursionError:
        raise ValueError("a value is nested too deeply") from None
    arch, classes = values["arch"], values["classes"]
    if not isinstance(arch, str) or not arch:
        raise ValueError("arch must be a non-empty string")
    if not isinstance(classes, list) or not all(isinstance(c, str) and c for c in classes):
        raise ValueError("classes must be a list of names")
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError("classes must be a list of at least two distinct names")
    mean, std = (_triple(values[name], name) for name in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError("std must be positive")
    return ModelConfig(arch, tuple(classes), mean, std)


def is_onnx(file: Path) -> bool:
    """Return whether a file is an ONNX model, based on its suffix or its first bytes."""
    if file.suffix.lower() == ".onnx":
        return True
    try:
        with file.open("rb") as stream:
            return file.is_file() and has_onnx_header(stream.read(HEAD))
    except OSError:
        return False


def has_onnx_header(head: bytes) -> bool:
    """Return whether `head` starts with the first fields of an ONNX model: version and producer."""
    return len(head) > 3 and head[0] == 0x08 and head[1] < 0x40 and head[2] in (0x12, 0x1A, 0x3A)


def _triple(values: object, name: str) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{name} must be a list of three numbers")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e6:  # This condition also rejects NaN.
            raise ValueError(f"{name} must be a list of three numbers")
    first, second, third = map(float, values)
    return first, second, third


def _to_float32(tensor: "Tensor") -> "Tensor":
    return tensor.float() if tensor.is_floating_point() else tensor


def _to_half(key: str, tensor: "Tensor") -> "Tensor":
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not bool(half.isfinite().all()):
        raise RunError(f"{key} has values that overflow half precision")
    return half
