"""relu(batch_norm(x) + residual) in one kernel on the CPU: fused.c, compiled where it runs.

PyTorch's operations read and write the same memory three times over; a step of ResNet-56 spends
a third of its time on that. The C compiler that most Linux machines have makes the kernel in
half a second. Where there is none, or what it makes does not agree with PyTorch, training goes
on with PyTorch's own operations.
"""

import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet56.model import NormReLU, norm_relu

WIDE = 16  # channels must be a multiple, as in fused.c
REAL = {torch.float32: ["-DREAL=float"], torch.bfloat16: ["-DREAL=uint16_t", "-DBF16"]}
# Exact IEEE arithmetic, but for errno and fused multiply-adds.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


class UnavailableError(Exception):
    """There is no kernel on this machine; the message says why."""


def fused_norm_relu(dtype: torch.dtype) -> NormReLU:
    """The kernel for activations of `dtype`, float32 or bfloat16, in training.

    It stands in for `model.norm_relu` wherever it can, and falls back on it elsewhere: in
    evaluation, and for tensors of another type, device or number of channels.

    Raises:
        UnavailableError: no compiler, or a kernel that does not agree with PyTorch.
    """
    library = _compile(dtype)
    _share_threads(library)

    def fused(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (
            type(norm) is nn.BatchNorm2d
            and norm.training
            and x.dtype == dtype
            and x.device.type == "cpu"
            and x.shape[1] % WIDE == 0
            and x.numel() > x.shape[1]
        ):
            return norm_relu(norm, x, residual)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        out: Tensor = _NormReLU.apply(
            library, x, residual, norm.weight, norm.bias,
            norm.running_mean, norm.running_var, norm.momentum, norm.eps,
        )  # fmt: skip
        return out

    _check(fused, dtype)
    return fused


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: ctypes.CDLL,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(x)
        channels = x.shape[1]
        saved = torch.empty(4, channels)
        library.forward(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            x.numel() // channels,
            channels,
            weight.data_ptr(),
            bias.data_ptr(),
            running_mean.data_ptr(),
            running_var.data_ptr(),
            momentum,
            eps,
            saved.data_ptr(),
        )
        ctx.library = library
        ctx.save_for_backward(x, saved, None if residual is None else out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, out = ctx.saved_tensors
        out_grad = out_grad.contiguous(memory_format=torch.channels_last)
        x_grad = torch.empty_like(x)
        residual_grad = None if out is None else torch.empty_like(x)
        channels = x.shape[1]
        grads = torch.empty(2, channels)
        ctx.library.backward(
            out_grad.data_ptr(),
            x.data_ptr(),
            None if out is None else out.data_ptr(),
            x_grad.data_ptr(),
            None if residual_grad is None else residual_grad.data_ptr(),
            x.numel() // channels,
            channels,
            saved.data_ptr(),
            grads[0].data_ptr(),
            grads[1].data_ptr(),
        )
        return None, x_grad, residual_grad, grads[0], grads[1], None, None, None, None


def _compile(dtype: torch.dtype) -> ctypes.CDLL:
    """Compile and load; nothing stays on the disk, so nothing can be stale or tampered with."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if sys.platform != "linux":
        raise UnavailableError("it is made for Linux")
    with (
        as_file(files("resnet56") / "fused.c") as source,
        tempfile.TemporaryDirectory() as folder,
    ):
        made = Path(folder) / "fused.so"
        command = [*compiler, *FLAGS, *REAL[dtype], str(source), "-o", str(made), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            library = ctypes.CDLL(str(made))
        except FileNotFoundError:
            raise UnavailableError(f"there is no C compiler {compiler[0]!r}") from None
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or [f"exit {error.returncode}"]
            raise UnavailableError(f"{compiler[0]} could not compile it: {lines[0]}") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError(f"it could not be compiled and loaded: {error}") from None
    pointer, size, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    library.forward.argtypes = [*[pointer] * 3, size, size, *[pointer] * 4, real, real, pointer]
    library.backward.argtypes = [*[pointer] * 5, size, size, *[pointer] * 3]
    library.forward.restype = library.backward.restype = None
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    """See that the kernel runs on PyTorch's own threads: two sets would fight for the cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        shared = library.threads() == before + 1
    finally:
        torch.set_num_threads(before)
    if not shared:
        raise UnavailableError("its OpenMP is not the one that PyTorch uses")


def _check(fused: NormReLU, dtype: torch.dtype) -> None:
    """Compare with PyTorch, forward and backward, before anything is trained with it."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 32, 5, 5, generator=generator) for _ in range(3)]
    x, residual, grad = (t.to(dtype, memory_format=torch.channels_last) for t in tensors)
    results = []
    for function in (fused, norm_relu):
        norm = nn.BatchNorm2d(32)
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        out = function(norm, function(norm, leaves[0]), leaves[1])
        out.backward(grad)
        results.append([out, leaves[0].grad, norm.weight.grad, norm.running_var])
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None
        assert theirs is not None
        distance = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        if not distance < (1e-5 if dtype == torch.float32 else 0.05):  # a NaN is no agreement
            raise UnavailableError("it does not agree with PyTorch on this machine")
