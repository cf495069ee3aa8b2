"""Roofline model: performance limits of a machine, and the minimum time of a training step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet56.benchmark.interleave import Candidate
from resnet56.model import ResNet, build, describe
from resnet56.runtime import DTYPES, Precision

CPU_MATRIX_SIZE, GPU_MATRIX_SIZE = 2048, 8192  # rows and columns of the square matrices
COPIED_ELEMENTS = 2**26  # 256 MiB, more than the caches hold


def machine_limits(device: torch.device, precision: Precision) -> dict[str, float]:
    """Return the throughput of a matrix product in GFLOP/s and of a copy in GB/s.

    Each value is the best of ten runs.
    """
    size = CPU_MATRIX_SIZE if device.type == "cpu" else GPU_MATRIX_SIZE
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    # The source tensor does not contain zeros, because pages of zeros share physical memory until
    # the process writes to them.
    source = torch.ones(COPIED_ELEMENTS, device=device)
    target = torch.empty_like(source)

    def best_time(run_once: Callable[[], object]) -> float:
        candidate = Candidate("", run_once, device)
        candidate.time(1)
        return min(candidate.time(1) for _ in range(10))

    return {
        "gflops": 2 * size**3 / best_time(lambda: a @ b) / 1e9,
        "gigabytes_per_second": 2 * source.nbytes / best_time(lambda: target.copy_(source)) / 1e9,
    }


def roofline_times(
    arch: str, batch: int, precision: Precision, limits: dict[str, float]
) -> dict[str, float]:
    """Return lower bounds on the time of a training step.

    One bound follows from the number of operations, and the other bound from the memory traffic.
    The backward pass requires twice as many operations as the forward pass. The estimate of the
    memory traffic assumes that all operations except convolutions and batch norms are fused, and
    that no tensor stays in a cache. Each output of a convolution or batch norm is then written once
    and read twice, and each gradient is written and read once. This amounts to five passes over all
    stored activations. The times are in ms.
    """
    operations = 3 * 2 * describe(arch).macs * batch
    bytes_moved = 5 * batch * _stored_activations(arch) * DTYPES[precision].itemsize
    return {
        "compute_ms": operations / limits["gflops"] / 1e6,
        "memory_ms": bytes_moved / limits["gigabytes_per_second"] / 1e6,
    }


def _stored_activations(arch: str) -> int:
    """Return the number of output elements of all convolutions and batch norms for one image."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel()

    with torch.device("meta"):
        model: ResNet = build(arch)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, 32, 32))
    return total
