"""Run a model on preprocessed images, in PyTorch or ONNX Runtime.

Running an ONNX file does not import PyTorch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from resnet56.data.images import FloatArray, UInt8Array
from resnet56.errors import MissingExtraError, RunError, one_line
from resnet56.libraries import import_onnxruntime
from resnet56.runs.checkpoint import ModelConfig
from resnet56.runs.pretrained import config_from_metadata
from resnet56.threads import check_threads

if TYPE_CHECKING:
    import torch

    from resnet56.model import ResNet
    from resnet56.progress import ProgressCallback


class Outputs(NamedTuple):
    """The outputs of a model for N images, as float32."""

    logits: FloatArray  # (N, classes)
    # Custom models without an `explain` method have neither maps (H = W = 0) nor features (C = 0).
    maps: FloatArray  # (N, classes, 8, 8) class activation maps
    features: FloatArray  # (N, C) after global average pooling


class Backend(Protocol):
    """Runs a model on preprocessed images."""

    runtime: str  # name of the library and the device, for messages

    def run(self, images: UInt8Array) -> Outputs:
        """Run the model on uint8 images (N, 3, 32, 32)."""
        ...

    def logits(
        self, images: "torch.Tensor", batch: int, advance: "ProgressCallback"
    ) -> "torch.Tensor":
        """Return the logits on the CPU: uint8 (N, 3, 32, 32) -> float32 (N, C)."""
        ...


class TorchBackend:
    """Runs a model in PyTorch, on any device."""

    def __init__(self, model: "ResNet", config: ModelConfig, device: "torch.device") -> None:
        import torch

        from resnet56.inference import InferenceModel, can_fold

        self.model = model
        self.config = config
        self.inference_model = InferenceModel(model) if can_fold(model) else model
        self.device = device
        self.runtime = f"PyTorch on {device}"
        self.mean = torch.tensor(config.mean, device=device)
        self.std = torch.tensor(config.std, device=device)

    def run(self, images: UInt8Array) -> Outputs:
        """Run the model on uint8 images (N, 3, 32, 32)."""
        import torch

        from resnet56.data.augment import normalize

        with torch.inference_mode():
            x = normalize(torch.from_numpy(images).to(self.device), self.mean, self.std)
            if hasattr(self.inference_model, "explain"):
                outputs = self.inference_model.explain(x)
            else:  # a custom model
                logits = self.inference_model(x).float()
                outputs = (logits, x.new_empty(*logits.shape, 0, 0), x.new_empty(len(x), 0))
            return Outputs(*(output.cpu().numpy() for output in outputs))

    def logits(
        self, images: "torch.Tensor", batch: int, advance: "ProgressCallback"
    ) -> "torch.Tensor":
        """Return the logits on the CPU: uint8 (N, 3, 32, 32) -> float32 (N, C)."""
        from resnet56.inference import predict_logits

        mean, std = self.config.mean, self.config.std
        return predict_logits(self.inference_model, images, mean, std, "fp32", batch, advance)


class OnnxBackend:
    """Runs a model from `resnet56 export` in ONNX Runtime, on the CPU."""

    runtime = "ONNX Runtime on cpu"

    @classmethod
    def from_file(cls, path: Path, threads: int | None = None) -> "OnnxBackend":
        """Load a file.

        Raises:
            RunError: the file cannot be read, or was not exported by this package.
            MissingExtraError: ONNX Runtime is not installed.
        """
        try:
            return cls(path.read_bytes(), str(path), threads)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from None

    def __init__(self, content: bytes, name: str, threads: int | None = None) -> None:
        if threads is not None:
            check_threads(threads)
        try:
            onnxruntime = import_onnxruntime()
        except ImportError:
            raise MissingExtraError("ONNX Runtime", "onnx") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0 selects one thread per core
        options.log_severity_level = 3  # hides warnings, which also occur for valid graphs
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises exceptions of unrelated types
            raise RunError(f"{name} is not a valid ONNX file: {one_line(error)}") from None
        hint = "create it with resnet56 export"
        try:
            self.config = config_from_metadata(self.session.get_modelmeta().custom_metadata_map)
        except ValueError as error:
            raise RunError(
                f"{name} has no valid model metadata: {one_line(error)}; {hint}"
            ) from None
        for count in (1, 2):
            if problem := self._check(count):
                raise RunError(f"{name} {problem}; {hint}")

    def _check(self, count: int) -> str | None:
        """Run the model on `count` random images, and check its outputs.

        Returns a description of the first problem, or None if the outputs are valid.
        """
        logits, maps = (count, len(self.config.classes)), (count, len(self.config.classes), 8, 8)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        try:
            outputs = self.run(images)
            shapes = tuple(np.shape(output) for output in outputs)
            finite = all(np.isfinite(output).all() for output in outputs)
        except Exception:  # ONNX Runtime raises exceptions of unrelated types
            return f"fails on a uint8 batch of shape {images.shape}"
        if shapes[:2] != (logits, maps):
            return f"does not return logits and maps for its {len(self.config.classes)} classes"
        if len(shapes[2]) != 2 or shapes[2][0] != count:
            return "does not return features"
        return None if finite else "returns outputs that are not finite"

    def run(self, images: UInt8Array) -> Outputs:
        """Run the model on uint8 images (N, 3, 32, 32)."""
        return Outputs(*self.session.run(Outputs._fields, {"images": images}))

    def logits(
        self, images: "torch.Tensor", batch: int, advance: "ProgressCallback"
    ) -> "torch.Tensor":
        """Return the logits on the CPU: uint8 (N, 3, 32, 32) -> float32 (N, C)."""
        import torch

        logits = []
        for chunk in images.cpu().split(batch):
            logits.append(torch.from_numpy(self.run(chunk.numpy()).logits))
            advance(len(chunk))
        return torch.cat(logits)
