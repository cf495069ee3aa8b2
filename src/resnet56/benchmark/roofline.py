"""What a machine can do at most, and the least time that this allows a training step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet56.benchmark.interleave import Contestant
from resnet56.model import ResNet, build, describe
from resnet56.runtime import DTYPES, Resolved


def machine_limits(device: torch.device, precision: Resolved) -> dict[str, float]:
    """Operations and bytes a second that a matrix product and a copy reach: the best of ten."""
    wide = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(wide, wide, device=device).to(DTYPES[precision]) for _ in range(2))
    source = torch.ones(2**26, device=device)  # written, or all its pages would be one of zeros
    target = torch.empty_like(source)

    def best(once: Callable[[], object]) -> float:
        contestant = Contestant("", once, device)
        contestant.turn(1)
        return min(contestant.turn(1) for _ in range(10))

    return {
        "gflops": 2 * wide**3 / best(lambda: a @ b) / 1e9,
        "gigabytes_per_second": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
    }


def floor(arch: str, batch: int, precision: Resolved, limits: dict[str, float]) -> dict[str, float]:
    """The least time that the machine's limits allow a step, in ms.

    Arithmetic: a forward pass, and twice as much backward. Memory: every convolution's and every
    norm's output is written and read forward, read again backward, and its gradient is written
    and read: five passes over what a step must keep, were everything else fused and no cache to
    hold any of it.
    """
    operations = 3 * 2 * describe(arch).macs * batch
    bytes_moved = 5 * batch * _kept_elements(arch) * DTYPES[precision].itemsize
    return {
        "arithmetic_ms": operations / limits["gflops"] / 1e6,
        "memory_ms": bytes_moved / limits["gigabytes_per_second"] / 1e6,
    }


def _kept_elements(arch: str) -> int:
    """Numbers that one image leaves behind in the convolutions and norms of a forward pass."""
    kept = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal kept
        kept += output.numel()

    with torch.device("meta"):
        model: ResNet = build(arch)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, 32, 32))
    return kept
