"""Run training steps with Triton kernels on CUDA GPUs, for networks with basic blocks.

The convolutions of these networks have few channels, so they spend most of their time reading and
writing feature maps. On an H100, cuDNN's kernels take twice as long as the kernels in this module
(docs/explanation/gpu-step.md), and PyTorch adds separate kernels for the statistics, the
normalization, the shortcut, the ReLU and the conversion of each weight. The kernels in this module
compute batch statistics while a convolution writes its output, and add shortcut gradients while
they write input gradients. All weights are converted to bf16 in one operation per step.

Feature maps are stored in bf16 and in the channels-last memory format. A feature map is then a
matrix with N * H * W rows (positions) and C columns (channels). All sums are computed in
fp32 and in a fixed order, so a step always produces the same result.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet56.errors import one_line
from resnet56.kernels.agreement import require_agreement
from resnet56.kernels.compiler import UnavailableError
from resnet56.model import BasicBlock, ResNet


class Tile(NamedTuple):
    """The parts into which a kernel divides a feature map.

    Attributes:
        rows: positions that a program processes at once.
        warps: number of warps per program.
        repeats: number of times that a program processes `rows` positions.
    """

    rows: int
    warps: int
    repeats: int = 1


# The fastest tile sizes on an H100 for each kernel, by number of channels in the output.
CONVOLVE = {16: Tile(256, 4), 32: Tile(128, 4), 64: Tile(64, 4)}
CONVOLVE_BACKWARD = {16: Tile(256, 4), 32: Tile(64, 4), 64: Tile(64, 4)}
WEIGHT_GRADIENT = {16: Tile(128, 2, 8), 32: Tile(64, 2, 8), 64: Tile(64, 4, 4)}
NORMALIZE = {16: Tile(256, 8), 32: Tile(128, 8), 64: Tile(64, 8)}
SUM_GRADIENTS = {16: Tile(256, 8, 4), 32: Tile(256, 4), 64: Tile(128, 4)}


@triton.jit
def _convolve(
    x_ptr, weight_ptr, out_ptr, addend_ptr, sums_ptr, positions, h_in, w_in, h_out, w_out,
    channels_in: tl.constexpr, block: tl.constexpr, channels_out: tl.constexpr,
    weight_stride_in: tl.constexpr, weight_stride_out: tl.constexpr,
    weight_stride_tap: tl.constexpr, stride: tl.constexpr, transposed: tl.constexpr,
    add: tl.constexpr, sums: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Compute a 3x3 convolution with padding 1, or its gradient with respect to the input."""
    program = tl.program_id(0)
    row = program * rows + tl.arange(0, rows)
    valid = row < positions
    step: tl.constexpr = 1 if transposed else stride
    x_first = (row % w_out) * step - 1
    y_first = ((row // w_out) % h_out) * step - 1
    image = row // (w_out * h_out)
    c_in = tl.arange(0, block)
    known = c_in < channels_in
    c_out = tl.arange(0, channels_out)
    total = tl.zeros((rows, channels_out), tl.float32)
    for tap in tl.static_range(9):
        y = y_first + tap // 3
        x = x_first + tap % 3
        inside = valid & (y >= 0) & (x >= 0)
        if transposed and stride > 1:
            inside = inside & (y % stride == 0) & (x % stride == 0)
            y = y // stride
            x = x // stride
        inside = inside & (y < h_in) & (x < w_in)
        place = ((image * h_in + y) * w_in + x) * channels_in
        pixels = tl.load(
            x_ptr + place[:, None] + c_in[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr
            + (8 - tap if transposed else tap) * weight_stride_tap
            + c_in[:, None] * weight_stride_in
            + c_out[None, :] * weight_stride_out,
            mask=known[:, None],
            other=0.0,
        )
        total = tl.dot(pixels.to(tl.bfloat16), weight, total)
    place = row[:, None] * channels_out + c_out[None, :]
    if add:
        total += tl.load(addend_ptr + place, mask=valid[:, None], other=0.0).to(tl.float32)
    out = total.to(tl.bfloat16)
    tl.store(out_ptr + place, out, mask=valid[:, None])
    if sums:
        # Rows after the last position are 0.
        values = out.to(tl.float32)
        partial = sums_ptr + program * 2 * channels_out + c_out
        tl.store(partial, tl.sum(values, 0))
        tl.store(partial + channels_out, tl.sum(values * values, 0))


@triton.jit
def _add_sums(
    sums_ptr, programs, first, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr
):  # fmt: skip
    """Add the partial sums of all programs. Return two sums for each of the `block` channels."""
    channel = first + tl.arange(0, block)
    a = tl.zeros((rows, block), tl.float32)
    b = tl.zeros((rows, block), tl.float32)
    for start in range(0, programs, rows):
        row = start + tl.arange(0, rows)
        place = sums_ptr + row[:, None] * 2 * channels + channel[None, :]
        mask = (row < programs)[:, None]
        a += tl.load(place, mask=mask, other=0.0)
        b += tl.load(place + channels, mask=mask, other=0.0)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _finish_statistics(
    sums_ptr, statistics_ptr, mean_ptr, var_ptr, programs, positions, momentum, eps,
    channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Compute the mean and 1 / standard deviation, and update the running statistics."""
    first = tl.program_id(0) * block
    channel = first + tl.arange(0, block)
    total, squares = _add_sums(sums_ptr, programs, first, channels, block, rows)
    mean = total / positions
    var = tl.maximum(squares / positions - mean * mean, 0.0)
    tl.store(statistics_ptr + channel, mean)
    tl.store(statistics_ptr + channels + channel, 1 / tl.sqrt(var + eps))
    old_mean = tl.load(mean_ptr + channel)
    old_var = tl.load(var_ptr + channel)
    unbiased = var * (positions / (positions - 1.0))
    tl.store(mean_ptr + channel, old_mean + momentum * (mean - old_mean))
    tl.store(var_ptr + channel, old_var + momentum * (unbiased - old_var))


@triton.jit
def _normalize(
    y_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, positions,
    channels: tl.constexpr, add: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Compute relu(norm(y) + residual)."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    c = tl.arange(0, channels)
    place = row[:, None] * channels + c[None, :]
    mask = (row < positions)[:, None]
    mean = tl.load(statistics_ptr + c)
    scale = tl.load(statistics_ptr + channels + c) * tl.load(weight_ptr + c)
    bias = tl.load(bias_ptr + c)
    y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    out = (y - mean[None, :]) * scale[None, :] + bias[None, :]
    if add:
        out += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, tl.maximum(out, 0.0).to(tl.bfloat16), mask=mask)


@triton.jit
def _sum_gradients(
    grad_ptr, out_ptr, y_ptr, statistics_ptr, sums_ptr, positions,
    channels: tl.constexpr, rows: tl.constexpr, repeats: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the bias and the weight of batch norm over the rows of one program."""
    program = tl.program_id(0)
    c = tl.arange(0, channels)
    mean = tl.load(statistics_ptr + c)
    rstd = tl.load(statistics_ptr + channels + c)
    bias_sum = tl.zeros((rows, channels), tl.float32)
    weight_sum = tl.zeros((rows, channels), tl.float32)
    for i in range(repeats):
        row = (program * repeats + i) * rows + tl.arange(0, rows)
        place = row[:, None] * channels + c[None, :]
        mask = (row < positions)[:, None]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(out_ptr + place, mask=mask, other=0.0)
        y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(out > 0, grad, 0.0)
        bias_sum += grad
        weight_sum += grad * (y - mean[None, :]) * rstd[None, :]
    partial = sums_ptr + program * 2 * channels + c
    tl.store(partial, tl.sum(bias_sum, 0))
    tl.store(partial + channels, tl.sum(weight_sum, 0))


@triton.jit
def _finish_gradients(
    sums_ptr, bias_grad_ptr, weight_grad_ptr, programs,
    channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Add the partial sums that `_sum_gradients` computes."""
    first = tl.program_id(0) * block
    channel = first + tl.arange(0, block)
    bias_grad, weight_grad = _add_sums(sums_ptr, programs, first, channels, block, rows)
    tl.store(bias_grad_ptr + channel, bias_grad)
    tl.store(weight_grad_ptr + channel, weight_grad)


@triton.jit
def _normalize_backward(
    grad_ptr, out_ptr, y_ptr, statistics_ptr, weight_ptr, bias_grad_ptr, weight_grad_ptr,
    y_grad_ptr, residual_grad_ptr, positions,
    channels: tl.constexpr, residual: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of relu(norm(y) + residual) with respect to y and the residual."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    c = tl.arange(0, channels)
    place = row[:, None] * channels + c[None, :]
    mask = (row < positions)[:, None]
    mean = tl.load(statistics_ptr + c)
    rstd = tl.load(statistics_ptr + channels + c)
    scale = rstd * tl.load(weight_ptr + c)
    mean_grad = tl.load(bias_grad_ptr + c) / positions
    slope = tl.load(weight_grad_ptr + c) / positions
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0)
    out = tl.load(out_ptr + place, mask=mask, other=0.0)
    grad = tl.where(out > 0, grad, 0.0).to(tl.float32)
    y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    normalized = (y - mean[None, :]) * rstd[None, :]
    y_grad = scale[None, :] * (grad - mean_grad[None, :] - normalized * slope[None, :])
    tl.store(y_grad_ptr + place, y_grad.to(tl.bfloat16), mask=mask)
    if residual:
        tl.store(residual_grad_ptr + place, grad.to(tl.bfloat16), mask=mask)


@triton.jit
def _weight_gradient(
    x_ptr, grad_ptr, partial_ptr, positions, h_in, w_in, h_out, w_out,
    channels_in: tl.constexpr, block_in: tl.constexpr, channels_out: tl.constexpr,
    stride: tl.constexpr, rows: tl.constexpr, repeats: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of one row of the 3x3 weights over the positions of one program."""
    program = tl.program_id(0)
    tap_row = tl.program_id(1)
    c_in = tl.arange(0, block_in)
    c_out = tl.arange(0, channels_out)
    left = tl.zeros((block_in, channels_out), tl.float32)
    middle = tl.zeros((block_in, channels_out), tl.float32)
    right = tl.zeros((block_in, channels_out), tl.float32)
    for i in range(repeats):
        row = (program * repeats + i) * rows + tl.arange(0, rows)
        valid = row < positions
        x_out = row % w_out
        y_out = (row // w_out) % h_out
        image = row // (w_out * h_out)
        grad = tl.load(
            grad_ptr + row[:, None] * channels_out + c_out[None, :], mask=valid[:, None], other=0.0
        )
        y = y_out * stride + tap_row - 1
        inside = valid & (y >= 0) & (y < h_in)
        x = x_out * stride - 1
        place = x_ptr + ((image * h_in + y) * w_in + x)[None, :] * channels_in + c_in[:, None]
        known = (c_in < channels_in)[:, None]
        pixels = tl.load(place, mask=(inside & (x >= 0))[None, :] & known, other=0.0)
        left = tl.dot(pixels.to(tl.bfloat16), grad, left)
        pixels = tl.load(place + channels_in, mask=inside[None, :] & known, other=0.0)
        middle = tl.dot(pixels.to(tl.bfloat16), grad, middle)
        pixels = tl.load(
            place + 2 * channels_in, mask=(inside & (x + 2 < w_in))[None, :] & known, other=0.0
        )
        right = tl.dot(pixels.to(tl.bfloat16), grad, right)
    size: tl.constexpr = 9 * channels_in
    place = (
        partial_ptr
        + program * size * channels_out
        + c_out[None, :] * size
        + tap_row * 3 * channels_in
        + c_in[:, None]
    )
    mask = (c_in < channels_in)[:, None]
    tl.store(place, left, mask=mask)
    tl.store(place + channels_in, middle, mask=mask)
    tl.store(place + 2 * channels_in, right, mask=mask)


@triton.jit
def _add_partials(
    partial_ptr, out_ptr, programs, size, rows: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Add the partial weight gradients of all programs."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros((rows, block), tl.float32)
    for start in range(0, programs, rows):
        row = start + tl.arange(0, rows)
        mask = (row < programs)[:, None] & (column < size)[None, :]
        total += tl.load(partial_ptr + row[:, None] * size + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < size)


class Saved(NamedTuple):
    """Tensors of relu(norm(convolution(x)) + residual) that the backward pass needs."""

    x: Tensor  # input of the convolution
    weight: Tensor
    norm_weight: Tensor
    y: Tensor  # output of the convolution
    statistics: Tensor  # (2, C): mean and 1 / standard deviation
    out: Tensor


def _block(channels_in: int) -> int:
    """Return the size of a block of input channels: at least 16, as Triton requires."""
    return max(16, channels_in)


def _positions(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def convolve(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Compute a 3x3 convolution, and the partial sums of its output and of the squared output."""
    channels_out, channels_in = weight.shape[:2]
    n, _, h, w = x.shape
    out = torch.empty(
        (n, channels_out, triton.cdiv(h, stride), triton.cdiv(w, stride)),
        dtype=torch.bfloat16,
        device=x.device,
        memory_format=torch.channels_last,
    )
    positions = _positions(out)
    tile = CONVOLVE[channels_out]
    programs = triton.cdiv(positions, tile.rows)
    sums = torch.empty((programs, 2, channels_out), dtype=torch.float32, device=x.device)
    _convolve[(programs,)](
        x, weight, out, x, sums, positions, *x.shape[2:], *out.shape[2:],
        channels_in, _block(channels_in), channels_out,
        1, 9 * channels_in, channels_in, stride, False, False, True, tile.rows,
        num_warps=tile.warps,
    )  # fmt: skip
    return out, sums


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, addend: Tensor | None
) -> Tensor:
    """Compute the gradient of a convolution with respect to its input `x`, plus `addend`."""
    channels_out, channels_in = weight.shape[:2]
    out = torch.empty_like(x)
    positions = _positions(out)
    tile = CONVOLVE_BACKWARD[channels_in]
    _convolve[(triton.cdiv(positions, tile.rows),)](
        grad, weight, out, grad if addend is None else addend, grad, positions,
        *grad.shape[2:], *x.shape[2:], channels_out, channels_out, channels_in,
        9 * channels_in, 1, channels_in, stride, True, addend is not None, False, tile.rows,
        num_warps=tile.warps,
    )  # fmt: skip
    return out


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Compute the gradient of a convolution with respect to its weight."""
    channels_out, channels_in = weight.shape[:2]
    positions = _positions(grad)
    tile = WEIGHT_GRADIENT[channels_out]
    programs = triton.cdiv(positions, tile.rows * tile.repeats)
    size = weight.numel()
    partial = torch.empty((programs, size), dtype=torch.float32, device=x.device)
    _weight_gradient[(programs, 3)](
        x, grad, partial, positions, *x.shape[2:], *grad.shape[2:],
        channels_in, _block(channels_in), channels_out, stride, tile.rows, tile.repeats,
        num_warps=tile.warps,
    )  # fmt: skip
    out = torch.empty_like(weight, dtype=torch.float32)
    _add_partials[(triton.cdiv(size, 128),)](partial, out, programs, size, 32, 128)
    return out


def convolve_normalize(
    x: Tensor, weight: Tensor, stride: int, norm: nn.BatchNorm2d, residual: Tensor | None
) -> Saved:
    """Compute relu(norm(convolution(x)) + residual), and update the running statistics."""
    y, sums = convolve(x, weight, stride)
    channels, positions = y.shape[1], _positions(y)
    statistics = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    _finish_statistics[(channels // 16,)](
        sums, statistics, norm.running_mean, norm.running_var, len(sums), positions,
        norm.momentum, norm.eps, channels, 16, 128,
    )  # fmt: skip
    out = torch.empty_like(y)
    tile = NORMALIZE[channels]
    _normalize[(triton.cdiv(positions, tile.rows),)](
        y, statistics, norm.weight, norm.bias, y if residual is None else residual, out,
        positions, channels, residual is not None, tile.rows,
        num_warps=tile.warps,
    )  # fmt: skip
    return Saved(x, weight, norm.weight, y, statistics, out)


def normalize_backward(
    grad: Tensor, saved: Saved, *, residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return gradients with respect to y, the residual, and batch norm's weight and bias."""
    _, _, weight, y, statistics, out = saved
    channels, positions = y.shape[1], _positions(y)
    tile = SUM_GRADIENTS[channels]
    programs = triton.cdiv(positions, tile.rows * tile.repeats)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=y.device)
    _sum_gradients[(programs,)](
        grad, out, y, statistics, sums, positions, channels, tile.rows, tile.repeats,
        num_warps=tile.warps,
    )  # fmt: skip
    weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(weight)
    _finish_gradients[(channels // 16,)](sums, bias_grad, weight_grad, programs, channels, 16, 128)
    y_grad = torch.empty_like(y)
    residual_grad = torch.empty_like(y) if residual else None
    tile = NORMALIZE[channels]
    _normalize_backward[(triton.cdiv(positions, tile.rows),)](
        grad, out, y, statistics, weight, bias_grad, weight_grad,
        y_grad, y_grad if residual_grad is None else residual_grad,
        positions, channels, residual, tile.rows,
        num_warps=tile.warps,
    )  # fmt: skip
    return y_grad, residual_grad, weight_grad, bias_grad


class _Stem(torch.autograd.Function):
    """The first layer. The backward pass computes no gradient for the images."""

    @staticmethod
    def forward(
        ctx: Any, norm: nn.BatchNorm2d, weight: Tensor, images: Tensor, *parameters: Tensor
    ) -> Tensor:
        saved = convolve_normalize(images, weight, 1, norm, None)
        ctx.save_for_backward(*saved)
        return saved.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = Saved(*ctx.saved_tensors)
        grad = grad.contiguous(memory_format=torch.channels_last)
        y_grad, _, scale, bias = normalize_backward(grad, saved, residual=False)
        weight = weight_gradient(y_grad, saved.x, saved.weight, 1)
        return None, None, None, weight, scale, bias


class _Block(torch.autograd.Function):
    """A basic block.

    `weights` are the bf16 weights of both convolutions. `residual` is the output of the shortcut,
    or None if the block has an identity shortcut or no shortcut.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: BasicBlock,
        weights: Sequence[Tensor],
        x: Tensor,
        residual: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        identity = isinstance(block.shortcut, nn.Identity)
        ctx.stride = block.conv1.stride[0]
        first = convolve_normalize(x, weights[0], ctx.stride, block.bn1, None)
        added = x if identity else residual
        second = convolve_normalize(first.out, weights[1], 1, block.bn2, added)
        ctx.identity, ctx.has_residual = identity, added is not None
        ctx.save_for_backward(*first, *second)
        return second.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        first, second = Saved(*tensors[:6]), Saved(*tensors[6:])
        grad = grad.contiguous(memory_format=torch.channels_last)
        y2, residual, scale2, bias2 = normalize_backward(grad, second, residual=ctx.has_residual)
        weight2 = weight_gradient(y2, second.x, second.weight, 1)
        hidden = convolve_backward(y2, second.x, second.weight, 1, None)
        y1, _, scale1, bias1 = normalize_backward(hidden, first, residual=False)
        weight1 = weight_gradient(y1, first.x, first.weight, ctx.stride)
        addend = residual if ctx.identity else None
        x = convolve_backward(y1, first.x, first.weight, ctx.stride, addend)
        if ctx.identity:
            residual = None
        return None, None, x, residual, weight1, scale1, bias1, weight2, scale2, bias2


def triton_network(model: ResNet) -> "TritonNetwork":
    """Wrap `model` in a module that runs the training steps of `model` with Triton kernels.

    Raises:
        UnavailableError: the device or the model is not supported, the kernels cannot be compiled,
            or their results differ from PyTorch's.
    """
    device = model.conv1.weight.device
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UnavailableError("the GPU does not support bf16")
    blocks = [block for stage in (model.stage1, model.stage2, model.stage3) for block in stage]
    if not all(isinstance(block, BasicBlock) for block in blocks):
        raise UnavailableError("on a GPU, it supports only basic blocks")
    try:
        with torch.cuda.device(device):
            _check(device)
    except UnavailableError:
        raise
    except Exception as error:  # errors of Triton's compiler have no common base class
        raise UnavailableError(
            f"Triton cannot compile the kernels: {one_line(error)}",
            "install a C compiler such as gcc",
        ) from None
    return TritonNetwork(model)


class TritonNetwork(nn.Module):
    """Runs the training steps of `model` with Triton kernels, in bf16.

    This module calls `model` in evaluation mode.
    """

    def __init__(self, model: ResNet) -> None:
        super().__init__()
        self.model = model
        # PyTorch runs the shortcuts and updates the batch counters of their batch norms.
        modules = [module for name, module in model.named_modules() if "shortcut" not in name]
        self._weights: list[Tensor] = [m.weight for m in modules if isinstance(m, nn.Conv2d)]
        self._bf16_weights = [
            torch.empty_like(weight, dtype=torch.bfloat16, memory_format=torch.channels_last)
            for weight in self._weights
        ]
        self._counts = [
            m.num_batches_tracked
            for m in modules
            if isinstance(m, nn.BatchNorm2d) and m.num_batches_tracked is not None
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits from normalized images: (N, 3, H, W) -> (N, classes)."""
        model = self.model
        if not (model.training and torch.is_grad_enabled()):
            return model(images)  # type: ignore[no-any-return]
        torch._foreach_add_(self._counts, 1)
        with torch.no_grad():
            torch._foreach_copy_(self._bf16_weights, self._weights)
        weights = iter(self._bf16_weights)
        x: Tensor = _Stem.apply(
            model.bn1, next(weights), images.contiguous(memory_format=torch.channels_last),
            model.conv1.weight, model.bn1.weight, model.bn1.bias,
        )  # fmt: skip
        for stage in (model.stage1, model.stage2, model.stage3):
            for block in stage:
                assert isinstance(block, BasicBlock)
                x = _run_block(block, (next(weights), next(weights)), x)
        pooled = x.mean(dim=(2, 3), dtype=torch.float32)
        return model.fc(pooled)  # type: ignore[no-any-return]


def _run_block(block: BasicBlock, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    residual = None
    if block.shortcut is not None and not isinstance(block.shortcut, nn.Identity):
        residual = block.shortcut(x).contiguous(memory_format=torch.channels_last)
    out: Tensor = _Block.apply(
        block, weights, x, residual,
        block.conv1.weight, block.bn1.weight, block.bn1.bias,
        block.conv2.weight, block.bn2.weight, block.bn2.bias,
    )  # fmt: skip
    return out


@functools.cache
def _check(device: torch.device) -> None:
    """Compare the kernels with PyTorch on a small network."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    require_agreement(TritonNetwork, ["resnet8"], images.to(device))
