"""A model over images: logits, then metrics. The model is run as it would be used."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from resnet56.augment import normalize
from resnet56.data import Split
from resnet56.metrics import measure
from resnet56.model import ResNet, build
from resnet56.rundir import Checkpoint
from resnet56.runtime import Resolved, autocast

BATCH = 256


def restore(checkpoint: Checkpoint, device: torch.device) -> ResNet:
    """The checkpoint's network with its weights, on `device`, ready to predict."""
    model = build(checkpoint.network.arch, classes=len(checkpoint.network.classes))
    model.load_state_dict(checkpoint.model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Resolved = "fp32",
    batch: int = BATCH,
) -> Tensor:
    """Logits of unaugmented images.

    Args:
        model: in evaluation mode.
        images: (N, 3, 32, 32) uint8, on any device.
        mean, std: of the training images, in units of [0, 1].
        precision: of the forward pass.
        batch: images at a time.

    Returns:
        (N, C) float32 on the CPU.
    """
    device = next(model.parameters()).device
    scale = (torch.tensor(mean, device=device), torch.tensor(std, device=device))
    parts = []
    for chunk in images.split(batch):
        inputs = normalize(chunk.to(device), *scale).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            parts.append(model(inputs).float())
    return torch.cat(parts).cpu()


def evaluate(
    model: nn.Module,
    split: Split,
    classes: tuple[str, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    precision: Resolved = "fp32",
) -> dict[str, Any]:
    """Metrics of `model` on `split`, as evaluation.json holds them."""
    training = model.training
    logits = predict_logits(model.eval(), split.images, mean, std, precision)
    model.train(training)
    return asdict(measure(logits.numpy(), split.labels.cpu().numpy(), classes))
