"""A naive convolution over rows of positions, the layout that kernels/positions.h describes.

Feature maps are (N, H, W, C), and weights are (out, kernel, kernel, in). Sums are in double
precision. Values are rounded to bf16 where the native kernel rounds them: the weights, the output
and the gradient of the input. The gradient of the weights is not rounded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class ReferenceConvolution:
    """A convolution with a square kernel and a padding of `kernel // 2`.

    Args:
        shape: (N, H, W) of the input.
        kernel: the height and width of the kernel.
        stride: in both directions.
    """

    def __init__(self, shape: tuple[int, int, int], kernel: int, stride: int) -> None:
        images, height, width = shape
        self.kernel = kernel
        self.pad = kernel // 2
        self.pitch = width + self.pad  # positions per row of pixels
        span = (height + self.pad) * self.pitch  # positions per image
        lead = self.pad * (self.pitch + 1)  # zeros at the start
        self.count = lead + images * span + lead
        image, y, x = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        self.inputs = lead + image * span + y * self.pitch + x  # the position of each pixel
        self.outputs = self.inputs[:, ::stride, ::stride]

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the output map."""
        row, weight = self._row(x, self.inputs), bf16(weight)
        z = torch.zeros(*self.outputs.shape, weight.shape[0]).double()
        for r, c, shift in self._taps():
            z += row[self.outputs + shift] @ weight[:, r, c].T
        return bf16(z)

    def weight_gradient(self, x: Tensor, z_grad: Tensor) -> Tensor:
        """Return the gradient of the weights, given that of the output."""
        row, z_grad = self._row(x, self.inputs), z_grad.double().flatten(0, 2)
        grad = torch.empty(z_grad.shape[1], self.kernel, self.kernel, x.shape[3]).double()
        for r, c, shift in self._taps():
            grad[:, r, c] = z_grad.T @ row[self.outputs + shift].flatten(0, 2)
        return grad

    def input_gradient(self, weight: Tensor, z_grad: Tensor) -> Tensor:
        """Return the gradient of the input, given that of the output."""
        row, weight = self._row(z_grad, self.outputs), bf16(weight)
        grad = torch.zeros(*self.inputs.shape, weight.shape[3]).double()
        for r, c, shift in self._taps():
            grad += row[self.inputs - shift] @ weight[:, r, c]
        return bf16(grad)

    def _row(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Copy pixels to their positions in a row of zeros: (count, C)."""
        row = torch.zeros(self.count, pixels.shape[3]).double()
        row[positions] = pixels.double()
        return row

    def _taps(self) -> Iterator[tuple[int, int, int]]:
        """Yield the row and column of each tap, and its shift in positions."""
        for r in range(self.kernel):
            for c in range(self.kernel):
                yield r, c, (r - self.pad) * self.pitch + (c - self.pad)


def bf16(values: Tensor) -> Tensor:
    """Round to bf16 and return doubles."""
    return values.bfloat16().double()
