"""Single convolutions of the native kernel, compared bit by bit with a naive reference.

The operands are integers, so every sum is exact in float32 and in any order.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from reference import ReferenceConvolution
from requires_kernels import UNITS, skip_without_kernel
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.kernels.compiler import UnavailableError, compile_kernel
from resnet56.kernels.plan import PLAIN, Plan
from resnet56.model import build

THREADS = 2
KERNELS = [(1, 1), (1, 2), (3, 1), (3, 2)]
SHAPES = [(5, 8, 8), (2, 6, 10), (3, 4, 16), (19, 4, 2)]  # (N, H, W)
CHANNELS = [(16, 16), (16, 32), (32, 64), (64, 16), (96, 128), (256, 64)]


@pytest.fixture(scope="module", params=UNITS)
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """Compile the kernel for this processor, with and without its matrix unit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "vectors":
            patch.setenv("CC", "cc -mno-amx-tile -mno-amx-bf16")
        try:
            compiled = compile_kernel("native.c")
        except UnavailableError as reason:
            skip_without_kernel(reason)
    if not compiled.resnet56_permitted():  # this call also requests access to the matrix unit
        pytest.skip("the operating system denies access to the matrix unit")
    return compiled


def integers(limit: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def operands(
    channels: tuple[int, int], kernel: int, stride: int, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input, the weights and the gradient of the output."""
    images, height, width = shape
    x = integers(4, *shape, channels[0])
    # These weights need more than the eight bits of bf16.
    weight = integers(300, channels[1], kernel, kernel, channels[0])
    return x, weight, integers(4, images, height // stride, width // stride, channels[1])


def run_kernel(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, z_grad: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the gradients of the weights and the input."""
    images, height, width, inputs = x.shape
    outputs, kernel = weight.shape[:2]
    input_stride = stride if kernel == 1 else 1
    size = height // input_stride, width // input_stride
    module = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    plan = Plan(library, build("resnet8"), images, 8, 8, THREADS)
    layer = plan._layer(module, nn.BatchNorm2d(outputs), *size, input_stride)
    conv, norm = layer.conv, layer.norm
    x, z_grad = x.bfloat16(), z_grad.bfloat16()
    weight_grad = torch.empty_like(weight)
    x_grad = torch.empty(images, *size, inputs, dtype=torch.bfloat16)
    conv.input, conv.x, conv.g, conv.g_in = PLAIN, *(t.data_ptr() for t in (x, z_grad, x_grad))
    conv.weight, conv.weight_grad = weight.data_ptr(), weight_grad.data_ptr()
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(norm, name, getattr(layer.norm_module, name).data_ptr())
    scratch = library.resnet56_scratch_bytes(ctypes.byref(conv))
    # Other layers leave arbitrary values in the scratch memory; these bytes are NaN in bf16.
    arena = torch.full((THREADS * scratch,), 255, dtype=torch.uint8)
    arguments = (
        ctypes.byref(conv), ctypes.c_void_p(arena.data_ptr()),
        ctypes.c_long(scratch), ctypes.c_long(THREADS),
    )  # fmt: skip
    library.resnet56_forward(*arguments)
    # The coefficients of g, z and 1.
    coefficients = torch.tensor([1.0, 0.0, 0.0])[:, None].repeat(1, outputs)
    norm.g_scale, norm.z_scale, norm.constant = (row.data_ptr() for row in coefficients)
    library.resnet56_backward(*arguments)
    return layer.z.double(), weight_grad.double(), x_grad.double()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_the_kernel_equals_the_reference(
    library: ctypes.CDLL, channels: tuple[int, int], kernel: int, stride: int
) -> None:
    for shape in SHAPES:
        x, weight, z_grad = operands(channels, kernel, stride, shape)
        z, weight_grad, x_grad = run_kernel(library, x, weight, z_grad, stride)
        reference = ReferenceConvolution(shape, kernel, stride)
        assert torch.equal(z, reference.forward(x, weight))
        assert torch.equal(weight_grad, reference.weight_gradient(x, z_grad))
        expected = reference.input_gradient(weight, z_grad)
        if kernel == 1:  # the kernel returns the gradient only at the pixels that it reads
            expected = expected[:, ::stride, ::stride]
        assert torch.equal(x_grad, expected)


@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_the_reference_equals_pytorch(kernel: int, stride: int) -> None:
    for shape in SHAPES:
        x, weight, z_grad = operands((16, 32), kernel, stride, shape)
        images = x.double().permute(0, 3, 1, 2).requires_grad_()
        filters = weight.bfloat16().double().permute(0, 3, 1, 2).requires_grad_()
        z = F.conv2d(images, filters, stride=stride, padding=kernel // 2)
        z.backward(z_grad.double().permute(0, 3, 1, 2))
        reference = ReferenceConvolution(shape, kernel, stride)
        pairs = [
            (reference.forward(x, weight), z.bfloat16().double()),
            (reference.weight_gradient(x, z_grad), filters.grad),
            (reference.input_gradient(weight, z_grad), images.grad.bfloat16().double()),
        ]
        for actual, expected in pairs:
            assert torch.equal(actual, expected.permute(0, 2, 3, 1))
