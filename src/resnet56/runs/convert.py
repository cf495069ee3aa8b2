"""Convert checkpoints from other projects without running code from their files.

This module finds a model anywhere in a file by the names and shapes of tensors. It supports the
files of this package and the layouts of akamaster/pytorch_resnet_cifar10,
chenyaofo/pytorch-cifar-models, torchvision, osmr/imgclsmob, hysts/pytorch_image_classification and
D-X-Y/ResNeXt-DenseNet.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet56.data.class_names import CIFAR10, CIFAR100
from resnet56.errors import RunError, UsageError, abbreviate, escape, one_line, option
from resnet56.model import WIDTHS, Architecture, build
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.hub import DeclaredConfig, declared_config, find_weights
from resnet56.runs.layouts import IMAGENET, Constants, Triple
from resnet56.runs.matching import (
    describe_mismatch,
    expected_tensors,
    is_counter,
    matching_arch,
    num_outputs,
)
from resnet56.runs.state_dicts import StateDict, describe_content, find_state_dicts
from resnet56.runs.tensor_files import Contents, open_tensors


@dataclass(frozen=True)
class ImportedModel:
    """A converted checkpoint."""

    checkpoint: Checkpoint
    remarks: tuple[str, ...]  # messages about assumed values and ignored content


def read(
    path: Path,
    arch: str | None = None,
    *,
    mean: Triple | None = None,
    std: Triple | None = None,
    classes: Sequence[str] = (),
    prefix: str | None = None,
    require_declared: bool = False,
) -> ImportedModel:
    """Read the model from a file or a model hub directory.

    The metadata of the file, or the config.json next to it, can declare the architecture, the
    classes and the normalization constants. Settings that are not declared have default values. The
    remarks list these values.

    Args:
        path: a file written by `torch.save`, a safetensors file, an ONNX file exported by this
            package, or a directory that contains one of them.
        arch: the architecture. By default, the architecture with matching names and shapes.
        mean, std: normalization constants for pixels in [0, 1]. By default, the declared constants
            or, if there are none, the constants that the authors of the layout used.
        classes: class names in the order of the outputs. By default, the declared names or, if
            there are none, the classes of CIFAR-10 or CIFAR-100.
        prefix: path of the model inside the file. Required if the file contains several models.
        require_declared: if True, reject a file that does not declare mean, std and classes.

    Raises:
        RunError: the file cannot be read, could run code, or matches no supported architecture.
        UsageError: mean, std or classes are missing or do not match the model.
        MissingExtraError: the file is in ONNX format and the extra `onnx` is not installed.
    """
    file = find_weights(path) if path.is_dir() else path
    with open_tensors(file) as contents:
        declared = declared_config(file, contents.metadata)
        if require_declared and (missing := declared.missing()):
            raise RunError(
                f"{file} does not declare its {', '.join(missing)}; import it first: resnet56 "
                f"import {file} --out RUN"
            )
        state_dict, matched, remarks = _choose(file, contents, arch or declared.arch, prefix)
        outputs = num_outputs(state_dict.tensors)
        defaults = _default_constants(state_dict, outputs)
        constants, constant_remarks = _resolve_constants(mean, std, declared, outputs, defaults)
        names, class_remarks = _resolve_classes(classes, declared, outputs)
        config = ModelConfig(matched, names, *constants)
        model = _load_weights(state_dict, config, file)
    if contents.ignored:
        remarks.append(f"ignored objects that are not tensors: {abbreviate(contents.ignored)}")
    metadata = {"weights": "imported", "file": file.name}
    remarks += class_remarks + constant_remarks
    return ImportedModel(Checkpoint(config, model, metadata=metadata), tuple(remarks))


def override(
    checkpoint: Checkpoint,
    name: str,
    arch: str | None,
    mean: Triple | None,
    std: Triple | None,
    classes: Sequence[str],
) -> ImportedModel:
    """Replace the normalization constants and class names of a checkpoint of this package.

    Raises:
        RunError: the checkpoint does not have the architecture `arch`.
        UsageError: mean, std or classes do not match the model.
    """
    old = checkpoint.config
    if arch not in (None, old.arch):
        raise RunError(f"{name} is {old.arch}, not {arch}")
    declared = DeclaredConfig(old.arch, old.classes, old.mean, old.std, name)
    constants, remarks = _resolve_constants(mean, std, declared, len(old.classes))
    names, class_remarks = _resolve_classes(classes, declared, len(old.classes))
    metadata = {"weights": "imported", "file": Path(name).name}
    config = ModelConfig(old.arch, names, *constants)
    remarks += class_remarks
    return ImportedModel(Checkpoint(config, checkpoint.model, metadata=metadata), tuple(remarks))


def _choose(
    file: Path, contents: Contents, arch: str | None, prefix: str | None
) -> tuple[StateDict, str, list[str]]:
    """Return the state dict of the model, its architecture, and remarks about the choice."""
    candidates = find_state_dicts(contents)
    if not candidates:
        raise RunError(f"{file} {describe_content(contents)}")
    if prefix is not None:
        start = prefix.strip(".")
        chosen = [c for c in candidates if f"{c.path}.".startswith(f"{start}." if start else "")]
        if not chosen:
            paths = abbreviate([candidate.path for candidate in candidates])
            raise UsageError(f"{option('prefix', escape(prefix))} is not in {file}; found: {paths}")
        candidates = chosen
    matches = [(c, matched) for c in candidates if (matched := matching_arch(c.tensors, arch))]
    if not matches:
        raise RunError(describe_mismatch(file, candidates[0].tensors, arch))
    averaged = [match for match in matches if match[0].averaged]
    if len(matches) > 1 and not (len(averaged) == 1 and len(matches) == 2):
        paths = ", ".join(escape(c.path) or "top level" for c, _ in matches[:5])
        raise RunError(
            f"{file} contains {len(matches)} models ({paths}); choose one: resnet56 import {file} "
            "--prefix PATH"
        )
    remarks = []
    state_dict, name = (averaged or matches)[0]
    if len(matches) == 2:
        other = next(c for c, _ in matches if c is not state_dict)
        remarks.append(f"using the EMA weights {escape(state_dict.path)}, not {escape(other.path)}")
    if arch is None and Architecture.parse(name).shortcut == "A":
        plain = name.replace("resnet", "plain")
        remarks.append(
            f"assuming {name}; for {plain}, whose tensors have the same shapes, use "
            f"{option('arch', plain)}"
        )
    expected = expected_tensors(name, state_dict.tensors)
    extra = [*state_dict.siblings, *(key for key in state_dict.tensors if key not in expected)]
    if extra:
        remarks.append(f"ignored tensors that do not belong to the model: {abbreviate(extra)}")
    return state_dict, name, remarks


def _default_constants(state_dict: StateDict, outputs: int) -> tuple[Constants | None, str]:
    """Return the layout's default normalization constants and a phrase that states their origin."""
    has_projections = any(".shortcut." in key for key in state_dict.tensors)
    if state_dict.head == "linear.weight" and not has_projections:
        return IMAGENET, "of ImageNet, which akamaster used"
    return state_dict.layout.constants.get(outputs), f"of CIFAR-{outputs}"


