"""Checkpoints of other projects as ours: recognized by names and shapes, never executed.

Read are state dicts, plain or inside anything, in our own layout and in those of
akamaster/pytorch_resnet_cifar10, chenyaofo/pytorch-cifar-models, torchvision, osmr/imgclsmob,
hysts/pytorch_image_classification and D-X-Y/ResNeXt-DenseNet, and the files that this package
exports.
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
from resnet56.data.pickles import StandIn
from resnet56.errors import RunError, UsageError, one_line, shown
from resnet56.model import WIDTHS, Architecture, ResNet, build
from resnet56.runs.checkpoint import Checkpoint, Network
from resnet56.runs.pretrained import network_from
from resnet56.runs.tensor_files import Contents, StoredTensor, open_tensors

Triple = tuple[float, float, float]
Constants = tuple[Triple, Triple]  # mean and standard deviation
Rename = str | Callable[[re.Match[str]], str]

MAX_CLASSES = 100_000
MAX_DEPTH = 8  # of containers inside containers
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as hubs name them
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl"}

IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR: dict[int, Constants] = {  # as chenyaofo's models, and many others, have them
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint as one of ours, and what had to be assumed."""

    checkpoint: Checkpoint
    remarks: tuple[str, ...]


# Layouts


@dataclass(frozen=True)
class Layout:
    """How a project names the same network."""

    stem: str  # the first convolution's weight
    heads: tuple[str, ...]  # the classifier's, under one of these names
    rules: tuple[tuple[str, Rename], ...]  # to our names, one after the other
    constants: Mapping[int, Constants]  # by the number of classes
    pads_behind: bool = False  # shortcut A adds all its zero channels behind

    def renamed(self, key: str) -> str:
        """A name as ours."""
        for pattern, name in self.rules:
            key = re.sub(pattern, name, key)
        return key


def _from_one(form: str) -> Callable[[re.Match[str]], str]:
    """Stage and block, the latter counted from 1 there and from 0 here."""
    return lambda match: form.format(match[1], int(match[2]) - 1)


