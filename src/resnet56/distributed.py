"""Distributed training: the process group and synchronized batch norm."""

import gc
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as group

from resnet56.errors import TrainingError, UsageError, escape, one_line, option


class Distributed(NamedTuple):
    """The rank of this process and the number of processes."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Distributed":
        """Read the variables that torchrun sets. Without these variables, there is one process.

        Raises:
            UsageError: RANK or WORLD_SIZE is not an integer, or they contradict each other.
        """
        world_size, rank = from_environment("WORLD_SIZE", 1), from_environment("RANK", 0)
        if not 0 <= rank < world_size:
            raise UsageError(
                f"RANK={rank} and WORLD_SIZE={world_size} in the environment contradict each "
                "other: RANK must be at least 0 and below WORLD_SIZE; start with torchrun, or "
                "unset both"
            )
        return cls(rank, world_size)

    @property
    def is_main_process(self) -> bool:
        """True for rank 0, the only process that writes files and prints."""
        return self.rank == 0


def from_environment(name: str, default: int) -> int:
    """Return the integer value of an environment variable that torchrun sets.

    Returns `default` if the variable is not set. Raises UsageError if its value is not an integer.
    """
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise UsageError(
            f"{name}={escape(text[:40])} in the environment is not an integer; start with "
            "torchrun, which sets it, or unset it"
        )
    return int(text)


@contextmanager
def process_group(device: torch.device) -> Iterator[Distributed]:
    """Create the process group, and destroy it when the block ends.

    GPUs use NCCL, and other devices use gloo.

    Raises:
        UsageError: the environment does not specify how to reach the other processes.
        TrainingError: another process has ended or cannot be reached.
    """
    dist = Distributed.from_environment()
    if dist.world_size == 1:
        yield dist
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DDP imports torch._dynamo. Import it before creating the process group. Otherwise, that module
    # keeps the group alive, and the threads of gloo sometimes abort the process when it exits.
    import_module("torch._dynamo")

    try:
        group.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:  # MASTER_ADDR or MASTER_PORT is missing or invalid
        raise UsageError(
            f"WORLD_SIZE={dist.world_size} is set, but the processes cannot find each "
            f"other ({one_line(error)}); start with torchrun, or unset WORLD_SIZE"
        ) from None
    except RuntimeError as error:
        raise _connection_error(error) from None
    try:
        yield dist
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold references to DDP
        if isinstance(error, RuntimeError) and _is_connection_error(error):
            raise _connection_error(error) from None
        raise
    finally:
        gc.collect()  # DDP is part of reference cycles; release it before its process group
        group.destroy_process_group()


def _is_connection_error(error: RuntimeError) -> bool:
    """Return whether a connection failed. The messages of gloo's RuntimeErrors contain "gloo"."""
    return isinstance(error, group.DistError) or "gloo" in str(error).lower()


def _connection_error(error: RuntimeError) -> TrainingError:
    # gloo starts its messages with a source file and line, such as "[file.cc:9] ".
    reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]
    return TrainingError(
        "another process of this run has ended or cannot be reached "
        f"({one_line(reason)}); restart all processes with {option('resume', True)}"
    )


def all_reduce_sum(value: Tensor, dist: Distributed) -> Tensor:
    """Sum `value` over all processes, in place."""
    if dist.world_size > 1:
        group.all_reduce(value)
    return value


def all_reduce_max(value: Tensor, dist: Distributed) -> Tensor:
    """Replace `value` with its maximum over all processes, in place."""
    if dist.world_size > 1:
        group.all_reduce(value, op=group.ReduceOp.MAX)
    return value


class _Sum(torch.autograd.Function):
    """Sum a value over all processes. The backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        group.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        group.all_reduce(gradient)
        return gradient


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes.

    PyTorch's SyncBatchNorm supports only GPUs. This class supports all devices. It requires the
    same batch size in all processes, which `Batches` guarantees.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x_float = x.float()
        processes = group.get_world_size()
        count = processes * x.numel() // x.shape[1]
        mean = _Sum.apply(x_float.mean(dim=(0, 2, 3))) / processes
        centered = x_float - mean[:, None, None]
        var = _Sum.apply(centered.square().mean(dim=(0, 2, 3))) / processes
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / max(count - 1, 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        out: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Replace each batch norm of `model` with a synchronized batch norm of the same name and state.

    The function can change `model` in place. Use the returned model.
    """
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = SynchronizedBatchNorm2d(
                    child.num_features, child.eps, child.momentum, device=child.weight.device
                )
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
    return model