def _resolve_constants(
    mean: Triple | None,
    std: Triple | None,
    declared: DeclaredConfig,
    outputs: int,
    defaults: tuple[Constants | None, str] = (None, ""),
) -> tuple[Constants, list[str]]:
    """Choose mean and std from the arguments, the file or the defaults.

    Return these constants and a list of remarks on the choice.
    """
    remarks = []
    for name, given, in_file in (("mean", mean, declared.mean), ("std", std, declared.std)):
        if given and in_file and not all(map(math.isclose, given, in_file)):
            remarks.append(
                f"using {option(name)} {given}, although {declared.file} declares {in_file}"
            )
    mean, std = mean or declared.mean, std or declared.std
    if mean is None or std is None:
        constants, origin = defaults
        if constants is None:
            raise UsageError(
                f"a model with {outputs} classes requires {option('mean')} and {option('std')}"
            )
        mean, std = mean or constants[0], std or constants[1]
        remarks.append(
            f"assuming mean {mean} and std {std} ({origin}); override with {option('mean')} and "
            f"{option('std')}"
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UsageError(
            f"{option('mean')} must be finite, and {option('std')} must be finite and positive; "
            f"got {mean} and {std}"
        )
    return (mean, std), remarks


def _resolve_classes(
    names: Sequence[str], declared: DeclaredConfig, outputs: int
) -> tuple[tuple[str, ...], list[str]]:
    """Choose class names from the arguments, the file or a CIFAR data set.

    Return the names and a list of remarks on the choice.
    """
    if names:
        if len(names) != outputs or len(set(names)) != outputs:
            raise UsageError(
                f"{option('classes')} has {len(set(names))} different names, but the model has "
                f"{outputs} outputs"
            )
        if declared.classes and tuple(names) != declared.classes:
            return tuple(names), [
                f"using {option('classes')}, although {declared.file} declares other names"
            ]
        return tuple(names), []
    if declared.classes:
        if len(declared.classes) != outputs:
            raise RunError(
                f"{declared.file} declares {len(declared.classes)} classes, but the model has "
                f"{outputs} outputs; set the names with resnet56 import --classes"
            )
        return declared.classes, []
    if outputs == len(CIFAR10):
        return CIFAR10, []
    if outputs == len(CIFAR100):
        return CIFAR100, [f"assuming the classes of CIFAR-100; override with {option('classes')}"]
    raise UsageError(
        f"the names of the {outputs} classes are unknown; set {option('classes')} to the names, a "
        "file with one name per line, cifar10, cifar100, digits or a run"
    )


def _load_weights(state_dict: StateDict, config: ModelConfig, file: Path) -> dict[str, Tensor]:
    """Read the tensors and convert them to the dtypes and channel order of this package."""
    model = {}
    for key, expected in expected_tensors(config.arch, state_dict.tensors).items():
        if is_counter(key):
            model[key] = torch.zeros((), dtype=torch.int64)
            continue
        stored = state_dict.tensors[key]
        try:
            values = stored.read()
            dtype = values.dtype
            # Copy the values, because two names in the file can refer to one tensor.
            values = values.to(expected.dtype, copy=True, memory_format=torch.contiguous_format)
        except Exception as error:  # Parsers can raise any exception for a damaged file.
            raise RunError(
                f"{file} is damaged: {key} of dtype {one_line(stored.type)} cannot be read: "
                f"{one_line(error)}"
            ) from None
        if values.shape != expected.shape:
            raise RunError(
                f"{file} is damaged: {key} has shape {tuple(values.shape)}; expected "
                f"{tuple(expected.shape)}"
            )
        if not dtype.is_floating_point:
            raise RunError(
                f"{file} is unusable: {key} has dtype {dtype}; expected a floating-point dtype"
            )
        if not bool(values.isfinite().all()):
            raise RunError(f"{file} is unusable: {key} has values that are not finite")
        model[key] = values
    if state_dict.layout.pads_after and Architecture.parse(config.arch).shortcut == "A":
        _center_padding(model)
    if not _has_finite_outputs(config, model):
        raise RunError(f"{file} is unusable: the outputs of the model are not finite")
    return model


def _center_padding(model: dict[str, Tensor]) -> None:
    """Permute channels in place, for shortcuts that add zero channels on both sides.

    In the layout of the file, shortcut A appends all of its zero channels at the end. The order of
    channels does not matter if all layers use the same order: `conv2` and `bn2` write the channels
    of a stage, and the classifier or `conv1` of the next block reads them.
    """
    order = torch.arange(WIDTHS[0])  # maps channels of this package to channels of the layout
    for stage, width in enumerate(WIDTHS, start=1):
        before = order
        added = torch.arange(len(order), width)
        half = len(added) // 2
        order = torch.cat((added[:half], order, added[half:]))
        blocks = sum(key.startswith(f"stage{stage}.") and key.endswith("conv2.weight")
                     for key in model)  # fmt: skip
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            reads = before if block == 0 else order
            model[f"{name}.conv1.weight"] = model[f"{name}.conv1.weight"][:, reads].contiguous()
            for part in ("conv2.weight", "bn2.weight", "bn2.bias", "bn2.running_mean",
                         "bn2.running_var"):  # fmt: skip
                model[f"{name}.{part}"] = model[f"{name}.{part}"][order].contiguous()
    model["fc.weight"] = model["fc.weight"][:, order].contiguous()


@torch.inference_mode()
def _has_finite_outputs(config: ModelConfig, model: Mapping[str, Tensor]) -> bool:
    """Return whether the outputs for a uniform image and a random image are finite."""
    net = build(config.arch, classes=len(config.classes))
    net.load_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 32, 32, generator=generator)
    images = torch.cat((torch.full_like(noise, 0.5), noise))
    mean, std = (torch.tensor(constant)[:, None, None] for constant in (config.mean, config.std))
    return bool(net.eval()((images - mean) / std).isfinite().all())
