"""What flows through a network's layers on one batch: responses forward, gradients backward.

Two questions of He et al. 2015 rest on these numbers: whether gradients vanish on the way back
through many layers (section 4.1), and how strong the layers' responses are (figure 7).
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
    """One weighted layer on one batch.

    Its response is what follows its batch norm, before the shortcut's addition and ReLU; of the
    classifier, the logits.
    """

    name: str  # of the convolution or linear layer, as in the state dict: "stage2.3.conv1"
    response_std: float  # standard deviation over images, channels and positions
    response_gradient: float  # norm of the loss's gradient with respect to the response
    weight_gradient: float  # norm of the loss's gradient with respect to the weights
    dead_relus: float | None  # share of channels that are zero everywhere; None without a ReLU


@dataclass(frozen=True)
class Inspection:
    """All layers on one batch, from the image to the classifier."""

    loss: float  # mean cross-entropy of the batch
    layers: tuple[LayerStatistics, ...]


def inspect_layers(
    model: ResNet, images: Tensor, labels: Tensor, *, batch_norm: bool = True
) -> Inspection:
    """One forward and backward pass in training mode, in the type of `model`'s weights.

    Batch norm uses the batch's own statistics, as in a training step. Projection shortcuts are not
    listed, as they are not counted as layers.

    Args:
        model: stays as it is; a copy is run.
        images: (N, 3, S, S) normalized images on the model's device.
        labels: (N,) class indices.
        batch_norm: whether to keep the batch norms; without, each is the identity.
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

    net.use(observe)
    with _exact():
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
    """Put the identity in the place of each batch norm."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())


def _norm(gradient: object) -> float:
    assert isinstance(gradient, Tensor)
    return float(gradient.norm())


@contextmanager
def _exact() -> Iterator[None]:
    """Without TF32 and autocast, whose rounding would show in small gradients."""
    with (
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield
