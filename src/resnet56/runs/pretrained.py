"""Networks that come with the package: `weights/NAME.safetensors`, and NAME.json, its card.

Half precision, so that each is under 2 MB; the header holds what must be known to use them, the
card how they were trained and how good they are.
Wherever a run is expected, such a name will do.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from resnet56.errors import RunError, one_line
from resnet56.files import read_json, write_bytes, write_json
from resnet56.runs.checkpoint import Checkpoint, Network
from resnet56.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parents[1] / "weights"
LARGEST = 2_000_000  # bytes
HEAD = 512  # bytes at the beginning of a file that tell what it is


def names() -> list[str]:
    """The networks that are there, by name."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def load(name: str) -> Checkpoint:
    """The shipped network of that name, its weights in single precision.

    Raises:
        RunError: there is none of that name, or its file is damaged.
    """
    if name not in names():
        there = ", ".join(names()) or "none"
        raise RunError(f"no network named {name!r} is shipped; there is: {there}")
    path = FOLDER / f"{name}.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            network = network_from(file.metadata() or {})
            model = {key: _single(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged file can make a parser raise anything
        raise RunError(f"{path} is damaged: {one_line(error)}; install the package again") from None
    return Checkpoint(network, model, notes={"weights": "shipped"})


def save(run: RunDirectory, name: str, folder: Path) -> Path:
    """Write the run's weights, in half precision, and a card into `folder` as `name`.

    The card holds the run's recipe and evaluation, as far as it has them. What is measured there
    is the run in single precision: evaluate the shipped network, too, before it ships.

    Raises:
        RunError: the run cannot be read, its weights do not fit half precision, or it is too
            large to ship.
    """
    import safetensors.torch

    checkpoint = run.load()
    half = {key: _half(key, tensor) for key, tensor in checkpoint.model.items()}
    content = safetensors.torch.save(half, metadata=metadata_of(checkpoint.network))
    if len(content) > LARGEST:
        raise RunError(
            f"{run.path} is too large to ship: {len(content) / 1e6:.1f} MB, more than "
            f"{LARGEST / 1e6:.0f} MB"
        )
    path = folder / f"{name}.safetensors"
    write_json(path.with_suffix(".json"), _card(run, checkpoint))
    write_bytes(path, content)  # last: a name is there once its weights are
    return path


def card(name: str) -> dict[str, Any]:
    """How the shipped network was trained and how good it is. Raises RunError."""
    return read_json(FOLDER / f"{name}.json")


def _card(run: RunDirectory, checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = {"network": asdict(checkpoint.network)}
    found["weights"] = checkpoint.notes.get("weights", "last")
    if run.recipe_file.exists():
        found["recipe"] = read_json(run.recipe_file)
    if evaluation := run.read_evaluation(checkpoint.position.step):
        found["evaluation"] = evaluation
    return found


def metadata_of(network: Network) -> dict[str, str]:
    """What must be known to use the weights, as a safetensors or an ONNX file can keep it."""
    return {"format": "1", **{key: json.dumps(value) for key, value in asdict(network).items()}}


def network_from(metadata: Mapping[str, str]) -> Network:
    """The inverse of `metadata_of`. Raises ValueError that says what is wrong."""
    if metadata.get("format") not in ("1", "pt"):  # the latter where hubs' libraries need it
        raise ValueError(f"format {metadata.get('format')!r} is not one that this version reads")
    try:
        found = {name: json.loads(metadata[name]) for name in ("arch", "classes", "mean", "std")}
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    arch, classes = found["arch"], found["classes"]
    if not isinstance(arch, str) or not arch:
        raise ValueError("arch is not a name")
    if not isinstance(classes, list) or not all(isinstance(c, str) and c for c in classes):
        raise ValueError("classes is not a list of names")
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError("classes is not a list of at least two different names")
    mean, std = (_triple(found[name], name) for name in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError("std is not above 0")
    return Network(arch, tuple(classes), mean, std)


def is_onnx(file: Path) -> bool:
    """Whether a file is an ONNX model by its first bytes, or claims to be by its name."""
    if file.suffix.lower() == ".onnx":
        return True
    try:
        with file.open("rb") as stream:
            return file.is_file() and begins_onnx(stream.read(HEAD))
    except OSError:
        return False


def begins_onnx(head: bytes) -> bool:
    """Whether these are a model's first fields: the format's version, and who wrote the file."""
    return len(head) > 3 and head[0] == 0x08 and head[1] < 0x40 and head[2] in (0x12, 0x1A, 0x3A)


def _triple(values: object, name: str) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{name} is not a list of three numbers")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 1e6:  # nor NaN
            raise ValueError(f"{name} is not a list of three numbers")
    first, second, third = map(float, values)
    return first, second, third


def _single(tensor: "Tensor") -> "Tensor":
    return tensor.float() if tensor.is_floating_point() else tensor


def _half(key: str, tensor: "Tensor") -> "Tensor":
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not bool(half.isfinite().all()):
        raise RunError(f"{key} has values that half precision cannot hold")
    return half
