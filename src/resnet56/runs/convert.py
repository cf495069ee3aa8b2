"""Convert checkpoints of other projects without running code in them.

A state dict is recognized by its names and shapes, at any depth inside a file. Supported are the
layouts of this package, akamaster/pytorch_resnet_cifar10, chenyaofo/pytorch-cifar-models,
torchvision, osmr/imgclsmob, hysts/pytorch_image_classification and D-X-Y/ResNeXt-DenseNet, and the
files that this package exports.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet56.data.class_names import CIFAR10, CIFAR100
from resnet56.data.pickles import Stub
from resnet56.errors import RunError, UsageError, escape, one_line
from resnet56.model import WIDTHS, Architecture, ResNet, build
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.pretrained import config_from_metadata
from resnet56.runs.tensor_files import Contents, StoredTensor, open_tensors

Triple = tuple[float, float, float]
Constants = tuple[Triple, Triple]  # mean and standard deviation
Rename = str | Callable[[re.Match[str]], str]

MAX_CLASSES = 100_000
MAX_DEPTH = 8  # maximum depth of nested containers
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # standard names in a hub folder
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl"}

IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

CIFAR: dict[int, Constants] = {  # used by chenyaofo's models and many others
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


@dataclass(frozen=True)
class ImportedModel:
    """A converted checkpoint, with remarks about assumed values and ignored content."""

    checkpoint: Checkpoint
    remarks: tuple[str, ...]


# Layouts


@dataclass(frozen=True)
class Layout:
    """The names that a project gives to the layers of the same network."""

    stem: str  # name of the first convolution's weight
    heads: tuple[str, ...]  # possible names of the classifier's weight
    rules: tuple[tuple[str, Rename], ...]  # regular expressions and replacements, applied in order
    constants: Mapping[int, Constants]  # by number of classes
    pads_after: bool = False  # shortcut A appends all its zero channels

    def rename(self, key: str) -> str:
        """Convert a name of this layout to that of this package."""
        for pattern, name in self.rules:
            key = re.sub(pattern, name, key)
        return key


def _one_based(form: str) -> Callable[[re.Match[str]], str]:
    """Format stage and block. The layout counts blocks from 1, and this package from 0."""
    return lambda match: form.format(match[1], int(match[2]) - 1)


LAYOUTS = (
    Layout(  # this package, akamaster, chenyaofo, torchvision
        "conv1.weight",
        ("fc.weight", "linear.weight"),
        (
            (r"^layer(\d+)\.", r"stage\1."),
            (r"^linear\.", "fc."),
            (r"\.downsample\.", ".shortcut."),
        ),
        CIFAR,
    ),
    Layout(  # osmr (pytorchcv)
        "features.init_block.conv.weight",
        ("output.weight",),
        (
            (r"^features\.stage(\d)\.unit([1-9]\d{0,3})\.", _one_based("stage{}.{}.")),
            (r"\.body\.conv(\d)\.conv\.", r".conv\1."),
            (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
            (r"\.identity_conv\.conv\.", ".shortcut.0."),
            (r"\.identity_conv\.bn\.", ".shortcut.1."),
            (r"^features\.init_block\.conv\.", "conv1."),
            (r"^features\.init_block\.bn\.", "bn1."),
            (r"^output\.", "fc."),
        ),
        CIFAR,
    ),
    Layout(  # hysts, with the activation after the addition
        "conv.weight",
        ("fc.weight",),
        (
            (r"^stage(\d)\.block([1-9]\d{0,3})\.", _one_based("stage{}.{}.")),
            (r"\.shortcut\.conv\.", ".shortcut.0."),
            (r"\.shortcut\.bn\.", ".shortcut.1."),
            (r"^conv\.", "conv1."),
            (r"^bn\.", "bn1."),
        ),
        {
            10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        },
    ),
    Layout(  # D-X-Y and its many forks
        "conv_1_3x3.weight",
        ("classifier.weight",),
        (
            (r"^stage_(\d)\.", r"stage\1."),
            (r"\.conv_a\.", ".conv1."),
            (r"\.conv_b\.", ".conv2."),
            (r"\.bn_a\.", ".bn1."),
            (r"\.bn_b\.", ".bn2."),
            (r"^conv_1_3x3\.", "conv1."),
            (r"^bn_1\.", "bn1."),
            (r"^classifier\.", "fc."),
        ),
        {
            10: (
                (125.3 / 255, 123.0 / 255, 113.9 / 255),
                (63.0 / 255, 62.1 / 255, 66.7 / 255),
            ),
            100: (
                (129.3 / 255, 124.1 / 255, 112.4 / 255),
                (68.2 / 255, 65.4 / 255, 70.4 / 255),
            ),
        },
        pads_after=True,
    ),
)

# Inserted into names by compilation and sharding.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGED_WORDS = {"ema", "swa", "avg", "average", "averaged", "averaging", "polyak", "shadow"}
# Prefixes of names that belong to the training state.
_AUXILIARY = re.compile(
    r"loss|criterion|metric|accuracy|(^|_)(acc|auc|auroc|f1|confmat)\d*($|_)|^(train|val|test)_"
    r"|n_averaged|initted|(^|_)(step|epoch|updates?|decay|temperature|centers?)($|_)"
    r"|^(pixel_)?(mean|std)$|^normali[sz]"
)


@dataclass(frozen=True)
class Candidate:
    """Tensors in a file that may form a network, with the names of this package."""

    name: str  # path inside the file, such as "model_ema.module"
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    siblings: tuple[str, ...]  # other tensors in the same container
    averaged: bool
    head: str  # name of the classifier's weight in the layout


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
    """Read the network in a file or a hub folder.

    The file's metadata or the config.json next to it declare the architecture, the classes and the
    normalization constants. Values that neither declares are assumed, with a remark.

    Args:
        path: a file written by `torch.save`, a safetensors file, an ONNX file exported by this
            package, or a folder that contains one of them.
        arch: the architecture. By default, the one whose names and shapes match.
        mean, std: normalization constants in units of [0, 1]. By default, the declared ones or
            those of the layout's authors.
        classes: class names in the order of the outputs. By default, the declared ones or those of
            CIFAR-10 or CIFAR-100.
        prefix: path of the network inside the file, if the file contains several.
        require_declared: whether to refuse a file that does not declare mean, std and classes.

    Raises:
        RunError: the file cannot be read, could run code, or matches no supported network.
        UsageError: mean, std or classes are missing or do not match.
        MissingExtraError: the file is in ONNX format and the extra `onnx` is not installed.
    """
    file = weights_in(path) if path.is_dir() else path
    with open_tensors(file) as contents:
        declared = _declared(file, contents)
        if require_declared and (missing := declared.missing()):
            raise RunError(
                f"{file} does not declare its {' and '.join(missing)}; import it first: resnet56 "
                f"import {file} --out RUN"
            )
        candidate, matching, remarks = _choose(file, contents, arch or declared.arch, prefix)
        outputs = _num_outputs(candidate.tensors)
        defaults = _default_constants(candidate, outputs)
        constants, constant_remarks = _resolve_constants(mean, std, declared, outputs, defaults)
        names, class_remarks = _resolve_classes(classes, declared, outputs)
        config = ModelConfig(matching, names, *constants)
        model = _load_weights(candidate, config, file)
    if contents.ignored:
        remarks.append(f"ignored objects that are not tensors: {_abbreviate(contents.ignored)}")
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
    """Replace the constants and classes of a checkpoint of this package.

    Raises:
        RunError: the checkpoint has another architecture.
        UsageError: mean, std or classes do not match.
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


