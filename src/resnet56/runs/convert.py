"""Checkpoints that other programs wrote, as runs: renamed, checked, never executed.

Read are state dicts, plain or in the usual wrappings, of three layouts besides our own:
akamaster/pytorch_resnet_cifar10 (`layer1.0.conv1`, `linear`), chenyaofo/pytorch-cifar-models and
torchvision (`layer1.0.downsample.0`, `fc`).
"""

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from resnet56.data.cifar import CIFAR10
from resnet56.errors import RunError, UsageError, one_line
from resnet56.model import Architecture, ResNet
from resnet56.runs.checkpoint import Checkpoint, Network

Triple = tuple[float, float, float]

# The averaged weights first: where there are any, they are the ones to use.
WRAPPINGS = ("state_dict_ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
# A pickled argparse.Namespace, which training scripts keep beside their weights, holds data only.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
_IGNORED = {"n_averaged"}  # the counter of PyTorch's AveragedModel

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR: dict[int, tuple[Triple, Triple]] = {  # as chenyaofo's models, and many others, have them
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint as one of ours, and what had to be assumed."""

    checkpoint: Checkpoint
    remarks: tuple[str, ...]


def read(
    file: Path,
    arch: str | None = None,
    *,
    mean: Triple | None = None,
    std: Triple | None = None,
    classes: Sequence[str] = (),
) -> Imported:
    """The network in a foreign checkpoint.

    Args:
        file: what `torch.save` wrote, or safetensors.
        arch: its architecture; by default the one whose names and shapes fit.
        mean, std: of its training images, in units of [0, 1]; by default those that the layout's
            authors used.
        classes: their names, in the order of the outputs; CIFAR-10's by default.

    Raises:
        RunError: the file cannot be read, would run code, or fits no such network.
        UsageError: mean, std or classes are missing or do not fit.
    """
    found = _state_dict(file)
    renamed = {_renamed(key): tensor for key, tensor in found.items()}
    fitting = next((name for name in _candidates(renamed) if not _misfits(renamed, name)), None)
    arch = arch or fitting
    if arch is None:
        raise RunError(f"{file} fits no network of ours: {_shown(found)}; say which with --arch")
    if misfits := _misfits(renamed, arch):
        hint = f"; it fits --arch {fitting}" if fitting else ""
        raise RunError(f"{file} does not fit {arch}: {'; '.join(misfits)}{hint}")
    outputs = len(renamed["fc.bias"])
    constants, whose = _constants(found, outputs)
    remarks = []
    if mean is None or std is None:
        if constants is None:
            raise UsageError(f"a network of {outputs} classes needs --mean and --std")
        mean, std = mean or constants[0], std or constants[1]
        remarks.append(f"mean {mean} and std {std}: {whose}, as --mean and --std do not say")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UsageError(f"--mean must be numbers and --std above 0, not {mean} and {std}")
    network = Network(arch, _class_names(classes, outputs), mean, std)
    model = _tensors_like(_expected(arch, outputs), renamed, file)
    notes = {"weights": "imported", "file": file.name}
    return Imported(Checkpoint(network, model, notes=notes), tuple(remarks))


def _state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors in a file, by their keys without wrappings and prefixes."""
    content = _unwrapped(_safetensors(file) if file.suffix == ".safetensors" else _torch_file(file))
    if not isinstance(content, Mapping):
        raise RunError(f"{file} holds {_kind(content)}, not a state dict")
    tensors = {
        _stripped(key): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    tensors = {key: value for key, value in tensors.items() if key not in _IGNORED}
    if not tensors:
        keys = ", ".join(one_line(key) for key in list(content)[:5]) or "nothing"
        raise RunError(f"{file} holds no state dict; in it is: {keys}")
    odd = [key for key, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise RunError(f"{file} holds tensors that are not plain numbers: {_some(odd)}")
    return tensors


def _unwrapped(content: Any) -> Any:
    """What is in the usual wrappings: a few of them, as a damaged one may hold itself."""
    for _ in WRAPPINGS:
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in WRAPPINGS if _is_dict(content.get(key))), None)
        if inner is None:
            break
        content = inner
    return content


def _is_plain(tensor: Tensor) -> bool:
    """Whether its real numbers lie in memory one by one; of others not even the size is certain."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return False
    return not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())


def _safetensors(file: Path) -> Any:
    try:
        return safetensors.torch.load(file.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise RunError(f"{file} is damaged: {error}") from None


def _torch_file(file: Path) -> Any:
    """What `torch.save` wrote, by an unpickler that makes tensors and containers, no more."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # about old formats
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        # PyTorch goes on to explain how to read such a file all the same; we do not.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {named[1]}" if named else "asks for more than tensors"
        raise RunError(
            f"{file} {what}, which could run code: it was not read; save the state dict alone"
        ) from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise RunError(f"{file} is no whole checkpoint: {one_line(error)}") from None


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _stripped(key: str) -> str:
    """Without what data parallelism, compilation and wrappers put before or into the names."""
    key = key.replace("_orig_mod.", "")
    while prefix := next((prefix for prefix in PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _renamed(key: str) -> str:
    """A foreign layout's name as ours."""
    key = re.sub(r"^layer(\d+)\.", r"stage\1.", key)
    key = re.sub(r"^linear\.", "fc.", key)
    return key.replace(".downsample.", ".shortcut.")


def _candidates(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Architectures of as many blocks as the first stage has."""
    found = (re.match(r"stage1\.(\d+)\.", key) for key in state)
    numbers = [int(match[1]) for match in found if match]
    blocks = 1 + max((number for number in numbers if number < len(state)), default=0)
    yield f"resnet{6 * blocks + 2}"
    yield f"resnet{6 * blocks + 2}-b"
    yield f"resnet{9 * blocks + 2}-bottleneck"


def _expected(arch: str, classes: int) -> dict[str, Tensor]:
    """The network's state dict: names, shapes and types without values."""
    architecture = Architecture.parse(arch)
    with torch.device("meta"):
        model = ResNet(architecture.depth, architecture.block, architecture.shortcut, classes)
    return model.state_dict()


def _misfits(state: Mapping[str, Tensor], arch: str) -> list[str]:
    """What keeps the tensors from being that network's, in words; empty if nothing does."""
    bias = state.get("fc.bias")
    classes = len(bias) if bias is not None and bias.ndim == 1 and len(bias) > 1 else 10
    expected = _expected(arch, classes)
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    extra = [key for key in state if key not in expected]
    differ = [
        f"{key} is {_size(state[key])}, not {_size(tensor)}"
        for key, tensor in expected.items()
        if key in state and not _is_counter(key) and state[key].shape != tensor.shape
    ]
    words = (("missing", missing), ("unexpected", extra), ("of another shape", differ))
    return [f"{len(keys)} {what} ({_some(keys)})" for what, keys in words if keys]


def _is_counter(key: str) -> bool:
    """Batch norm's count of steps, which old checkpoints lack and inference ignores."""
    return key.endswith("num_batches_tracked")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(words: Sequence[str]) -> str:
    return ", ".join([*map(one_line, words[:3]), *(["..."] if len(words) > 3 else [])])


def _shown(found: Mapping[str, Tensor]) -> str:
    return f"it has {len(found)} tensors ({_some(list(found))})"


def _constants(
    found: Mapping[str, Tensor], outputs: int
) -> tuple[tuple[Triple, Triple] | None, str]:
    """Mean and deviation that the layout's authors normalise with, and whose they are."""
    plain = not any(".shortcut." in key or ".downsample." in key for key in found)
    if "linear.weight" in found and plain:
        return IMAGENET, "ImageNet's, which akamaster's networks are trained with"
    return CIFAR.get(outputs), f"CIFAR-{outputs}'s"


def _class_names(names: Sequence[str], outputs: int) -> tuple[str, ...]:
    if not names and outputs == len(CIFAR10):
        return CIFAR10
    if not names:
        raise UsageError(f"the network has {outputs} classes; name them with --classes")
    if len(names) != outputs or len(set(names)) != outputs:
        raise UsageError(f"--classes has {len(set(names))} names, the network {outputs} outputs")
    return tuple(names)


def _tensors_like(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The tensors in our order and types."""
    model = {}
    for key, like in expected.items():
        if _is_counter(key):
            model[key] = torch.zeros((), dtype=torch.int64)
            continue
        if not state[key].is_floating_point():
            raise RunError(f"{file} is of no use: {key} holds {state[key].dtype}, not floats")
        model[key] = state[key].to(like.dtype).clone()
        if not bool(model[key].isfinite().all()):
            raise RunError(f"{file} is of no use: {key} has values that are not finite")
    return model
