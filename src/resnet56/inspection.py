"""Measure the responses and gradients of all layers on one batch.

The measurements answer two questions from He et al. 2015: whether gradients vanish in deep networks
(section 4.1), and how large the responses of the layers are (figure 7).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.model import ResNet


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a convolutional or linear layer on one batch.

    The response of a convolution is the output of its batch norm, before the shortcut addition and
    the ReLU. The response of the classifier is its output, the logits.
    """

    name: str  # name in the state dict, such as "stage2.3.conv1"
    response_std: float  # standard deviation over images, channels and positions
    response_gradient: float  # norm of the gradient of the loss with respect to the response
    weight_gradient: float  # norm of the gradient of the loss with respect to the weights
    dead_relus: float | None  # fraction of channels that are always zero; None if no ReLU follows


@dataclass(frozen=True)
class Inspection:
    """Statistics of all layers on one batch, in the order of the forward pass."""

    loss: float  # mean cross-entropy of the batch
    layers: tuple[LayerStatistics, ...]


def inspect_layers(
    model: ResNet, images: Tensor, labels: Tensor, *, batch_norm: bool = True
) -> Inspection:
    """Run a forward and a backward pass in training mode, and return statistics of each layer.

    The passes use the dtype of the weights. Batch norm uses the statistics of the batch, as in a
    training step. The result omits projection shortcuts, which the paper does not count as layers.

    Args:
        model: model to inspect. The function uses a copy and does not change the model.
        images: normalized images (N, 3, S, S) on the device of the model.
        labels: class indices (N,).
        batch_norm: if False, replace each batch norm with the identity.
    """
    net = copy.deepcopy(model).train()
    if not batch_norm:
        _remove_batch_norm(net)
    net.zero_grad()
    names = {module: name for name, module in net.named_modules()}
    responses: dict[str, Tensor] = {}
    dead: dict[str, float] = {}

    def observe(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        response: Tensor = norm(x)
        response.retain_grad()
        layer = names[norm].replace("bn", "conv")
        responses[layer] = response
        out = F.relu(response if residual is None else response + residual)
        dead[layer] = float((out.detach().amax(dim=(0, 2, 3)) <= 0).float().mean())
        return out

    net.set_norm_relu(observe)
    with _full_precision():
        logits = net(images)
        logits.retain_grad()
        responses["fc"] = logits
        loss = F.cross_entropy(logits, labels)
        loss.backward()
    layers = tuple(
        LayerStatistics(
            name=name,
            response_std=float(response.detach().std(correction=0)),
            response_gradient=_norm(response.grad),
            weight_gradient=_norm(net.get_submodule(name).weight.grad),
            dead_relus=dead.get(name),
        )
        for name, response in responses.items()
    )
    return Inspection(float(loss.detach()), layers)


def _remove_batch_norm(net: nn.Module) -> None:
    """Replace each batch norm with the identity."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())


def _norm(gradient: object) -> float:
    assert isinstance(gradient, Tensor)
    return float(gradient.norm())


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disable TF32 and autocast, because their rounding errors affect small gradients."""
    with (
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield
