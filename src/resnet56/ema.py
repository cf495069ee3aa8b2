"""Exponential moving averages (EMA) of a network's weights over its training steps."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from resnet56.runtime import Precision, autocast

# Above it, the averaged running statistics of batch norm are those of much older weights than the
# averaged weights are, so they are re-estimated.
LONG_DECAY = 0.9995
REESTIMATED_ON = 10_000  # training images


class EMA:
    """An exponential moving average of a model's weights and running statistics.

    The decay grows as (1 + step) / (10 + step) up to the recipe's, so that the average of a
    young run does not remember its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Move towards the model's `tensors`, its state, after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                mine.append(self.tensors[name])
                theirs.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a copy of `tensors`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Tensor], precision: Precision = "fp32"
) -> None:
    """Replace batch norm's running statistics by their means over `batches`.

    The network normalizes by each batch's own statistics meanwhile, as in training (Izmailov et
    al. 2018, section 3.2). The counts of batches stay.

    Args:
        model: changed in place; in evaluation mode afterwards.
        batches: normalized images, each (B, 3, S, S), on the model's device.
        precision: of the forward pass.
    """
    device = next(model.parameters()).device
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = torch.tensor(0, device=device)  # not the one to keep
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    with autocast(device, precision):
        for images in batches:
            model(images)
    for norm, (momentum, count) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, count
    model.eval()
