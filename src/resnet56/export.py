"""Export a trained model to ONNX or to a directory for model hubs."""

import contextlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from resnet56.backends import OnnxBackend, Outputs, TorchBackend
from resnet56.data.augment import normalize
from resnet56.data.dataset import Split
from resnet56.errors import Error, MissingExtraError, RunError, option
from resnet56.files import write_bytes
from resnet56.inference import BATCH, restore
from resnet56.libraries import import_onnxruntime
from resnet56.metrics import split_metrics
from resnet56.model import Architecture, BasicBlock, PadShortcut, ResNet, conv1x1
from resnet56.progress import ProgressCallback
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.pretrained import config_to_metadata
from resnet56.runs.schema import Metrics

TOLERANCE = 1e-4  # maximum difference between logits; ten times as large for other outputs
CHECK_IMAGES = 256  # number of images for the comparison of the exported file with PyTorch
CPU = torch.device("cpu")


class _WithNormalization(nn.Module):
    """A model that normalizes its input, so that the exported file accepts uint8 images."""

    def __init__(self, model: ResNet, config: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(config.mean))
        self.register_buffer("std", torch.tensor(config.std))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs of `ResNet.explain` for uint8 images (N, 3, 32, 32)."""
        return self.model.explain(normalize(images, self.mean, self.std))  # type: ignore[arg-type]


def to_onnx(checkpoint: Checkpoint, *, checked: bool = True) -> bytes:
    """Export a checkpoint to ONNX, and return the content of the file.

    The input `images` contains uint8 RGB images (N, 3, 32, 32). The outputs are `logits`
    (N, classes), `maps` (N, classes, 8, 8) and `features` (N, C). The batch size N is dynamic. The
    metadata contains `arch`, `classes`, `mean` and `std` as JSON.

    Args:
        checkpoint: the model to export.
        checked: whether to compare the outputs with those of PyTorch. Speed measurements do not
            require the comparison.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        Error: the outputs differ from those of PyTorch. See `check_onnx`.
    """
    try:
        import_onnxruntime()  # `check_onnx` requires ONNX Runtime
        import onnxscript  # noqa: F401  # `torch.onnx.export` requires onnxscript
    except ImportError:
        raise MissingExtraError("the ONNX exporter", "onnx") from None
    model = _replace_padding(restore(checkpoint, CPU))
    wrapped = _WithNormalization(model, checkpoint.config)
    example = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),)
    with _silence_exporter():
        program = torch.onnx.export(
            wrapped.eval(),
            example,
            dynamo=True,
            input_names=["images"],
            output_names=list(Outputs._fields),
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    assert program is not None  # with a file name, `torch.onnx.export` would return None
    proto = program.model_proto
    for key, value in config_to_metadata(checkpoint.config).items():
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString()
    if checked:
        check_onnx(content, checkpoint)
    return content


def _replace_padding(model: ResNet) -> ResNet:
    """Replace padded shortcuts with equivalent 1x1 convolutions, whose weights are zeros and ones.

    Inference engines use a blocked channel layout between convolutions. Slice and pad operations
    break this layout and prevent the fusion of later additions. Without the replacement, ONNX
    Runtime is 7 to 9 % slower.
    """
    for block in model.modules():
        if isinstance(block, BasicBlock) and isinstance(pad := block.shortcut, PadShortcut):
            channels = block.conv1.in_channels
            conv = conv1x1(
                channels, pad.channels_before + channels + pad.channels_after, pad.stride
            )
            nn.init.zeros_(conv.weight)
            nn.init.eye_(conv.weight[pad.channels_before : pad.channels_before + channels, :, 0, 0])
            block.shortcut = conv
    return model


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppress the exporter's warnings, log messages and output to stdout."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def check_onnx(content: bytes, checkpoint: Checkpoint) -> None:
    """Check that an ONNX file and PyTorch agree on `CHECK_IMAGES` random images.

    Raises:
        Error: a predicted class differs, or an output differs by more than the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (CHECK_IMAGES // 2, 3, 8, 8), generator=generator)
    fine = torch.randint(0, 256, (CHECK_IMAGES // 2, 3, 32, 32), generator=generator)
    patches = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    images = torch.cat((patches, fine)).to(torch.uint8).numpy()
    backend = TorchBackend(restore(checkpoint, CPU), checkpoint.config, CPU)
    expected = backend.run(images)
    actual = OnnxBackend(content, "the exported file").run(images)
    changed = int((expected.logits.argmax(axis=1) != actual.logits.argmax(axis=1)).sum())
    logits, maps, features = (
        float(np.abs(a - b).max()) for a, b in zip(expected, actual, strict=True)
    )
    if not (changed == 0 and logits <= TOLERANCE and max(maps, features) <= 10 * TOLERANCE):
        raise Error(
            f"the exported model does not match PyTorch: predicted classes differ for {changed} of "
            f"{len(images)} images, logits by up to {logits:.2g}, maps by up to {maps:.2g}, and "
            f"features by up to {features:.2g}; no file was written"
        )


class OnnxModel:
    """A model in ONNX Runtime, with the interface that evaluation requires."""

    runtime = "ONNX Runtime"
    device = CPU
    precision = "as stored"  # the file determines the precision

    def __init__(self, backend: OnnxBackend) -> None:
        self.backend = backend
        self.config = backend.config

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, threads: int | None = None) -> "OnnxModel":
        """Export a checkpoint to ONNX, and load the result in ONNX Runtime."""
        return cls(OnnxBackend(to_onnx(checkpoint), "the exported file", threads))

    def logits(
        self, images: Tensor, batch: int = BATCH, advance: ProgressCallback = lambda count: None
    ) -> Tensor:
        """Return the logits on the CPU: uint8 (N, 3, 32, 32) -> float32 (N, C)."""
        return self.backend.logits(images, batch, advance)

    def metrics(self, split: Split, advance: ProgressCallback = lambda count: None) -> Metrics:
        """Return the metrics on a split, in the format of evaluation.json."""
        return split_metrics(self.logits(split.images, advance=advance), split, self.config.classes)


def write_onnx(checkpoint: Checkpoint, path: Path) -> None:
    """Export a checkpoint to an ONNX file. The function writes the file atomically."""
    write_bytes(path, to_onnx(checkpoint))


def write_hub_directory(
    checkpoint: Checkpoint, directory: Path, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Write config.json, model.safetensors and a model card atomically.

    Args:
        checkpoint: the model to export.
        directory: the directory to create. An existing directory must be empty.
        evaluation: the content of evaluation.json, if available.

    Raises:
        RunError: the directory already exists and is not empty, or the weights do not match the
            architecture.
        NotFiniteError: the outputs of the model are not finite.
    """
    if directory.exists() and not (directory.is_dir() and next(directory.iterdir(), None) is None):
        raise RunError(f"{directory} already exists; choose another {option('out')}")
    restore(checkpoint, CPU)  # raises an error if the weights are unusable
    state_dict = {key: tensor.contiguous() for key, tensor in checkpoint.model.items()}
    # Hub libraries require the metadata field "format", which names the framework of the tensors.
    metadata = config_to_metadata(checkpoint.config) | {"format": "pt"}
    weights = safetensors.torch.save(state_dict, metadata=metadata)
    card = model_card(checkpoint.config, directory.name, evaluation)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_bytes(temporary / "model.safetensors", weights)
        config = json.dumps(hub_config(checkpoint.config), indent=2)
        write_bytes(temporary / "config.json", f"{config}\n".encode())
        write_bytes(temporary / "README.md", card.encode())
        temporary.chmod(0o755)  # the directory from `mkdtemp` is accessible only to its owner
        if directory.exists():
            directory.rmdir()
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json, with the keys that hub libraries expect."""
    return {
        "architecture": config.arch,
        "num_classes": len(config.classes),
        "input_size": [3, 32, 32],
        "mean": list(config.mean),
        "std": list(config.std),
        "id2label": {str(index): name for index, name in enumerate(config.classes)},
        "label2id": {name: index for index, name in enumerate(config.classes)},
    }


def model_card(config: ModelConfig, name: str, evaluation: Mapping[str, Any] | None) -> str:
    """Return a model card: front matter, description, accuracy and usage."""
    test = (evaluation or {}).get("test")
    front_matter: dict[str, Any] = {
        "library_name": "resnet56",
        "pipeline_tag": "image-classification",
        "tags": ["resnet", config.arch, "pytorch", "32x32"],
        "metrics": ["accuracy"],
    }
    accuracy = "It has not been evaluated."
    if evaluation and test:
        low, high = (100 * bound for bound in test["accuracy_interval"])
        accuracy = (
            f"Test accuracy: {100 * test['accuracy']:.2f} % "
            f"(95 % interval {low:.2f} to {high:.2f}) "
            f"on {test['n']:,} images ({evaluation['data']})."
        )
        front_matter["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": evaluation["data"], "type": "images"},
                        "metrics": [{"type": "accuracy", "value": test["accuracy"]}],
                    }
                ],
            }
        ]
    lines = "\n".join(
        f"{key}: {json.dumps(value)}" for key, value in front_matter.items()
    )  # the front matter is YAML, which includes JSON
    return _CARD.format(
        front_matter=lines,
        name=name,
        arch=config.arch,
        family="plain" if Architecture.parse(config.arch).shortcut == "none" else "residual",
        classes=", ".join(config.classes),
        count=len(config.classes),
        mean=list(config.mean),
        std=list(config.std),
        accuracy=accuracy,
    )


_CARD = """\
---
{front_matter}
---

# {name}

`{arch}` is a {family} network for 32x32 images (He et al. 2015, section 4.2). Its classes are
{classes}.

{accuracy}

Preprocessing: crop the center square, resize to 32x32 with antialiasing, scale to [0, 1], and
normalize with mean {mean} and standard deviation {std}.

```python
from resnet56 import build
from safetensors.torch import load_file

model = build("{arch}", classes={count})
model.load_state_dict(load_file("model.safetensors"))
model.eval()
```

The model always predicts one of its classes, even for an unrelated image.
"""
