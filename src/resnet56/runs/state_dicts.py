"""Find the state dicts of ResNets, with any name prefix, in the nested containers of a file."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from resnet56.data.pickles import Stub
from resnet56.errors import abbreviate, escape, one_line
from resnet56.runs.layouts import LAYOUTS, Layout
from resnet56.runs.tensor_files import Contents, StoredTensor

MAX_DEPTH = 8  # maximum depth of nested containers

# Components that torch.compile, FSDP and activation checkpointing insert into parameter names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Words in the path of a state dict that contains averaged weights.
_AVERAGED_WORDS = {"ema", "swa", "avg", "average", "averaged", "averaging", "polyak", "shadow"}


@dataclass(frozen=True)
class StateDict:
    """A state dict that can belong to a ResNet."""

    path: str  # path inside the file, such as "model_ema.module"
    layout: Layout
    tensors: Mapping[str, StoredTensor]  # tensors by their names in this package
    siblings: tuple[str, ...]  # names of other tensors in the same container
    averaged: bool  # whether the tensors are averaged weights, such as EMA weights
    head: str  # name of the classifier's weight in the layout


def find_state_dicts(contents: Contents) -> list[StateDict]:
    """Return the distinct state dicts in a file, outermost first."""
    found = [
        state_dict
        for path, container in _containers(contents.tree)
        for state_dict in _state_dicts_in(path, container)
    ]
    memories: list[dict[str, object]] = []
    distinct = []
    for state_dict in found:
        memory = {key: tensor.memory for key, tensor in state_dict.tensors.items()}
        if memory not in memories:
            memories.append(memory)
            distinct.append(state_dict)
    return distinct


def _containers(tree: object) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the path and the content of each mapping in nested containers, outermost first."""
    level: list[tuple[str, object]] = [("", tree)]
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, object]] = []
        for path, value in level:
            if id(value) in seen or not isinstance(value, Mapping):
                continue
            seen.add(id(value))
            yield path, value
            items = list(value.items())
            if isinstance(value, Stub) and isinstance(value.state, Mapping):
                # The state contains the attributes of an object such as argparse.Namespace.
                items += value.state.items()
            below += [(_join(path, key), item) for key, item in items if isinstance(key, str)]
        level = below


def _join(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second


def _state_dicts_in(path: str, container: Mapping[Any, Any]) -> Iterator[StateDict]:
    """Yield the state dicts in one container. All names in a state dict share a prefix."""
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
            yield StateDict(
                name,
                layout,
                {layout.rename(key.removeprefix(prefix)): value for key, value in inside.items()},
                tuple(
                    key for key in tensors if key not in inside and not key.endswith("n_averaged")
                ),
                # PyTorch's AveragedModel stores its counter next to the averaged module.
                not _AVERAGED_WORDS.isdisjoint(words)
                or f"{prefix.removesuffix('module.')}n_averaged" in tensors,
                head,
            )


def _strip_wrappers(key: str) -> str:
    if "_" not in key:
        return key
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def describe_content(contents: Contents) -> str:
    """Return the end of an error message about a file that contains no ResNet state dicts."""
    containers = [container for _, container in _containers(contents.tree)]
    for container in containers:
        if not isinstance(container, Stub) or not isinstance(container.state, Mapping):
            continue
        if "_parameters" in container.state:
            return (
                f"contains a pickled module ({escape(container.name)}), which could run code, so "
                "the file was not loaded; save the state dict of the module instead"
            )
    tree = contents.tree
    if isinstance(tree, StoredTensor):
        return "contains a tensor, not a state dict"
    if isinstance(tree, Stub):
        return (
            f"contains an object of class {one_line(tree.name)}, which cannot be loaded without "
            "running code; save the state dict instead"
        )
    if not isinstance(tree, Mapping):
        return f"contains an object of type {type(tree).__name__}, not a state dict"
    largest: list[str] = []
    for container in containers:
        keys = [str(key) for key, item in container.items() if isinstance(item, StoredTensor)]
        largest = max(largest, keys, key=len)
    if not largest:
        top_keys = ", ".join(one_line(key) for key in list(tree)[:5]) or "none"
        return f"contains no state dict; its keys are: {top_keys}"
    return (
        f"matches no supported architecture: it has {len(largest)} tensors ({abbreviate(largest)})"
    )
