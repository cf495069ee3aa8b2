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

from resnet56.errors import RunError
from resnet56.files import read_json, write_bytes, write_json
from resnet56.runs.checkpoint import Checkpoint, Network
from resnet56.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parents[1] / "weights"
LARGEST = 2_000_000  # bytes


def names() -> list[str]:
    """The networks that are there, by name."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def read_checkpoint(what: str | Path) -> tuple[Checkpoint, bool]:
    """The checkpoint of a run's directory or of a shipped network, and whether it is shipped.

    A run goes before a shipped network of the same name: it is the user's own.

    Raises:
        RunError: neither is there, or what is there is damaged.
    """
    run = RunDirectory(Path(what))
    if run.checkpoint_file.exists():
        return run.load(), False
    if str(what) in names():
        return load(str(what)), True
    if run.path.exists():
        return run.load(), False  # says what is missing
    there = ", ".join(names()) or "none"
    raise RunError(
        f"there is no run at {what} and no shipped network of that name (shipped: {there}); give "
        "the directory of a training"
    )


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
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error!r}; install the package again") from None
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
    files = {"recipe": run.recipe_file, "evaluation": run.evaluation_file}
    there = {part: read_json(file) for part, file in files.items() if file.exists()}
    network = asdict(checkpoint.network)
    return {"network": network, "weights": checkpoint.notes.get("weights", "last"), **there}


def metadata_of(network: Network) -> dict[str, str]:
    """What must be known to use the weights, as a safetensors or an ONNX file can keep it."""
    return {"format": "1", **{key: json.dumps(value) for key, value in asdict(network).items()}}


def network_from(metadata: Mapping[str, str]) -> Network:
    """The inverse of `metadata_of`. Raises KeyError, TypeError or ValueError for anything else."""
    if metadata["format"] != "1":
        raise ValueError(f"format {metadata['format']}, newer than this version reads")
    arch = json.loads(metadata["arch"])
    classes, mean, std = (tuple(json.loads(metadata[key])) for key in ("classes", "mean", "std"))
    words = all(isinstance(word, str) for word in (arch, *classes))
    if not (words and len(mean) == len(std) == 3):
        raise ValueError("its metadata is not a network's")
    return Network(arch, classes, mean, std)


def _single(tensor: "Tensor") -> "Tensor":
    return tensor.float() if tensor.is_floating_point() else tensor


def _half(key: str, tensor: "Tensor") -> "Tensor":
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not bool(half.isfinite().all()):
        raise RunError(f"{key} has values that half precision cannot hold")
    return half
