"""Match the tensors of a state dict to an architecture by name and shape."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from resnet56.errors import abbreviate, one_line, option
from resnet56.model import WIDTHS, Architecture, ResNet
from resnet56.runs.hub import MAX_CLASSES
from resnet56.runs.tensor_files import StoredTensor

# Matches the first component of names that belong to the training state, not to the model.
_TRAINING_STATE = re.compile(
    r"loss|criterion|metric|accuracy|(^|_)(acc|auc|auroc|f1|confmat)\d*($|_)|^(train|val|test)_"
    r"|n_averaged|initted|(^|_)(step|epoch|updates?|decay|temperature|centers?)($|_)"
    r"|^(pixel_)?(mean|std)$|^normali[sz]"
)

StoredTensors = Mapping[str, StoredTensor]  # tensors by their names in this package


def matching_arch(tensors: StoredTensors, arch: str | None = None) -> str | None:
    """Return the name of the architecture that the tensors match, or None.

    Args:
        tensors: the tensors of a state dict.
        arch: the only architecture to try. By default, all architectures with the same number of
            blocks.
    """
    names = [arch] if arch else _possible_archs(tensors)
    return next((name for name in names if not _mismatches(tensors, name)), None)


def describe_mismatch(file: Path, tensors: StoredTensors, arch: str | None) -> str:
    """Return an error message for tensors that do not match `arch`.

    If `arch` is None, the message states why the tensors match no architecture.
    """
    if special := [key for key, tensor in tensors.items() if not tensor.plain]:
        names = abbreviate(special)
        return f"{file} contains sparse, quantized, complex or meta tensors: {names}"
    if arch is not None:
        other = matching_arch(tensors)
        hint = f"; it matches {option('arch', other)}" if other else ""
        return f"{file} does not match {arch}: {'; '.join(_mismatches(tensors, arch))}{hint}"
    stages = {match[1] for key in tensors if (match := re.match(r"stage(\d)\.", key))}
    stem = tensors["conv1.weight"].shape
    if stages and stages != {"1", "2", "3"}:
        reason = (
            f"it has {len(stages)} stages, but ResNets for 32x32 images have 3 (ResNets for "
            "ImageNet have 4)"
        )
    elif stem != (WIDTHS[0], 3, 3, 3):
        reason = f"its first convolution has shape {_shape_text(stem)}, not {WIDTHS[0]}x3x3x3"
    else:
        closest = min(_possible_archs(tensors), key=lambda name: _distance(tensors, name))
        differences = "; ".join(_mismatches(tensors, closest))
        reason = f"the closest is {closest}, with these differences: {differences}"
    return f"{file} matches no supported architecture: {reason}"


def expected_tensors(arch: str, tensors: StoredTensors) -> dict[str, Tensor]:
    """Return the state dict of an architecture, on the meta device.

    The classifier has as many outputs as the classifier in `tensors`.
    """
    return _expected(arch, num_outputs(tensors))


def num_outputs(tensors: StoredTensors) -> int:
    """Return the size of the classifier's bias, or 10 if the bias is missing or invalid."""
    bias = tensors.get("fc.bias")
    if bias is None or len(bias.shape) != 1 or not 1 < bias.shape[0] <= MAX_CLASSES:
        return 10
    return bias.shape[0]


def is_counter(key: str) -> bool:
    """Return whether `key` names a batch norm counter. Old checkpoints contain no counters."""
    return key.endswith("num_batches_tracked")


def _possible_archs(tensors: StoredTensors) -> Iterator[str]:
    """Yield the architectures whose stages have as many blocks as the first stage in `tensors`.

    Plain networks are omitted because they have the same tensors as networks with shortcut A.
    """
    matches = (re.match(r"stage1\.(\d{1,4})\.", key) for key in tensors)
    numbers = [int(match[1]) for match in matches if match]
    blocks = 1 + max((number for number in numbers if number < len(tensors)), default=0)
    yield f"resnet{6 * blocks + 2}"
    yield f"resnet{6 * blocks + 2}-b"
    yield f"resnet{9 * blocks + 2}-bottleneck"


def _distance(tensors: StoredTensors, arch: str) -> int:
    """Return the number of tensors whose names or shapes differ from those of an architecture."""
    expected = expected_tensors(arch, tensors)
    shared = expected.keys() & tensors.keys()
    differ = [key for key in shared if tensors[key].shape != expected[key].shape]
    return len(expected.keys() ^ tensors.keys()) + len(differ)


@lru_cache(maxsize=8)
def _expected(arch: str, outputs: int) -> dict[str, Tensor]:
    architecture = Architecture.parse(arch)
    with torch.device("meta"):
        model = ResNet(architecture.depth, architecture.block, architecture.shortcut, outputs)
    return model.state_dict()


def _mismatches(tensors: StoredTensors, arch: str) -> list[str]:
    """Return descriptions of the differences between the tensors and an architecture."""
    expected = expected_tensors(arch, tensors)
    missing = [key for key in expected if key not in tensors and not is_counter(key)]
    extra = [
        key
        for key in tensors
        if key not in expected and not _TRAINING_STATE.search(key.split(".")[0])
    ]
    shared = [key for key in expected if key in tensors and not is_counter(key)]
    differ = [
        f"{key} is {_shape_text(tensors[key].shape)}, not {_shape_text(expected[key].shape)}"
        for key in shared
        if tensors[key].plain and tensors[key].shape != expected[key].shape
    ]
    special = [key for key in shared if not tensors[key].plain]
    problems = (
        ("missing", missing),
        ("unexpected", extra),
        ("of a different shape", differ),
        ("unsupported", special),
    )
    return [f"{len(keys)} {problem} ({abbreviate(keys)})" for problem, keys in problems if keys]


def _shape_text(shape: Sequence[int]) -> str:
    return one_line("x".join(map(str, shape))) if shape else "a scalar"
