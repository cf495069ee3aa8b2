"""Compare a network that uses the kernels of this package with the same network in PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resnet56.kernels.compiler import UnavailableError
from resnet56.model import ResNet, build


@torch.inference_mode(False)
@torch.enable_grad()
def require_agreement(
    wrap: Callable[[ResNet], nn.Module], archs: Sequence[str], images: Tensor
) -> None:
    """Check a bf16 training step with this package's kernels against an fp32 step in PyTorch.

    Args:
        wrap: function that wraps a model in a module whose training steps use the kernels.
        archs: small architectures that use all kernels.
        images: (N, 3, H, W) normalized images on the device of the kernels.

    Raises:
        UnavailableError: the logits, the running statistics or the gradients differ by more than
            rounding to bf16 explains.
    """
    device = images.device
    for arch in archs:
        results = []
        for wrapped in (False, True):
            model = build(arch).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            network = wrap(model) if wrapped else model
            with torch.autocast(device.type, torch.bfloat16, enabled=wrapped):
                logits = network(images).float()
            logits.square().sum().backward()
            statistics = [b for b in model.buffers() if b.is_floating_point()]
            # Rounding to bf16 changes the masks of some ReLUs, so the gradients differ more.
            gradients = [p.grad for p in model.parameters()]
            results.append([(0.02, [logits, *statistics]), (0.5, gradients)])
        for (tolerance, expected), (_, actual) in zip(*results, strict=True):
            for a, b in zip(actual, expected, strict=True):
                if not (a - b).norm() < tolerance * b.norm():  # this also rejects NaN
                    raise UnavailableError(
                        "the kernel's results differ from PyTorch's on this machine"
                    )