def weights_in(folder: Path) -> Path:
    """Return the weight file in a hub folder. Raises RunError unless there is exactly one."""
    try:
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}") from None
    standard = [file for name in WEIGHT_FILES for file in files if file.name == name]
    if standard or len(files) == 1:
        return (standard or files)[0]
    if files:
        raise RunError(
            f"{folder} contains several checkpoints ({_abbreviate(files)}); choose one of them"
        )
    raise RunError(
        f"{folder} contains neither a run nor weights; choose a run directory, a checkpoint file "
        "or a hub folder"
    )


# Metadata and config.json


@dataclass(frozen=True)
class DeclaredConfig:
    """What a file, or the config.json next to it, declares about its network."""

    arch: str | None = None
    classes: tuple[str, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    file: str = ""

    def missing(self) -> list[str]:
        """Return the names of the required values that are not declared."""
        needed = {"classes": self.classes, "mean": self.mean, "std": self.std}
        return [name for name, value in needed.items() if value is None]


def _declared(file: Path, contents: Contents) -> DeclaredConfig:
    if "arch" in contents.metadata and "classes" in contents.metadata:
        try:
            config = config_from_metadata(contents.metadata)
        except ValueError as error:
            raise RunError(f"{file} has invalid metadata: {one_line(error)}") from None
        return DeclaredConfig(config.arch, config.classes, config.mean, config.std, file.name)
    config_file = file.with_name("config.json")
    return _read_hub_config(config_file) if config_file.is_file() else DeclaredConfig()


def _read_hub_config(file: Path) -> DeclaredConfig:
    """Read a config.json of this package, timm or Transformers."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise RunError(f"{file} is damaged: it is not a JSON object")
    inner = config.get("pretrained_cfg")  # timm
    merged = {**config, **(inner if isinstance(inner, dict) else {})}
    arch = merged.get("architecture")
    ours = isinstance(arch, str) and re.fullmatch(
        r"plain\d{1,4}|resnet\d{1,4}(-b|-bottleneck)?", arch
    )
    return DeclaredConfig(
        # In other projects, "resnet56" may have projections, so the shapes decide.
        arch if ours and "mean" in config and "id2label" in config else None,
        _labels(merged),
        _triple(merged.get("mean")),
        _triple(merged.get("std")),
        file.name,
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the declared class names if they are distinct."""
    labels = config.get("label_names")
    numbered = config.get("id2label")
    if not isinstance(labels, list) and isinstance(numbered, dict):
        labels = [numbered.get(str(index)) for index in range(len(numbered))]
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


# Choosing the network in a file


def _choose(
    file: Path, contents: Contents, arch: str | None, prefix: str | None
) -> tuple[Candidate, str, list[str]]:
    """Return the network, its architecture, and remarks about the choice."""
    containers = list(_containers(contents.tree))
    candidates = _distinct(
        [candidate for item in containers for candidate in _candidates_in(*item)]
    )
    if not candidates:
        raise RunError(f"{file} {_describe_content(contents, containers)}")
    if prefix is not None:
        start = prefix.strip(".")
        chosen = [c for c in candidates if f"{c.name}.".startswith(f"{start}." if start else "")]
        if not chosen:
            names = _abbreviate([candidate.name for candidate in candidates])
            raise UsageError(f"--prefix {escape(prefix)} is not in {file}; found: {names}")
        candidates = chosen
    matches = [(c, matched) for c in candidates if (matched := _matching_arch(c, arch))]
    if not matches:
        raise RunError(_mismatch_message(file, candidates[0], arch))
    averaged = [match for match in matches if match[0].averaged]
    if len(matches) > 1 and not (len(averaged) == 1 and len(matches) == 2):
        names = ", ".join(escape(c.name) or "top level" for c, _ in matches[:5])
        raise RunError(
            f"{file} contains {len(matches)} networks ({names}); choose one with --prefix"
        )
    remarks = []
    candidate, name = (averaged or matches)[0]
    if len(matches) == 2:
        other = next(c for c, _ in matches if c is not candidate)
        remarks.append(f"using the EMA weights {escape(candidate.name)}, not {escape(other.name)}")
    if arch is None and Architecture.parse(name).shortcut == "A":
        plain = name.replace("resnet", "plain")
        remarks.append(
            f"assuming {name}; {plain} has the same tensors, select it with --arch {plain}"
        )
    expected = _expected_of(name, candidate)
    extra = [*candidate.siblings, *(key for key in candidate.tensors if key not in expected)]
    if extra:
        remarks.append(f"ignored tensors outside the network: {_abbreviate(extra)}")
    return candidate, name, remarks


def _containers(tree: object) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield every mapping in nested containers with its path, outer ones first."""
    level: list[tuple[str, object]] = [("", tree)]
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, object]] = []
        for name, value in level:
            if id(value) in seen or not isinstance(value, Mapping):
                continue
            seen.add(id(value))
            yield name, value
            inside = list(value.items())
            if isinstance(value, Stub) and isinstance(value.state, Mapping):
                inside += value.state.items()  # attributes, as of argparse.Namespace
            below += [(_join(name, key), item) for key, item in inside if isinstance(key, str)]
        level = below


def _join(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second


def _candidates_in(path: str, container: Mapping[Any, Any]) -> Iterator[Candidate]:
    """Yield the networks in one container, each under a prefix that all its names share."""
    tensors = {
        _strip_wrappers(key): value
        for key, value in container.items()
        if isinstance(key, str) and isinstance(value, StoredTensor)
    }
    for layout in LAYOUTS:
        for stem in tensors:
            if stem != layout.stem and not stem.endswith(f".{layout.stem}"):
                continue
            prefix = stem.removesuffix(layout.stem)
            head = next((name for name in layout.heads if prefix + name in tensors), None)
            if head is None:
                continue
            inside = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            name = _join(path, prefix.rstrip("."))
            words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
            yield Candidate(
                name,
                layout,
                {layout.rename(key.removeprefix(prefix)): value for key, value in inside.items()},
                tuple(
                    key for key in tensors if key not in inside and not key.endswith("n_averaged")
                ),
                # PyTorch's AveragedModel stores its counter next to its module.
                not _AVERAGED_WORDS.isdisjoint(words)
                or f"{prefix.removesuffix('module.')}n_averaged" in tensors,
                head,
            )


def _strip_wrappers(key: str) -> str:
    if "_" not in key:
        return key
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Remove candidates that share memory with an earlier one."""
    memories: list[dict[str, object]] = []
    distinct = []
    for candidate in candidates:
        memory = {key: tensor.memory for key, tensor in candidate.tensors.items()}
        if memory not in memories:
            memories.append(memory)
            distinct.append(candidate)
    return distinct


def _describe_content(
    contents: Contents, containers: Sequence[tuple[str, Mapping[Any, Any]]]
) -> str:
    """Describe a file in which no first and last layer of a network were found."""
    for _, container in containers:
        if not isinstance(container, Stub) or not isinstance(container.state, Mapping):
            continue
        if "_parameters" in container.state:
            return (
                f"contains a whole module ({escape(container.name)}), which could run code, so it "
                "was not loaded; save its state dict instead"
            )
    tree = contents.tree
    if isinstance(tree, StoredTensor):
        return "contains a tensor, not a state dict"
    if isinstance(tree, Stub):
        return f"contains a {one_line(tree.name)}, which cannot be loaded without running its code"
    if not isinstance(tree, Mapping):
        return f"contains a {type(tree).__name__}, not a state dict"
    largest: list[str] = []
    for _, container in containers:
        keys = [str(key) for key, item in container.items() if isinstance(item, StoredTensor)]
        largest = max(largest, keys, key=len)
    if not largest:
        top_keys = ", ".join(one_line(key) for key in list(tree)[:5]) or "none"
        return f"contains no state dict; its keys are: {top_keys}"
    return f"matches no supported network: it has {len(largest)} tensors ({_abbreviate(largest)})"


# Matching tensors to an architecture


def _matching_arch(candidate: Candidate, arch: str | None) -> str | None:
    """Return the architecture that the tensors match, or None. If `arch` is set, try only that."""
    names = [arch] if arch else _possible_archs(candidate.tensors)
    return next((name for name in names if not _mismatches(candidate.tensors, name)), None)


def _possible_archs(state: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Yield the architectures with as many blocks per stage as the first stage has.

    Plain networks are omitted because they have the same tensors as networks with shortcut A.
    """
    matches = (re.match(r"stage1\.(\d{1,4})\.", key) for key in state)
    numbers = [int(match[1]) for match in matches if match]
    blocks = 1 + max((number for number in numbers if number < len(state)), default=0)
    yield f"resnet{6 * blocks + 2}"
    yield f"resnet{6 * blocks + 2}-b"
    yield f"resnet{9 * blocks + 2}-bottleneck"


def _mismatch_message(file: Path, candidate: Candidate, arch: str | None) -> str:
    """Explain why the tensors match no architecture, or not the requested one."""
    tensors = candidate.tensors
    if special := [key for key, tensor in tensors.items() if not tensor.plain]:
        names = _abbreviate(special)
        return f"{file} contains sparse, quantized, complex or meta tensors: {names}"
    if arch is not None:
        other = _matching_arch(candidate, None)
        hint = f"; it matches --arch {other}" if other else ""
        return f"{file} does not match {arch}: {'; '.join(_mismatches(tensors, arch))}{hint}"
    stages = {match[1] for key in tensors if (match := re.match(r"stage(\d)\.", key))}
    stem = tensors["conv1.weight"].shape
    if stages and stages != {"1", "2", "3"}:
        reason = (
            f"it has {len(stages)} stages; ResNets for 32x32 images have 3, those for ImageNet 4"
        )
    elif stem != (WIDTHS[0], 3, 3, 3):
        reason = f"its first convolution has shape {_shape_text(stem)}, not {WIDTHS[0]}x3x3x3"
    else:
        closest = min(_possible_archs(tensors), key=lambda name: _distance(tensors, name))
        reason = f"the closest is {closest}, except for {'; '.join(_mismatches(tensors, closest))}"
    return f"{file} matches no supported network: {reason}"


def _distance(state: Mapping[str, StoredTensor], arch: str) -> int:
    expected = _expected(arch, _num_outputs(state))
    differ = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    return len(expected.keys() ^ state.keys()) + len(differ)


@lru_cache(maxsize=8)
def _expected(arch: str, classes: int) -> dict[str, Tensor]:
    """Return the state dict of an architecture on the meta device."""
    architecture = Architecture.parse(arch)
    with torch.device("meta"):
        model = ResNet(architecture.depth, architecture.block, architecture.shortcut, classes)
    return model.state_dict()


def _expected_of(arch: str, candidate: Candidate) -> dict[str, Tensor]:
    return _expected(arch, _num_outputs(candidate.tensors))


def _num_outputs(state: Mapping[str, StoredTensor]) -> int:
    """Return the length of the classifier's bias, or 10 without a valid bias."""
    bias = state.get("fc.bias")
    if bias is None or len(bias.shape) != 1 or not 1 < bias.shape[0] <= MAX_CLASSES:
        return 10
    return bias.shape[0]


def _mismatches(state: Mapping[str, StoredTensor], arch: str) -> list[str]:
    """Describe the differences between the tensors and an architecture, if any."""
    expected = _expected(arch, _num_outputs(state))
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    extra = [
        key for key in state if key not in expected and not _AUXILIARY.search(key.split(".")[0])
    ]
    shared = [key for key in expected if key in state and not _is_counter(key)]
    differ = [
        f"{key} is {_shape_text(state[key].shape)}, not {_shape_text(expected[key].shape)}"
        for key in shared
        if state[key].plain and state[key].shape != expected[key].shape
    ]
    special = [key for key in shared if not state[key].plain]
    problems = (
        ("missing", missing),
        ("unexpected", extra),
        ("of a different shape", differ),
        ("unsupported", special),
    )
    return [f"{len(keys)} {problem} ({_abbreviate(keys)})" for problem, keys in problems if keys]


def _is_counter(key: str) -> bool:
    """Return whether a key is a batch norm counter, which is optional in old checkpoints."""
    return key.endswith("num_batches_tracked")


def _shape_text(shape: Sequence[int]) -> str:
    return one_line("x".join(map(str, shape))) if shape else "a scalar"


def _abbreviate(words: Sequence[object]) -> str:
    return ", ".join([*map(one_line, words[:3]), *(["..."] if len(words) > 3 else [])])


# Constants, class names and weights


def _default_constants(candidate: Candidate, outputs: int) -> tuple[Constants | None, str]:
    """Return the normalization constants that the layout's authors used, and their origin."""
    has_projections = any(".shortcut." in key for key in candidate.tensors)
    if candidate.head == "linear.weight" and not has_projections:
        return IMAGENET, "ImageNet, as in akamaster's training"
    return candidate.layout.constants.get(outputs), f"CIFAR-{outputs}"


def _resolve_constants(
    mean: Triple | None,
    std: Triple | None,
    declared: DeclaredConfig,
    outputs: int,
    defaults: tuple[Constants | None, str] = (None, ""),
) -> tuple[Constants, list[str]]:
    """Return mean and std (from the arguments, the file or the defaults) and remarks."""
    remarks = []
    for flag, given, in_file in (("--mean", mean, declared.mean), ("--std", std, declared.std)):
        if given and in_file and not all(map(math.isclose, given, in_file)):
            remarks.append(f"using {flag} {given}, although {declared.file} declares {in_file}")
    mean, std = mean or declared.mean, std or declared.std
    if mean is None or std is None:
        constants, origin = defaults
        if constants is None:
            raise UsageError(f"a network with {outputs} classes needs --mean and --std")
        mean, std = mean or constants[0], std or constants[1]
        remarks.append(
            f"assuming mean {mean} and std {std} ({origin}); override with --mean and --std"
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UsageError(
            f"--mean must be finite and --std finite and positive, not {mean} and {std}"
        )
    return (mean, std), remarks


def _resolve_classes(
    names: Sequence[str], declared: DeclaredConfig, outputs: int
) -> tuple[tuple[str, ...], list[str]]:
    """Return class names (from the arguments, the file or a CIFAR data set) and remarks."""
    if names:
        if len(names) != outputs or len(set(names)) != outputs:
            raise UsageError(
                f"--classes has {len(set(names))} different names, but the network has {outputs} "
                "outputs"
            )
        if declared.classes and tuple(names) != declared.classes:
            return tuple(names), [f"using --classes, although {declared.file} declares other names"]
        return tuple(names), []
    if declared.classes:
        if len(declared.classes) != outputs:
            raise RunError(
                f"{declared.file} declares {len(declared.classes)} classes, but the network has "
                f"{outputs} outputs; set the names with --classes"
            )
        return declared.classes, []
    if outputs == len(CIFAR10):
        return CIFAR10, []
    if outputs == len(CIFAR100):
        return CIFAR100, ["assuming the classes of CIFAR-100; override with --classes"]
    raise UsageError(
        f"the network has {outputs} classes; set --classes to their names, a file with one name "
        "per line, cifar10, cifar100, digits or a run"
    )


def _load_weights(candidate: Candidate, config: ModelConfig, file: Path) -> dict[str, Tensor]:
    """Read the tensors, and convert names, data types and channel order to this package's."""
    model = {}
    for key, like in _expected_of(config.arch, candidate).items():
        if _is_counter(key):
            model[key] = torch.zeros((), dtype=torch.int64)
            continue
        stored = candidate.tensors[key]
        try:
            values = stored.read()
            dtype = values.dtype
            # Always copy, because two names may share a tensor in the file.
            values = values.to(like.dtype, copy=True, memory_format=torch.contiguous_format)
        except Exception as error:  # parsers can raise any exception on a damaged file
            raise RunError(
                f"{file} is damaged: {key} of type {one_line(stored.type)} cannot be read: "
                f"{one_line(error)}"
            ) from None
        if values.shape != like.shape or not dtype.is_floating_point:
            raise RunError(f"{file} is not usable: {key} has type {dtype}, not floating point")
        if not bool(values.isfinite().all()):
            raise RunError(f"{file} is not usable: {key} has non-finite values")
        model[key] = values
    if candidate.layout.pads_after and Architecture.parse(config.arch).shortcut == "A":
        _center_padding(model)
    if not _has_finite_outputs(config, model):
        raise RunError(f"{file} is not usable: the network's outputs are not finite")
    return model


def _center_padding(model: dict[str, Tensor]) -> None:
    """Permute channels in place, from shortcuts that pad at the end to those that pad both sides.

    The position of the zero channels that shortcut A adds does not matter, as long as all
    surrounding layers agree. `conv2` and `bn2` write the channels of a stage; `conv1` of the next
    block, or the classifier, reads them.
    """
    order = torch.arange(WIDTHS[0])  # channel in this package -> channel in the layout
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
    """Return whether the outputs for a uniform image and a noise image are finite."""
    net = build(config.arch, classes=len(config.classes))
    net.load_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 32, 32, generator=generator)
    images = torch.cat((torch.full_like(noise, 0.5), noise))
    mean, std = (torch.tensor(constant)[:, None, None] for constant in (config.mean, config.std))
    return bool(net.eval()((images - mean) / std).isfinite().all())
