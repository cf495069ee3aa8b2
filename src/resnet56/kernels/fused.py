"""Compute relu(batch_norm(x) + residual) in one CPU kernel (kernels/fused.c).

PyTorch runs separate operations, which read and write the same memory three times. These operations
account for a third of the time of a ResNet-56 training step. The kernel compiles in half a second.
Training falls back to PyTorch's operations if no C compiler is installed or if the kernel's results
differ from PyTorch's.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet56.kernels.compiler import UnavailableError, compile_kernel
from resnet56.model import NormReLU, norm_relu

LANES = 16  # as in fused.c; the number of channels must be a multiple of LANES
MAX_CHANNELS = 1024  # more channels could overflow the stack, which stores the sums
REAL = {torch.float32: ["-DREAL=float"], torch.bfloat16: ["-DREAL=uint16_t", "-DBF16"]}


def fused_norm_relu(dtype: torch.dtype) -> NormReLU:
    """Return a replacement for `model.norm_relu`. `dtype` is float32 or bfloat16.

    The replacement runs the kernel in training mode. It calls `model.norm_relu` in evaluation mode,
    and for tensors with another dtype, on another device, or with an unsupported number of
    channels.

    Raises:
        UnavailableError: the kernel cannot be compiled, or its results differ from PyTorch's.
    """
    return _fused_norm_relu(_load(dtype), dtype)


@functools.cache  # compare each library with PyTorch once
def _fused_norm_relu(library: ctypes.CDLL, dtype: torch.dtype) -> NormReLU:
    def fused(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (_supports_norm(norm) and _supports_input(x, dtype)):
            return norm_relu(norm, x, residual)
        assert isinstance(norm.num_batches_tracked, Tensor)
        norm.num_batches_tracked.add_(1)
        out: Tensor = _NormReLU.apply(
            library, x, residual, norm.weight, norm.bias,
            norm.running_mean, norm.running_var, norm.momentum, norm.eps,
        )  # fmt: skip
        return out

    _check(fused, dtype)
    return fused


def _supports_norm(norm: nn.Module) -> bool:
    """Return whether `norm` is a supported BatchNorm2d in training mode."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.weight.dtype == torch.float32
        and norm.running_mean is not None
        and norm.momentum is not None
    )


def _supports_input(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernel supports the dtype, device and shape of `x`."""
    channels = x.shape[1]
    return (
        x.dtype == dtype
        and x.device.type == "cpu"
        and channels % LANES == 0
        and channels <= MAX_CHANNELS
        and x.numel() > channels
    )


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
        saved = torch.empty(4, channels, dtype=torch.float32, device=x.device)
        library.resnet56_forward(
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
        grads = torch.empty(2, channels, dtype=torch.float32, device=x.device)
        ctx.library.resnet56_backward(
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


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    library = compile_kernel("fused.c", REAL[dtype])
    pointer, size, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    library.resnet56_forward.argtypes = [
        *[pointer] * 3,
        size,
        size,
        *[pointer] * 4,
        real,
        real,
        pointer,
    ]
    library.resnet56_backward.argtypes = [*[pointer] * 5, size, size, *[pointer] * 3]
    library.resnet56_forward.restype = library.resnet56_backward.restype = None
    return library


def _check(fused: NormReLU, dtype: torch.dtype) -> None:
    """Compare the outputs and gradients of the kernel with those of PyTorch."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 32, 5, 5, generator=generator) for _ in range(3)]
    x, residual, grad = (t.to(dtype, memory_format=torch.channels_last) for t in tensors)
    results = []
    for function in (fused, norm_relu):
        norm = nn.BatchNorm2d(32)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
            norm.bias.copy_(torch.linspace(-1, 1, 32))
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        out = function(norm, function(norm, leaves[0]), leaves[1])
        out.backward(grad)
        grads = [tensor.grad for tensor in (*leaves, norm.weight, norm.bias)]
        results.append([out, *grads, norm.running_mean, norm.running_var])
    for actual, expected in zip(*results, strict=True):
        assert actual is not None
        assert expected is not None
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        if not error < (1e-5 if dtype == torch.float32 else 0.05):  # this also rejects NaN
            raise UnavailableError("the kernel's results differ from PyTorch's on this machine")
