"""Untrained networks with outputs similar to those of trained networks."""

import functools

import torch
from torch import nn

from resnet56 import export
from resnet56.model import build
from resnet56.runs.checkpoint import Checkpoint, ModelConfig

CLASSES = ("blue", "green", "red")


def random_checkpoint(arch: str = "resnet8", classes: tuple[str, ...] = CLASSES) -> Checkpoint:
    """Return a checkpoint whose logits depend on the image, with non-default statistics."""
    model = build(arch, classes=len(classes), seed=3)
    randomize(model, model.fc)
    config = ModelConfig(arch, classes, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return Checkpoint(config, model.state_dict())


@functools.cache
def onnx_file() -> bytes:
    """Return `random_checkpoint()` as an ONNX file. An export takes seconds, so share one."""
    return export.to_onnx(random_checkpoint(), checked=False)


def randomize(model: nn.Module, last: nn.Linear) -> None:
    """Draw the parameters and statistics of batch norm, and the classifier, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                # Weights below 1 keep the sum of 27 blocks, and so the logits, small.
                (module.weight, 0.3, 0.7),
                (module.bias, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(tensor, low, high, generator=generator)
    nn.init.normal_(last.weight, std=1.0, generator=generator)
    nn.init.normal_(last.bias, std=0.2, generator=generator)
