"""Training steps in C on a CPU (kernels/native.c), with its matrix unit or AVX-512 BF16.

In PyTorch, a step of ResNet-56 consists of hundreds of operations that each read and write entire
feature maps. The kernel fuses each convolution with the operations before and after it. A
convolution requires one call in the forward pass and one call in the backward pass.

Like the smaller kernel in `fused`, the kernel is compiled at run time and compared with PyTorch
before use. If the kernel is not available, training falls back to a slower mode.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet56.kernels.agreement import require_agreement
from resnet56.kernels.compiler import UnavailableError, compile_kernel
from resnet56.kernels.plan import Plan, check_layouts
from resnet56.model import ResNet


def native_network(model: ResNet) -> "NativeNetwork":
    """Wrap `model` in a module that runs the training steps of `model` in C.

    Args:
        model: model in fp32 on the CPU.

    Raises:
        UnavailableError: the kernel cannot be compiled, the processor or the model is not
            supported, or the kernel's results differ from PyTorch's.
    """
    library = compile_kernel("native.c")
    check_layouts(library)
    if not library.resnet56_permitted():
        raise UnavailableError("the operating system denies access to the matrix unit (AMX)")
    network = NativeNetwork(model, library)
    _check(library)
    return network


class NativeNetwork(nn.Module):
    """Runs the training steps of `model` in C.

    This module calls `model` for evaluation and for unsupported inputs. It cannot be copied or
    pickled. Copy or pickle `model` instead.

    Raises:
        UnavailableError: the model is not supported.
    """

    def __init__(self, model: ResNet, library: ctypes.CDLL) -> None:
        super().__init__()
        self.model = model
        self._convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        self._norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self._library = library
        self._plans: dict[tuple[int, ...], Plan] = {}
        Plan(library, model, 1, 8, 8, 1)  # raises UnavailableError if the model is not supported

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits from normalized images: (N, 3, H, W) -> (N, classes)."""
        if not self._supports(x):
            return self.model(x)  # type: ignore[no-any-return]
        key = (x.shape[0], x.shape[2], x.shape[3], torch.get_num_threads())
        if key not in self._plans:
            self._plans[key] = Plan(self._library, self.model, *key)
        plan = self._plans[key]
        counts = [n.num_batches_tracked for n in self._norms]
        torch._foreach_add_([count for count in counts if count is not None], 1)
        pooled: Tensor = _Features.apply(plan, x, *plan.parameters)
        return self.model.fc(pooled)  # type: ignore[no-any-return]

    def _supports(self, x: Tensor) -> bool:
        """Return whether the kernel supports this step. It supports training in bf16 on the CPU."""
        tensors: list[Tensor | None] = [x, *(c.weight for c in self._convolutions)]
        for n in self._norms:
            tensors += n.weight, n.bias, n.running_mean, n.running_var
        return (
            torch.is_grad_enabled()
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and x.ndim == 4
            and x.shape[1] == self.model.conv1.in_channels
            and x.shape[2] % 4 == x.shape[3] % 4 == 0
            # With a total of 16 pixels, the last batch norms would have one value per channel.
            and x.shape[0] * x.shape[2] * x.shape[3] > 16
            and not x.requires_grad
            and all(n.training and n.momentum is not None for n in self._norms)
            and all(t is not None and t.is_cpu and t.dtype == torch.float32 for t in tensors)
        )


class _Features(torch.autograd.Function):
    """Autograd function that computes pooled features from images."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, images: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*parameters)  # autograd then detects later changes to parameters
        pooled = plan.forward(images.contiguous(memory_format=torch.channels_last))
        ctx.generation = plan.generation
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.generation != ctx.plan.generation:
            raise RuntimeError(
                "a later forward pass has overwritten the activations of this batch; call "
                "backward() before the next forward pass"
            )
        _ = ctx.saved_tensors  # raises an error if a parameter has changed since the forward pass
        return None, None, *ctx.plan.backward(grad.float().contiguous())


@functools.cache
def _check(library: ctypes.CDLL) -> None:
    """Compare the kernel with PyTorch on small networks."""
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    archs = ("resnet8", "resnet8-b", "resnet11-bottleneck")
    require_agreement(lambda model: NativeNetwork(model, library), archs, images)
