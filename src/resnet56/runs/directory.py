"""The run directory: what a training leaves on disk, and all that later commands read.

    recipe.json        how it was trained
    environment.json   on what, with which versions, by which command
    metrics.jsonl      a line an epoch
    checkpoint/        checkpoint.json, and the tensor files it names
    evaluation.json    how good it is
    predictions.npz    the test images' logits, labels and indices
    samples.npz        a few images, for the report
    parity.json        whether device or precision matter, where that was asked

Files appear whole or not at all: each is written under another name, flushed to the disk and
renamed. A checkpoint is several files, so its JSON is written last and names the tensor files
with their SHA-256; the previous ones are removed only then. Whenever the power goes, the JSON on
disk names files that are there.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors

from resnet56.errors import RunError
from resnet56.locks import try_lock

if TYPE_CHECKING:  # what reads no tensors starts without PyTorch
    from torch import Tensor

FORMAT = 1  # of the checkpoint; a reader refuses a newer one


@dataclass(frozen=True)
class Network:
    """What must be known to use the weights."""

    arch: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]  # of the training images, in units of [0, 1]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Position:
    """Where a training stands, and what its unfinished epoch has summed up so far."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps taken, over all epochs
    epoch_step: int = 0  # steps of the unfinished epoch
    loss_sum: float = 0.0  # of the unfinished epoch, in nats
    correct: int = 0
    images: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights and, for resuming, the state of its training."""

    network: Network
    model: Mapping[str, "Tensor"]  # the weights to use: the averaged ones where there are any
    training: Mapping[str, "Tensor"] = field(default_factory=dict)  # momentum, raw weights
    position: Position = field(default_factory=Position)
    notes: Mapping[str, Any] = field(default_factory=dict)  # precision, data, loss scale, ...


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well."""
    if path.is_dir():
        raise RunError(f"cannot write {path}: it is a folder; choose a file")
    if path.exists() and not path.is_file():  # a rename would do away with it
        raise RunError(f"cannot write {path}: it is a device or a pipe; choose a file")
    if path.is_symlink():
        path = path.resolve()  # what it points to is replaced, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the new name reaches the disk before any old file goes
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        more = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was there is untouched{more}"
        ) from error
    except safetensors.SafetensorError as error:  # its word for a full disk, among others
        raise RunError(f"cannot write {path}: {error}; what was there is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; RunError if it cannot be written."""
    with _writing(path) as temporary:
        # Files' names, which a text may tell of, need not be UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; RunError if it cannot be written."""
    with _writing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON whole or not at all; lists of plain numbers stay on one line."""
    write_text(path, _readable(content) + "\n")


def write_arrays(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write a compressed .npz file whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def _readable(content: Any, indent: str = "") -> str:
    """JSON with a line a key, except that short or innermost lists are not broken up."""
    deeper = indent + "  "
    if isinstance(content, Mapping) and content:
        lines = [f"{json.dumps(str(k))}: {_readable(v, deeper)}" for k, v in content.items()]
        return "{\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}}}"
    if isinstance(content, list | tuple) and any(isinstance(v, list | dict) for v in content):
        lines = [_readable(value, deeper) for value in content]
        return "[\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}]"
    return json.dumps(content, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; RunError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object")
    return content


class RunDirectory:
    """Reads and writes one run; `path` need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.json"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.evaluation_file = path / "evaluation.json"
        self.predictions_file = path / "predictions.npz"
        self.samples_file = path / "samples.npz"
        self.parity_file = path / "parity.json"
        self.checkpoint_file = path / "checkpoint" / "checkpoint.json"

    def create(self) -> None:
        """Make the directory; RunError if something is in the way."""
        self.refuse_taken()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the run directory {self.path}: {error.strerror or error}"
            ) from None

    def refuse_taken(self) -> None:
        """RunError if a new run cannot begin here, whatever it is that is in the way."""
        if self.checkpoint_file.exists():
            raise RunError(
                f"{self.path} holds a run already; continue it with --resume, or choose "
                "another --out"
            )
        try:
            others = sorted(entry.name for entry in self.path.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:  # a file among them
            raise RunError(
                f"{self.path} cannot be a run directory: {error.strerror or error}; choose "
                "another --out"
            ) from None
        # What a run leaves that was stopped before its first checkpoint may be written over.
        ours = (
            "recipe.json",
            "environment.json",
            "metrics.jsonl",
            "checkpoint",
            "tensorboard",
        )
        others = [name for name in others if name not in ours and not name.endswith(".tmp")]
        if others:
            raise RunError(
                f"{self.path} is not empty ({others[0]} is in it) and is no run; choose "
                "another --out"
            )

    def data_origin(self) -> str | None:
        """What `--data` would load the run's own images again: digits, or a folder."""
        if not self.environment_file.exists():
            return None
        data = read_json(self.environment_file).get("data")
        origin = data.get("origin") if isinstance(data, dict) else None
        return origin if isinstance(origin, str) else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from training here; RunError if one does. Windows knows no such lock."""
        try:
            directory = os.open(self.path, os.O_RDONLY)
        except OSError:  # Windows opens no folders; if it is not there, that is said elsewhere
            yield
            return
        try:
            if not try_lock(directory):
                raise RunError(
                    f"another process trains in {self.path}; wait for its end, or stop it"
                )
            yield
        finally:
            os.close(directory)

    # evaluation.json

    def read_evaluation(self, step: int) -> dict[str, Any] | None:
        """What was measured of the weights after `step` steps: None if it was of earlier ones."""
        if not self.evaluation_file.exists():
            return None
        found = read_json(self.evaluation_file)
        return found if found.get("step", step) == step else None

    # metrics.jsonl

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line; on the disk when this returns."""
        try:
            with self.metrics_file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write {self.metrics_file}: {error.strerror or error}; go on with --resume"
            ) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines, but a last one that a crash cut short; empty before the first epoch."""
        if not self.metrics_file.exists():
            return []
        rows: list[dict[str, Any]] = []
        try:
            text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RunError(f"cannot read {self.metrics_file}: {error.strerror or error}") from None
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines):
                    break
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
                raise RunError(f"{self.metrics_file}:{number} is damaged")
            rows.append(row)
        return rows

    def rewind_metrics(self, epochs: int) -> None:
        """Keep the lines of the first `epochs` epochs: the ones the checkpoint has behind it."""
        if self.metrics_file.exists():
            kept = [row for row in self.read_metrics() if row["epoch"] <= epochs]
            text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            write_text(self.metrics_file, text)

    # parity.json

    def keep_comparison(self, found: Mapping[str, Any], step: int) -> None:
        """Add a comparison of two devices or precisions, of the weights after `step` steps.

        It takes the place of an earlier one of the same two, and those of earlier weights go.
        """
        kept: Any = []
        if self.parity_file.exists():
            kept = read_json(self.parity_file).get("comparisons")
            if not isinstance(kept, list) or not all(isinstance(entry, dict) for entry in kept):
                raise RunError(f"{self.parity_file} is damaged: remove it")
        pair = [found["a"], found["b"]]
        kept = [
            entry
            for entry in kept
            if [entry.get("a"), entry.get("b")] != pair and entry.get("step", step) == step
        ]
        write_json(self.parity_file, {"comparisons": [*kept, {**found, "step": step}]})

    # checkpoint/

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint; the old one stays whole until the new one is.

        Raises:
            RunError: it could not be written (a full disk); the old one is intact.
        """
        import safetensors.torch

        directory = self.checkpoint_file.parent
        files = {}
        for part in ("model", "training"):
            tensors = {
                name: t.detach().contiguous() for name, t in getattr(checkpoint, part).items()
            }
            content = safetensors.torch.save(tensors)
            name = f"{part}-{checkpoint.position.step:08d}.safetensors"
            write_bytes(directory / name, content)
            files[part] = {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
        write_json(
            self.checkpoint_file,
            {
                "format": FORMAT,
                "network": asdict(checkpoint.network),
                "position": asdict(checkpoint.position),
                "notes": dict(checkpoint.notes),
                "files": files,
            },
        )
        named = {entry["name"] for entry in files.values()} | {self.checkpoint_file.name}
        for path in directory.iterdir():
            if path.name not in named:
                with contextlib.suppress(OSError):  # on Windows another process may read it
                    path.unlink()

    def load(self, *, training: bool = False) -> Checkpoint:
        """Read the checkpoint; with `training`, also what only resuming needs.

        Raises:
            RunError: there is none, it is damaged, or a newer version wrote it.
        """
        if not self.path.is_dir():
            raise RunError(f"there is no run at {self.path}; give the directory of a training")
        if not self.checkpoint_file.exists():
            raise RunError(f"{self.path} has no checkpoint; train there first")
        head = read_json(self.checkpoint_file)
        if isinstance(head.get("format"), int) and head["format"] > FORMAT:
            raise RunError(
                f"{self.checkpoint_file} is of format {head['format']}, newer than this version "
                f"reads ({FORMAT}); update resnet56"
            )
        try:
            network = Network(**{**head["network"], **_tuples(head["network"])})
            position = Position(**head["position"])
            notes = dict(head["notes"])
            parts = {
                part: self._tensors(head["files"][part])
                for part in (("model", "training") if training else ("model",))
            }
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.checkpoint_file} is damaged: {error!r}") from None
        return Checkpoint(network, position=position, notes=notes, **parts)

    def _tensors(self, entry: Mapping[str, str]) -> dict[str, "Tensor"]:
        import safetensors.torch

        path = self.checkpoint_file.parent / Path(entry["name"]).name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise RunError(f"{path} is damaged: its checksum is not the one in checkpoint.json")
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise RunError(f"{path} is damaged: {error}") from None


def _tuples(network: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(network[name]) for name in ("classes", "mean", "std")}


def next_free(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, ... that does not exist."""
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
