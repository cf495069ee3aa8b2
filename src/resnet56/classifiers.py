"""Open any network for evaluation: a run, pretrained weights, an exported file or a hub directory.

ONNX files run in ONNX Runtime. All other networks run in PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resnet56.backends import OnnxBackend
from resnet56.data.dataset import Dataset
from resnet56.errors import UsageError, option
from resnet56.evaluation import Classifier, describe_weights, evaluated_model
from resnet56.export import OnnxModel
from resnet56.files import StrPath
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory
from resnet56.runs.pretrained import is_onnx
from resnet56.runs.sources import open_model
from resnet56.runtime import resolve_device, resolve_precision
from resnet56.threads import check_threads, set_threads


@dataclass(frozen=True)
class Network:
    """A network that is ready for evaluation.

    Attributes:
        path: name or path of the network.
        classifier: the model that computes the logits.
        run: the run directory of the network, or None.
        opened: the checkpoint from which the classifier was restored, or None for an ONNX file.
    """

    path: Path
    classifier: Classifier
    run: RunDirectory | None = None
    opened: Checkpoint | None = None

    @property
    def config(self) -> ModelConfig:
        """The configuration: architecture, classes and normalization."""
        return self.classifier.config

    @property
    def data(self) -> str | None:
        """The fingerprint of the data set of the run, if recorded."""
        return self.opened.metadata.get("data") if self.opened else None

    @property
    def weights(self) -> Mapping[str, Any]:
        """The fields of `Evaluation` that describe the weights."""
        if self.opened is None:
            return {"weights": "exported", "epoch": 0, "step": 0}
        return describe_weights(self.opened)

    def has_own_data(self, dataset: Dataset) -> bool:
        """Return whether `dataset` is the data set of the run.

        Only results on this data set are saved. For an imported network, the first evaluation
        determines the data set of the run.
        """
        if self.run is None:
            return False
        if self.data is None:
            return self.run.is_imported()
        return self.data == dataset.fingerprint()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights as a PyTorch checkpoint, even if the network is an ONNX file.

        Raises RunError if the weights cannot be read.
        """
        return self.opened or open_model(self.path).checkpoint


def open_network(
    name_or_path: StrPath,
    *,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
) -> Network:
    """Open a network by name or path.

    Args:
        name_or_path: an ONNX file, or a name or path that `runs.sources.open_model` accepts.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". An ONNX file runs on the CPU.
        precision: "auto", "fp32", "bf16" or "fp16".
        threads: number of CPU threads. By default, one thread per free core.

    Raises:
        RunError: the network does not exist or is damaged.
        UsageError: the device or the precision is not available, or the number of threads is
            invalid.
        MissingExtraError: the network is an ONNX file, and ONNX Runtime is not installed.
    """
    if threads is not None:
        check_threads(threads)
    path = Path(name_or_path)
    if is_onnx(path):
        if device not in ("auto", "cpu") or precision not in ("auto", "fp32"):
            raise UsageError(
                "an ONNX file runs on the CPU in its own precision; omit "
                f"{option('device')} and {option('precision')}"
            )
        model: Classifier = OnnxModel(OnnxBackend.from_file(path, threads))
        return Network(path, model)
    source = open_model(name_or_path)
    return network_of(
        path, source.checkpoint, source.run, device=device, precision=precision, threads=threads
    )


def network_of(
    path: Path,
    checkpoint: Checkpoint,
    run: RunDirectory | None = None,
    *,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
) -> Network:
    """Restore a network from a checkpoint.

    Args:
        path: name or path of the network.
        checkpoint: the checkpoint with the weights of the network.
        run: the run directory of the network, or None.
        device, precision, threads: as in `open_network`.

    Raises:
        RunError: the weights do not match the architecture.
        NotFiniteError: the outputs are not finite.
        UsageError: the device or the precision is not available.
    """
    torch_device = resolve_device(device)
    if threads is not None or torch_device.type == "cpu":
        set_threads(threads)
    resolved = resolve_precision(precision, torch_device)
    model = evaluated_model(checkpoint, torch_device, resolved)
    return Network(path, model, run, checkpoint)