LAYOUTS = (
    Layout(  # ours, akamaster's, chenyaofo's, torchvision's
        "conv1.weight",
        ("fc.weight", "linear.weight"),
        (
            (r"^layer(\d+)\.", r"stage\1."),
            (r"^linear\.", "fc."),
            (r"\.downsample\.", ".shortcut."),
        ),
        CIFAR,
    ),
    Layout(  # osmr's pytorchcv
        "features.init_block.conv.weight",
        ("output.weight",),
        (
            (r"^features\.stage(\d)\.unit([1-9]\d{0,3})\.", _from_one("stage{}.{}.")),
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
    Layout(  # hysts', with the activation after the sum
        "conv.weight",
        ("fc.weight",),
        (
            (r"^stage(\d)\.block([1-9]\d{0,3})\.", _from_one("stage{}.{}.")),
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
    Layout(  # D-X-Y's, and the many that come of it
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
        pads_behind=True,
    ),
)

# What compilation and sharding put into the middle of names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGED = {"ema", "swa", "avg", "average", "averaged", "averaging", "polyak", "shadow"}
# First parts of names that are of training, not of the network.
_AUXILIARY = re.compile(
    r"loss|criterion|metric|accuracy|(^|_)(acc|auc|auroc|f1|confmat)\d*($|_)|^(train|val|test)_"
    r"|n_averaged|initted|(^|_)(step|epoch|updates?|decay|temperature|centers?)($|_)"
    r"|^(pixel_)?(mean|std)$|^normali[sz]"
)


@dataclass(frozen=True)
class Candidate:
    """Tensors in a file that may be a network, under our names."""

    name: str  # where they are: "model_ema.module"
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    beside: tuple[str, ...]  # names of other tensors in the same container
    averaged: bool
    head: str  # the classifier's name in the layout


def read(
    path: Path,
    arch: str | None = None,
    *,
    mean: Triple | None = None,
    std: Triple | None = None,
    classes: Sequence[str] = (),
    prefix: str | None = None,
    stated_only: bool = False,
) -> Imported:
    """The network in a file or a hub's folder.

    What the file's metadata or the config.json beside it say is taken; what they do not say is
    assumed, and `remarks` says so.

    Args:
        path: what `torch.save` wrote, safetensors, ONNX of this package, or a folder with one.
        arch: its architecture; by default the one whose names and shapes fit.
        mean, std: of its training images, in units of [0, 1]; by default those that are stated,
            or that the layout's authors used.
        classes: their names, in the order of the outputs; by default those that are stated, or
            CIFAR-10's or CIFAR-100's.
        prefix: where the network is in the file, if there are several.
        stated_only: whether to refuse a file that does not state mean, std and classes.

    Raises:
        RunError: the file cannot be read, would run code, or fits no such network.
        UsageError: mean, std or classes are missing or do not fit.
        MissingExtraError: an ONNX file without the extra `onnx`.
    """
    file = weights_in(path) if path.is_dir() else path
    with open_tensors(file) as contents:
        stated = _stated(file, contents)
        if stated_only and (missing := stated.missing()):
            raise RunError(
                f"{file} does not state its {' and '.join(missing)}; make a run of it: resnet56 "
                f"import {file} --out RUN"
            )
        candidate, fitting, remarks = _choose(file, contents, arch or stated.arch, prefix)
        outputs = _outputs(candidate.tensors)
        constants, more = _constants(mean, std, stated, outputs, _assumed(candidate, outputs))
        names, said = _class_names(classes, stated, outputs)
        network = Network(fitting, names, *constants)
        model = _read(candidate, network, file)
    if contents.passed_over:
        remarks.append(f"left aside, as they are no tensors: {_some(contents.passed_over)}")
    notes = {"weights": "imported", "file": file.name}
    return Imported(Checkpoint(network, model, notes=notes), (*remarks, *said, *more))


def restated(
    checkpoint: Checkpoint,
    name: str,
    arch: str | None,
    mean: Triple | None,
    std: Triple | None,
    classes: Sequence[str],
) -> Imported:
    """A network of ours under the constants and classes that are given, if any are.

    Raises:
        RunError: it is of another architecture.
        UsageError: mean, std or classes do not fit.
    """
    net = checkpoint.network
    if arch not in (None, net.arch):
        raise RunError(f"{name} is {net.arch}, not {arch}")
    stated = Stated(net.arch, net.classes, net.mean, net.std, name)
    constants, remarks = _constants(mean, std, stated, len(net.classes))
    names, more = _class_names(classes, stated, len(net.classes))
    notes = {"weights": "imported", "file": Path(name).name}
    network = Network(net.arch, names, *constants)
    return Imported(Checkpoint(network, checkpoint.model, notes=notes), (*remarks, *more))


def weights_in(folder: Path) -> Path:
    """The file of weights in a hub's folder. Raises RunError unless there is one."""
    try:
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}") from None
    named = [file for name in WEIGHTS for file in files if file.name == name]
    if named or len(files) == 1:
        return (named or files)[0]
    if files:
        raise RunError(f"{folder} holds several checkpoints ({_some(files)}); name one")
    raise RunError(f"{folder} holds no run and no weights; give a run, a file or a hub's folder")


# What files state


@dataclass(frozen=True)
class Stated:
    """What a file, or the config.json beside it, says of its network."""

    arch: str | None = None
    classes: tuple[str, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    file: str = ""

    def missing(self) -> list[str]:
        """What is needed and not said."""
        needed = {"classes": self.classes, "mean": self.mean, "std": self.std}
        return [name for name, value in needed.items() if value is None]


def _stated(file: Path, contents: Contents) -> Stated:
    if "arch" in contents.metadata and "classes" in contents.metadata:
        try:
            network = network_from(contents.metadata)
        except ValueError as error:
            raise RunError(f"{file}: its metadata is damaged: {one_line(error)}") from None
        return Stated(network.arch, network.classes, network.mean, network.std, file.name)
    config = file.with_name("config.json")
    return _config(config) if config.is_file() else Stated()


def _config(file: Path) -> Stated:
    """A hub's config.json: ours, timm's, or of the Transformers library."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise RunError(f"{file} is damaged: it holds no JSON object")
    inner = config.get("pretrained_cfg")  # timm's
    merged = {**config, **(inner if isinstance(inner, dict) else {})}
    arch = merged.get("architecture")
    ours = isinstance(arch, str) and re.fullmatch(
        r"plain\d{1,4}|resnet\d{1,4}(-b|-bottleneck)?", arch
    )
    return Stated(
        # Elsewhere "resnet56" may be the one with projections: there the shapes decide.
        arch if ours and "mean" in config and "id2label" in config else None,
        _labels(merged),
        _triple(merged.get("mean")),
        _triple(merged.get("std")),
        file.name,
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes' names, if they are there and all different."""
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


# The network among what is in a file


def _choose(
    file: Path, contents: Contents, arch: str | None, prefix: str | None
) -> tuple[Candidate, str, list[str]]:
    """The network, its architecture, and what should be said of the choice."""
    containers = list(_containers(contents.tree))
    candidates = _distinct([found for place in containers for found in _candidates_in(*place)])
    if not candidates:
        raise RunError(f"{file} {_instead(contents, containers)}")
    if prefix is not None:
        wanted = prefix.strip(".")
        chosen = [c for c in candidates if f"{c.name}.".startswith(f"{wanted}." if wanted else "")]
        if not chosen:
            there = _some([found.name for found in candidates])
            raise UsageError(f"--prefix {shown(prefix)} is not in {file}; there is: {there}")
        candidates = chosen
    fits = [(found, name) for found in candidates if (name := _fitting(found, arch))]
    if not fits:
        raise RunError(_refusal(file, candidates[0], arch))
    averaged = [pair for pair in fits if pair[0].averaged]
    if len(fits) > 1 and not (len(averaged) == 1 and len(fits) == 2):
        there = ", ".join(shown(found.name) or "the outermost" for found, _ in fits[:5])
        raise RunError(f"{file} holds {len(fits)} networks ({there}); choose one with --prefix")
    remarks = []
    found, name = (averaged or fits)[0]
    if len(fits) == 2:
        other = next(pair[0] for pair in fits if pair[0] is not found)
        remarks.append(f"the averaged weights, {shown(found.name)}, not {shown(other.name)}")
    if arch is None and Architecture.parse(name).shortcut == "A":
        plain = name.replace("resnet", "plain")
        remarks.append(f"assuming {name}; {plain} has the same tensors: choose it with --arch")
    left = [*found.beside, *(key for key in found.tensors if key not in _expected_of(name, found))]
    if left:
        remarks.append(f"left out, as they are not the network's: {_some(left)}")
    return found, name, remarks


def _containers(tree: object) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping in nested containers, outer ones first, with the keys that lead to it."""
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
            if isinstance(value, StandIn) and isinstance(value.state, Mapping):
                inside += value.state.items()  # attributes, as of argparse.Namespace
            below += [(_joined(name, key), item) for key, item in inside if isinstance(key, str)]
        level = below


def _joined(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second


def _candidates_in(place: str, container: Mapping[Any, Any]) -> Iterator[Candidate]:
    """Networks in one container, each under a prefix that all its names share."""
    tensors = {
        _unwrapped(key): value
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
            name = _joined(place, prefix.rstrip("."))
            words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
            yield Candidate(
                name,
                layout,
                {layout.renamed(key.removeprefix(prefix)): value for key, value in inside.items()},
                tuple(
                    key for key in tensors if key not in inside and not key.endswith("n_averaged")
                ),
                # PyTorch's AveragedModel keeps its count beside its module.
                not _AVERAGED.isdisjoint(words)
                or f"{prefix.removesuffix('module.')}n_averaged" in tensors,
                head,
            )


def _unwrapped(key: str) -> str:
    if "_" not in key:
        return key
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without those that are the same numbers under another name."""
    memories: list[dict[str, object]] = []
    kept = []
    for found in candidates:
        memory = {key: tensor.memory for key, tensor in found.tensors.items()}
        if memory not in memories:
            memories.append(memory)
            kept.append(found)
    return kept


def _instead(contents: Contents, containers: Sequence[tuple[str, Mapping[Any, Any]]]) -> str:
    """What a file is in which no network's first and last layer were found."""
    for _, container in containers:
        if not isinstance(container, StandIn) or not isinstance(container.state, Mapping):
            continue
        if "_parameters" in container.state:
            return (
                f"holds a whole module ({shown(container.name)}), which could run code: it was "
                "not read; save its state dict alone"
            )
    tree = contents.tree
    if isinstance(tree, StoredTensor):
        return "holds a tensor, not a state dict"
    if isinstance(tree, StandIn):
        return f"holds {one_line(tree.name)}, whose weights need code that is not run"
    if not isinstance(tree, Mapping):
        return f"holds a {type(tree).__name__}, not a state dict"
    most: dict[str, StoredTensor] = {}
    for _, container in containers:
        here = {str(k): v for k, v in container.items() if isinstance(v, StoredTensor)}
        most = here if len(here) > len(most) else most
    if not most:
        keys = ", ".join(one_line(key) for key in list(tree)[:5]) or "nothing"
        return f"holds no state dict; in it is: {keys}"
    return f"fits no network of ours: it has {len(most)} tensors ({_some(list(most))})"


# The network that fits


def _fitting(found: Candidate, arch: str | None) -> str | None:
    """The architecture that the tensors are of; `arch` if that fits."""
    names = [arch] if arch else _candidates(found.tensors)
    return next((name for name in names if not _misfits(found.tensors, name)), None)


def _candidates(state: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Architectures of as many blocks as the first stage has.

    Not the plain one: its tensors are those of the network with shortcut A.
    """
    found = (re.match(r"stage1\.(\d{1,4})\.", key) for key in state)
    numbers = [int(match[1]) for match in found if match]
    blocks = 1 + max((number for number in numbers if number < len(state)), default=0)
    yield f"resnet{6 * blocks + 2}"
    yield f"resnet{6 * blocks + 2}-b"
    yield f"resnet{9 * blocks + 2}-bottleneck"


def _refusal(file: Path, found: Candidate, arch: str | None) -> str:
    """Why the tensors are no network, or not the one that is asked for."""
    if odd := [key for key, tensor in found.tensors.items() if not tensor.plain]:
        return f"{file} holds tensors that are not plain numbers: {_some(odd)}"
    if arch is not None:
        other = _fitting(found, None)
        hint = f"; it fits --arch {other}" if other else ""
        return f"{file} does not fit {arch}: {'; '.join(_misfits(found.tensors, arch))}{hint}"
    stages = {match[1] for key in found.tensors if (match := re.match(r"stage(\d)\.", key))}
    stem = found.tensors["conv1.weight"].shape
    if stages and stages != {"1", "2", "3"}:
        looks = (
            f"it has {len(stages)} stages, where ResNets for 32x32 images have 3 and those for "
            "ImageNet 4"
        )
    elif stem != (WIDTHS[0], 3, 3, 3):
        looks = f"its first convolution is {_size(stem)}, ours {WIDTHS[0]}x3x3x3"
    else:
        near = min(_candidates(found.tensors), key=lambda name: _distance(found.tensors, name))
        looks = f"nearest is {near}, but: {'; '.join(_misfits(found.tensors, near))}"
    return f"{file} fits no network of ours: {looks}"


def _distance(state: Mapping[str, StoredTensor], arch: str) -> int:
    expected = _expected(arch, _outputs(state))
    differ = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    return len(expected.keys() ^ state.keys()) + len(differ)


@lru_cache(maxsize=8)
def _expected(arch: str, classes: int) -> dict[str, Tensor]:
    """The network's state dict: names, shapes and types without values."""
    architecture = Architecture.parse(arch)
    with torch.device("meta"):
        model = ResNet(architecture.depth, architecture.block, architecture.shortcut, classes)
    return model.state_dict()


def _expected_of(arch: str, found: Candidate) -> dict[str, Tensor]:
    return _expected(arch, _outputs(found.tensors))


def _outputs(state: Mapping[str, StoredTensor]) -> int:
    """The number of outputs, by the classifier's bias; 10 if that is no such."""
    bias = state.get("fc.bias")
    if bias is None or len(bias.shape) != 1 or not 1 < bias.shape[0] <= MAX_CLASSES:
        return 10
    return bias.shape[0]


def _misfits(state: Mapping[str, StoredTensor], arch: str) -> list[str]:
    """What keeps the tensors from being that network's, in words; empty if nothing does."""
    expected = _expected(arch, _outputs(state))
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    extra = [
        key for key in state if key not in expected and not _AUXILIARY.search(key.split(".")[0])
    ]
    shared = [key for key in expected if key in state and not _is_counter(key)]
    differ = [
        f"{key} is {_size(state[key].shape)}, not {_size(expected[key].shape)}"
        for key in shared
        if state[key].plain and state[key].shape != expected[key].shape
    ]
    odd = [key for key in shared if not state[key].plain]
    words = (
        ("missing", missing),
        ("unexpected", extra),
        ("of another shape", differ),
        ("not plain numbers", odd),
    )
    return [f"{len(keys)} {what} ({_some(keys)})" for what, keys in words if keys]


def _is_counter(key: str) -> bool:
    """Batch norm's count of steps, which old checkpoints lack and inference ignores."""
    return key.endswith("num_batches_tracked")


def _size(shape: Sequence[int]) -> str:
    return one_line("x".join(map(str, shape))) if shape else "a number"


def _some(words: Sequence[object]) -> str:
    return ", ".join([*map(one_line, words[:3]), *(["..."] if len(words) > 3 else [])])


# Constants, names, numbers


def _assumed(found: Candidate, outputs: int) -> tuple[Constants | None, str]:
    """Mean and standard deviation that the layout's authors normalize with, and whose they are."""
    projects = any(".shortcut." in key for key in found.tensors)
    if found.head == "linear.weight" and not projects:
        return IMAGENET, "ImageNet's, which akamaster's networks are trained with"
    return found.layout.constants.get(outputs), f"CIFAR-{outputs}'s"


def _constants(
    mean: Triple | None,
    std: Triple | None,
    stated: Stated,
    outputs: int,
    assumed: tuple[Constants | None, str] = (None, ""),
) -> tuple[Constants, list[str]]:
    """Mean and standard deviation: those given, else stated, else assumed; and remarks."""
    remarks = []
    for flag, given, said in (("--mean", mean, stated.mean), ("--std", std, stated.std)):
        if given and said and not all(map(math.isclose, given, said)):
            remarks.append(f"{flag} {given}, although {stated.file} says {said}")
    mean, std = mean or stated.mean, std or stated.std
    if mean is None or std is None:
        constants, whose = assumed
        if constants is None:
            raise UsageError(f"a network of {outputs} classes needs --mean and --std")
        mean, std = mean or constants[0], std or constants[1]
        remarks.append(f"mean {mean} and std {std}: {whose}, as --mean and --std do not say")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UsageError(f"--mean must be numbers and --std above 0, not {mean} and {std}")
    return (mean, std), remarks


def _class_names(
    names: Sequence[str], stated: Stated, outputs: int
) -> tuple[tuple[str, ...], list[str]]:
    """The classes: those given, else stated, else those of the data set with as many."""
    if names:
        if len(names) != outputs or len(set(names)) != outputs:
            raise UsageError(
                f"--classes has {len(set(names))} names, the network {outputs} outputs"
            )
        if stated.classes and tuple(names) != stated.classes:
            return tuple(names), [f"--classes as given, although {stated.file} has other names"]
        return tuple(names), []
    if stated.classes:
        if len(stated.classes) != outputs:
            raise RunError(
                f"{stated.file} names {len(stated.classes)} classes, the network has {outputs} "
                "outputs; name them with --classes"
            )
        return stated.classes, []
    if outputs == len(CIFAR10):
        return CIFAR10, []
    if outputs == len(CIFAR100):
        return CIFAR100, ["classes: CIFAR-100's, as --classes does not say"]
    raise UsageError(
        f"the network has {outputs} classes; name them with --classes: names, a file of lines, "
        "cifar10, cifar100, digits, or a run"
    )


def _read(found: Candidate, network: Network, file: Path) -> dict[str, Tensor]:
    """The tensors' values in our order, types and channels."""
    model = {}
    for key, like in _expected_of(network.arch, found).items():
        if _is_counter(key):
            model[key] = torch.zeros((), dtype=torch.int64)
            continue
        stored = found.tensors[key]
        try:
            values = stored.read()
            dtype = values.dtype
            # A copy of its own memory, as two names may share a tensor in the file.
            values = values.to(like.dtype, copy=True, memory_format=torch.contiguous_format)
        except Exception as error:  # a damaged file can make a parser raise anything
            raise RunError(
                f"{file} is damaged: {key}, of type {one_line(stored.type)}, cannot be read: "
                f"{one_line(error)}"
            ) from None
        if values.shape != like.shape or not dtype.is_floating_point:
            raise RunError(f"{file} is of no use: {key} holds {dtype}, not floats")
        if not bool(values.isfinite().all()):
            raise RunError(f"{file} is of no use: {key} has values that are not finite")
        model[key] = values
    if found.layout.pads_behind and Architecture.parse(network.arch).shortcut == "A":
        _move_padding(model)
    if not _answers(network, model):
        raise RunError(f"{file} is of no use: the network's outputs are not finite")
    return model


def _move_padding(model: dict[str, Tensor]) -> None:
    """Reorder channels so that shortcuts may pad before and behind instead of only behind.

    A shortcut A adds zero channels to those that it passes on; where they are does not matter, as
    long as all layers around agree. The layers of a stage write to its channels (`conv2`, `bn2`)
    and read from them (`conv1` of the next block, the classifier).
    """
    order = torch.arange(WIDTHS[0])  # our channel -> theirs
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
def _answers(network: Network, model: Mapping[str, Tensor]) -> bool:
    """Whether the outputs for a plain picture and a noisy one are finite numbers."""
    net = build(network.arch, classes=len(network.classes))
    net.load_state_dict(model)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 32, 32, generator=generator)
    images = torch.cat((torch.full_like(noise, 0.5), noise))
    mean, std = (torch.tensor(constant)[:, None, None] for constant in (network.mean, network.std))
    return bool(net.eval()((images - mean) / std).isfinite().all())
