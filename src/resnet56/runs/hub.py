"""Find the weight file in a model hub directory and read the configuration of the model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet56.errors import RunError, abbreviate, one_line
from resnet56.runs.layouts import Triple
from resnet56.runs.pretrained import config_from_metadata

MAX_CLASSES = 100_000  # maximum number of classes of a model
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # standard names, in order of preference
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl"}
ARCH_PATTERN = r"plain\d{1,4}|resnet\d{1,4}(-b|-bottleneck)?"  # architecture names of this package


def has_weights(directory: Path) -> bool:
    """Return whether a directory contains a weight file. Raises RunError if reading fails."""
    return bool(_weight_files(directory))


def find_weights(directory: Path) -> Path:
    """Return the weight file in a model hub directory.

    Raises:
        RunError: the directory cannot be read, contains no weight file, or contains several weight
            files, none of which has a standard name.
    """
    files = _weight_files(directory)
    standard = [file for name in WEIGHT_FILES for file in files if file.name == name]
    if standard or len(files) == 1:
        return (standard or files)[0]
    if files:
        raise RunError(
            f"{directory} contains several checkpoints ({abbreviate(files)}); choose one of them"
        )
    raise RunError(
        f"{directory} contains neither a run nor weights; choose a run directory, a checkpoint "
        "file or a model hub directory"
    )


def _weight_files(directory: Path) -> list[Path]:
    try:
        files = sorted(directory.iterdir())
    except OSError as error:
        raise RunError(f"cannot read {directory}: {error.strerror or error}") from None
    return [file for file in files if file.suffix.lower() in WEIGHT_SUFFIXES]


@dataclass(frozen=True)
class DeclaredConfig:
    """The configuration that a model file or its config.json declares."""

    arch: str | None = None
    classes: tuple[str, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    file: str = ""  # name of the file that declares the configuration

    def missing(self) -> list[str]:
        """Return the undeclared fields among classes, mean and std."""
        required = {"classes": self.classes, "mean": self.mean, "std": self.std}
        return [name for name, value in required.items() if value is None]


def declared_config(file: Path, metadata: Mapping[str, str]) -> DeclaredConfig:
    """Read the configuration from a weight file's metadata, or from the config.json next to it.

    Raises:
        RunError: the metadata or config.json is invalid.
    """
    if "arch" in metadata and "classes" in metadata:
        try:
            config = config_from_metadata(metadata)
        except ValueError as error:
            raise RunError(f"{file} has invalid metadata: {one_line(error)}") from None
        return DeclaredConfig(config.arch, config.classes, config.mean, config.std, file.name)
    config_file = file.with_name("config.json")
    return _read_config(config_file) if config_file.is_file() else DeclaredConfig()


def _read_config(file: Path) -> DeclaredConfig:
    """Read a config.json file written by this package, timm or Transformers."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise RunError(f"{file} is damaged: it is not a JSON object")
    inner = config.get("pretrained_cfg")  # key of timm
    merged = {**config, **(inner if isinstance(inner, dict) else {})}
    arch = merged.get("architecture")
    if not isinstance(arch, str) or not re.fullmatch(ARCH_PATTERN, arch):
        arch = None
    # In other projects, a "resnet56" can have different shortcuts, so the architecture is inferred
    # from the tensor shapes, not from the name.
    if "mean" not in config or "id2label" not in config:
        arch = None
    return DeclaredConfig(
        arch,
        _labels(merged),
        _triple(merged.get("mean")),
        _triple(merged.get("std")),
        file.name,
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the declared class names, or None if they are missing, invalid or not distinct."""
    labels = config.get("label_names")  # key of timm
    by_index = config.get("id2label")  # key of this package and of Transformers
    if not isinstance(labels, list) and isinstance(by_index, dict):
        labels = [by_index.get(str(index)) for index in range(len(by_index))]
    if not isinstance(labels, list) or not labels or len(labels) > MAX_CLASSES:
        return None
    if not all(isinstance(label, str) and label for label in labels):
        return None
    return tuple(labels) if len(set(labels)) == len(labels) else None


def _triple(value: object) -> Triple | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    if not all(isinstance(x, int | float) and abs(x) < 1e6 for x in value):
        return None
    first, second, third = map(float, value)
    return first, second, third
