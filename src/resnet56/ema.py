"""Exponential moving averages (EMA) of the weights of a model."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from resnet56.runtime import Precision, autocast

# Above this decay, the averaged batch norm statistics do not match the EMA weights, so training
# re-estimates them.
REESTIMATION_DECAY = 0.9995
REESTIMATION_IMAGES = 10_000  # number of training images for the re-estimation


class EMA:
    """An exponential moving average of the weights and running statistics of a model.

    The decay is min(decay, (1 + step) / (10 + step)). The lower decay early in training prevents
    the random initial weights from dominating the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self._averaged = [name for name, t in self.tensors.items() if t.is_floating_point()]
        # Counters, such as `num_batches_tracked` of batch norm, are not averaged.
        self._copied = [name for name, t in self.tensors.items() if not t.is_floating_point()]

    def decay_at(self, step: int) -> float:
        """Return the decay at `step`, which counts from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    def update(self, tensors: Mapping[str, Tensor], weight: float | Tensor) -> None:
        """Move the average toward the state of the model.

        Args:
            tensors: the state of the model.
            weight: the weight of this state, 1 - `decay_at(step)`. In a CUDA graph, the weight is a
                scalar tensor on the device.
        """
        averages = [self.tensors[name] for name in self._averaged]
        values = [tensors[name] for name in self._averaged]
        if isinstance(weight, Tensor):
            differences = torch._foreach_sub(values, averages)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(averages, differences)
        else:
            torch._foreach_lerp_(averages, values, weight)
        if self._copied:
            torch._foreach_copy_(
                [self.tensors[name] for name in self._copied],
                [tensors[name] for name in self._copied],
            )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the average to the values of `tensors`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Tensor],
    precision: Precision = "fp32",
    frozen: Sequence[nn.Module] = (),
) -> None:
    """Replace the running statistics of batch norm with the means over `batches`.

    The forward pass uses the statistics of each batch, as in training (Izmailov et al. 2018,
    section 3.2). `num_batches_tracked` does not change.

    Args:
        model: the function changes this model in place, and leaves it in evaluation mode.
        batches: batches of normalized images, each (B, 3, S, S), on the device of the model.
        precision: precision of the forward pass.
        frozen: modules whose statistics do not change.
    """
    device = next(model.parameters()).device
    fixed = {module for parent in frozen for module in parent.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m not in fixed]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Use a new tensor, because `reset_running_stats` would change the saved tensor.
        norm.num_batches_tracked = torch.tensor(0, device=device)
        norm.reset_running_stats()
        norm.momentum = None  # batch norm then computes the mean over the batches
    model.train()
    for module in frozen:
        module.eval()
    with autocast(device, precision):
        for images in batches:
            model(images)
    for norm, (momentum, count) in zip(norms, saved, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, count
    model.eval()
