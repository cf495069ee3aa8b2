"""A trained network for other programs: an ONNX file, or a folder as model hubs expect it."""

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

from resnet56.data.augment import normalize
from resnet56.data.dataset import Split
from resnet56.errors import Error, MissingExtraError, RunError
from resnet56.evaluation import BATCH, Tick, figures_of
from resnet56.files import write_bytes
from resnet56.inference import restore
from resnet56.libraries import import_onnxruntime
from resnet56.model import Architecture, BasicBlock, PadShortcut, ResNet, conv1x1
from resnet56.predict import OnnxBackend, TorchBackend
from resnet56.runs.checkpoint import Checkpoint, Network
from resnet56.runs.pretrained import metadata_of
from resnet56.runs.schema import Metrics

TOLERANCE = 1e-4  # of logits
CHECKED = 256  # images on which an exported file must agree with PyTorch
CPU = torch.device("cpu")


class _FromPixels(nn.Module):
    """The network with its normalisation inside: whoever runs the file cannot get it wrong."""

    def __init__(self, model: ResNet, network: Network) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(network.mean))
        self.register_buffer("std", torch.tensor(network.std))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 32, 32) uint8 -> (N, classes) logits and (N, classes, 8, 8) maps."""
        return self.model.explain(normalize(images, self.mean, self.std))  # type: ignore[arg-type]


def to_onnx(checkpoint: Checkpoint, *, checked: bool = True) -> bytes:
    """The content of an ONNX file that gives the same answers as PyTorch.

    Its input `images` is (N, 3, 32, 32) uint8 RGB, its outputs are `logits` (N, C) and `maps`
    (N, C, 8, 8), for any N. The metadata hold arch, classes, mean and std, as JSON.

    Args:
        checkpoint: the network and its weights.
        checked: whether to compare; left out where only the speed matters, not the answers.

    Raises:
        MissingExtraError: the extra `onnx` is not installed.
        Error: the exported network differs from PyTorch's on `CHECKED` images.
    """
    try:
        import_onnxruntime()  # what checks it
        import onnxscript  # noqa: F401  # what PyTorch writes it with
    except ImportError:
        raise MissingExtraError("what writes ONNX", "onnx") from None
    pixels = _FromPixels(_convolved(restore(checkpoint, CPU)), checkpoint.network)
    example = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),)
    with _quiet():
        program = torch.onnx.export(
            pixels.eval(),
            example,
            dynamo=True,
            input_names=["images"],
            output_names=["logits", "maps"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    assert program is not None  # it is None only when it writes the file itself
    proto = program.model_proto
    for key, value in metadata_of(checkpoint.network).items():
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString()
    if checked:
        check(content, checkpoint)
    return content


def _convolved(model: ResNet) -> ResNet:
    """The network with its padded shortcuts as 1x1 convolutions of zeros and ones: exactly equal.

    Programs keep channels in blocks between convolutions; a slice and a pad break those up, and
    with them the fusing of each later block's sum. ONNX Runtime takes 7 to 9 % longer over them.
    """
    for block in model.modules():
        if isinstance(block, BasicBlock) and isinstance(pad := block.shortcut, PadShortcut):
            channels = block.conv1.in_channels
            conv = conv1x1(channels, pad.before + channels + pad.behind, pad.stride)
            nn.init.zeros_(conv.weight)
            nn.init.eye_(conv.weight[pad.before : pad.before + channels, :, 0, 0])
            block.shortcut = conv
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's remarks to its own developers, which come by three ways."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def check(content: bytes, checkpoint: Checkpoint) -> None:
    """Error unless the ONNX file and PyTorch agree: same classes, logits within `TOLERANCE`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (CHECKED // 2, 3, 8, 8), generator=generator)
    fine = torch.randint(0, 256, (CHECKED // 2, 3, 32, 32), generator=generator)
    patches = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    images = torch.cat((patches, fine)).to(torch.uint8).numpy()
    ours = TorchBackend(restore(checkpoint, CPU), checkpoint.network, CPU).run(images)
    theirs = OnnxBackend(content, "the exported file").run(images)
    worst = float(np.abs(ours[0] - theirs[0]).max())
    changed = int((ours[0].argmax(axis=1) != theirs[0].argmax(axis=1)).sum())
    apart = float(np.abs(ours[1] - theirs[1]).max())
    if not (changed == 0 and worst <= TOLERANCE and apart <= 10 * TOLERANCE):
        raise Error(
            f"the exported network is not the same: {changed} of {len(images)} images change "
            f"their class, logits differ by up to {worst:.2g}, maps by {apart:.2g}; nothing is "
            "written"
        )


class Exported:
    """A network as `to_onnx` writes it, to be measured beside PyTorch's."""

    def __init__(self, backend: OnnxBackend) -> None:
        self.backend = backend
        self.network = backend.network

    @classmethod
    def of(cls, checkpoint: Checkpoint, threads: int | None = None) -> "Exported":
        """The checkpoint's network, exported."""
        return cls(OnnxBackend(to_onnx(checkpoint), "the exported file", threads))

    def logits(self, images: Tensor, batch: int = BATCH, tick: Tick = lambda count: None) -> Tensor:
        """(N, 3, 32, 32) uint8 -> (N, C) float32."""
        parts = []
        for chunk in images.cpu().split(batch):
            parts.append(torch.from_numpy(self.backend.run(chunk.numpy())[0]))
            tick(len(chunk))
        return torch.cat(parts)

    def figures(self, split: Split, tick: Tick = lambda count: None) -> Metrics:
        """Metrics on `split`, as an entry of evaluation.json."""
        return figures_of(self.logits(split.images, tick=tick), split, self.network.classes)


def write_onnx(checkpoint: Checkpoint, path: Path) -> None:
    """Write `to_onnx`'s file, whole or not at all."""
    write_bytes(path, to_onnx(checkpoint))


def write_hub_folder(
    checkpoint: Checkpoint, folder: Path, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Write config.json, model.safetensors and README.md with front matter, all or nothing.

    Args:
        checkpoint: the network.
        folder: to make; it must not be there, or be empty.
        evaluation: the content of evaluation.json, where the network has one.

    Raises:
        RunError: the folder is in the way, or cannot be written, or the weights do not fit.
        NotFiniteError: the network gives outputs that are not finite.
    """
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise RunError(f"{folder} is in the way; choose another --out")
    restore(checkpoint, CPU)  # refuses what gives no answers
    model = {key: tensor.contiguous() for key, tensor in checkpoint.model.items()}
    # The hub's libraries read no file whose "format" is not the framework that its tensors are of.
    metadata = metadata_of(checkpoint.network) | {"format": "pt"}
    weights = safetensors.torch.save(model, metadata=metadata)
    card = hub_card(checkpoint.network, folder.name, evaluation)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_bytes(made / "model.safetensors", weights)
        config = json.dumps(hub_config(checkpoint.network), indent=2)
        write_bytes(made / "config.json", f"{config}\n".encode())
        write_bytes(made / "README.md", card.encode())
        made.chmod(0o755)  # mkdtemp's is the owner's alone
        if folder.exists():
            folder.rmdir()
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def hub_config(network: Network) -> dict[str, Any]:
    """The network's facts under the names that hubs and their libraries look for."""
    return {
        "architecture": network.arch,
        "num_classes": len(network.classes),
        "input_size": [3, 32, 32],
        "mean": list(network.mean),
        "std": list(network.std),
        "id2label": {str(index): name for index, name in enumerate(network.classes)},
        "label2id": {name: index for index, name in enumerate(network.classes)},
    }


def hub_card(network: Network, name: str, evaluation: Mapping[str, Any] | None) -> str:
    """A model card: front matter, what it is, how good, how to use it."""
    test = (evaluation or {}).get("test")
    front: dict[str, Any] = {
        "library_name": "resnet56",
        "pipeline_tag": "image-classification",
        "tags": ["resnet", network.arch, "pytorch", "32x32"],
        "metrics": ["accuracy"],
    }
    measured = "It comes without a measurement."
    if evaluation and test:
        low, high = (100 * bound for bound in test["accuracy_interval"])
        measured = (
            f"Test accuracy {100 * test['accuracy']:.2f} % (95 % interval {low:.2f} to {high:.2f}) "
            f"on {test['n']:,} images: {evaluation['data']}."
        )
        front["model-index"] = [
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
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())  # JSON is YAML
    return _CARD.format(
        front=lines,
        name=name,
        arch=network.arch,
        family="plain" if Architecture.parse(network.arch).shortcut == "none" else "residual",
        classes=", ".join(network.classes),
        count=len(network.classes),
        mean=list(network.mean),
        std=list(network.std),
        measured=measured,
    )


_CARD = """\
---
{front}
---

# {name}

`{arch}`, a {family} network for 32x32 images (He et al. 2015, section 4.2). Its classes are
{classes}.

{measured}

Images are cropped to the central square, resized to 32x32 with antialiasing, scaled to [0, 1]
and normalised with the mean {mean} and the standard deviation {std}.

```python
from resnet56 import build
from safetensors.torch import load_file

model = build("{arch}", classes={count})
model.load_state_dict(load_file("model.safetensors"))
model.eval()
```

Pictures of anything else get one of the classes, too: the network knows no other.
"""
