"""The native training step, compared with a reference in double precision.

The reference rounds to bf16 where the kernel does, in the forward and backward passes. The
remaining differences come from sums in single precision, and from the rounding steps and ReLUs
whose results these sums change. Running the reference in single precision estimates the size of the
differences.
"""

import copy
import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from requires_kernels import UNITS, skip_without_kernel
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.errors import UsageError
from resnet56.execution import prepare_model
from resnet56.kernels import plan
from resnet56.kernels.compiler import UnavailableError
from resnet56.kernels.native import NativeNetwork, native_network
from resnet56.model import BasicBlock, BottleneckBlock, PadShortcut, ResNet, build
from resnet56.recipe import Recipe
from resnet56.step import Trainer

VECTORS = "cc -mno-amx-tile -mno-amx-bf16"  # the same kernel, without the matrix unit


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compile the kernel for this processor, with and without its matrix unit."""
    if request.param == "vectors":
        monkeypatch.setenv("CC", VECTORS)
    return request.param


def native(model: ResNet) -> NativeNetwork:
    try:
        return native_network(model)
    except UnavailableError as reason:
        skip_without_kernel(reason)


def random_network(arch: str, seed: int = 1) -> ResNet:
    """Return a network with random batch norm parameters."""
    model = build(arch, seed=seed).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(count: int, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, height, width, generator=generator)
    return images, torch.randn(count, 10, generator=generator)


def run(config: nn.Module, images: Tensor, weights: Tensor) -> Tensor:
    """Run a step and return the logits. The loss is linear in the logits and adds no rounding."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = config(images)
    (logits.float() * weights).sum().backward()
    return logits.float().detach()


# The reference


class RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().to(grad.dtype)


def rounded(x: Tensor) -> Tensor:
    return RoundForward.apply(x)


def grad_rounded(x: Tensor) -> Tensor:
    return RoundBackward.apply(x)


class RoundedBatchNorm(torch.autograd.Function):
    """Batch norm (Ioffe & Szegedy 2015).

    z is rounded after its statistics are computed, and the gradient is rounded after its sums.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean = z.mean(dim=(0, 2, 3), keepdim=True)
        invstd = 1 / (z.var(dim=(0, 2, 3), keepdim=True, correction=0) + eps).sqrt()
        xhat = (rounded(z) - mean) * invstd
        ctx.save_for_backward(xhat, invstd, weight)
        return xhat * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        xhat, invstd, weight = ctx.saved_tensors
        bias_grad = g.sum(dim=(0, 2, 3), keepdim=True)
        weight_grad = (g * xhat).sum(dim=(0, 2, 3), keepdim=True)
        count = g.numel() / g.shape[1]
        centered = g.bfloat16().to(g.dtype) - (bias_grad + xhat * weight_grad) / count
        z_grad = centered * invstd * weight[:, None, None]
        return z_grad, weight_grad.flatten(), bias_grad.flatten(), None


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """Apply a convolution and its batch norm, without a shortcut or ReLU."""
    z = F.conv2d(y, rounded(conv.weight), stride=conv.stride, padding=conv.padding)
    z = grad_rounded(z)
    with torch.no_grad():
        norm.running_mean.lerp_(z.mean(dim=(0, 2, 3)), norm.momentum)
        norm.running_var.lerp_(z.var(dim=(0, 2, 3)), norm.momentum)
    return RoundedBatchNorm.apply(z, norm.weight, norm.bias, norm.eps)


def block(module: nn.Module, x: Tensor) -> Tensor:
    pairs = [(module.conv1, module.bn1), (module.conv2, module.bn2)]
    if isinstance(module, BottleneckBlock):
        pairs.append((module.conv3, module.bn3))
    else:
        assert isinstance(module, BasicBlock)
    y = x
    for conv, norm in pairs[:-1]:
        y = rounded(F.relu(conv_norm(conv, norm, y)))
    out = conv_norm(*pairs[-1], y)
    shortcut = module.shortcut
    if shortcut is None:
        return rounded(F.relu(out))
    if isinstance(shortcut, nn.Sequential):
        out = out + conv_norm(shortcut[0], shortcut[1], grad_rounded(x))
    else:
        assert isinstance(shortcut, nn.Identity | PadShortcut)
        out = out + grad_rounded(shortcut(x))
    return rounded(F.relu(out))


class Reference(nn.Module):
    def __init__(self, model: ResNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        with torch.autocast("cpu", enabled=False):
            x = conv_norm(model.conv1, model.bn1, rounded(images.to(self.dtype)))
            x = rounded(F.relu(x))
            for stage in (model.stage1, model.stage2, model.stage3):
                for module in stage:
                    x = block(module, x)
            pooled = x.mean(dim=(2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(pooled.float(), model.fc.weight.float(), model.fc.bias.float())


def results(model: ResNet, config: nn.Module, images: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the logits, gradients and running statistics, in the order of `names`."""
    logits = run(config, images, weights)
    statistics = [b for n, b in model.named_buffers() if "running" in n]
    return [t.double() for t in (logits, *(p.grad for p in model.parameters()), *statistics)]


def names(model: ResNet) -> list[str]:
    statistics = [n for n, _ in model.named_buffers() if "running" in n]
    return ["logits", *(n for n, _ in model.named_parameters()), *statistics]


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> Tensor:
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(actual, expected, strict=True)])


@pytest.mark.parametrize(
    ("arch", "images"),
    [
        ("resnet8", (16, 32, 32)),
        ("resnet14", (7, 16, 16)),  # 8x8 and 4x4 maps; the threads have different numbers of images
        ("resnet8", (3, 24, 12)),  # not square, and not a multiple of the tile size
        ("resnet8-b", (9, 32, 32)),
        ("resnet11-bottleneck", (5, 32, 32)),
        ("resnet20-bottleneck", (33, 8, 8)),
        ("resnet8", (1, 32, 32)),  # a thread without any image
        ("resnet8", (2, 4, 4)),  # maps of a single pixel
        ("plain8", (16, 32, 32)),
        ("plain14", (24, 32, 32)),
    ],
)
def test_the_results_match_the_reference_in_double_precision(
    unit: str, arch: str, images: tuple[int, int, int]
) -> None:
    model = random_network(arch)
    double, single = Reference(model, torch.double), Reference(model, torch.float)
    data = batch(*images)
    expected = results(double.model, double, *data)
    noise = relative_errors(results(single.model, single, *data), expected)
    errors = relative_errors(results(model, native(model), *data), expected)
    # One switched ReLU changes the gradients of a small network by 0.5 %.
    tolerance = [5e-4 if "running" in name else 1e-2 for name in names(model)]
    assert (errors < 2 * noise.max() + torch.tensor(tolerance)).all()
    assert noise.max() < 0.3  # a larger tolerance would make the test meaningless


def test_results_are_deterministic_for_a_number_of_threads(unit: str) -> None:
    before = torch.get_num_threads()
    x, weights = batch(12)
    grads = []
    try:
        for threads in (2, 2, 1, 5):
            torch.set_num_threads(threads)
            model = random_network("resnet8-b")
            run(native(model), x, weights)
            grads.append([p.grad for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))
    for other in grads[2:]:
        for a, b in zip(grads[0], other, strict=True):
            assert (a - b).norm() / a.norm() < 2e-2


def test_batch_shapes_can_alternate(unit: str) -> None:
    """Progressive resizing changes the shape of the batches. Each shape has its own buffers."""
    fresh = [random_network("resnet8") for _ in range(3)]
    shapes = [(8, 16, 16), (8, 32, 32), (5, 16, 16)]
    alone = []
    for model, shape in zip(fresh, shapes, strict=True):
        run(native(model), *batch(*shape))
        alone.append([p.grad.clone() for p in model.parameters()])
    model = random_network("resnet8")
    config = native(model)
    for index in (0, 1, 2, 0, 1):
        model.zero_grad()
        run(config, *batch(*shapes[index]))
        assert all(
            torch.equal(p.grad, g) for p, g in zip(model.parameters(), alone[index], strict=True)
        )


def test_nan_propagates(unit: str) -> None:
    model = random_network("resnet8")
    x, weights = batch(4)
    x[2, 1, 3, 3] = float("nan")
    assert run(native(model), x, weights).isnan().all()  # batch norm spreads NaN to all images
    assert all(p.grad.isnan().any() for p in model.parameters() if p.ndim == 4)


def test_the_memory_layout_does_not_change_the_results() -> None:
    x, weights = batch(6)
    logits = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model = random_network("resnet8-b").to(memory_format=layout)
        logits.append(run(native(model), x.contiguous(memory_format=layout), weights))
        logits.append(model.stage2[0].conv1.weight.grad)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])


def test_evaluation_and_unsupported_inputs_use_pytorch() -> None:
    model = random_network("resnet8")
    config = native(model)
    x, _ = batch(3)
    assert torch.equal(config(x), copy.deepcopy(model)(x))  # in fp32, without autocast
    with torch.autocast("cpu", torch.bfloat16):
        config(x)
        config(x)
    assert model.stage1[0].bn1.num_batches_tracked == 3
    for unsupported in (x.double(), x[0], x[:, :1], x[:1, :, :4, :4], x[:, :, :30]):
        pytorch = copy.deepcopy(model)  # gives the expected result or error
        with torch.autocast("cpu", torch.bfloat16):
            try:
                expected = pytorch(unsupported)
            except (RuntimeError, ValueError) as error:
                with pytest.raises(type(error)):
                    config(unsupported)
            else:
                assert torch.equal(config(unsupported), expected)
        model.load_state_dict(pytorch.state_dict())
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        config(leaf).float().sum().backward()
    assert leaf.grad is not None
    model.stage2[0].bn1.eval()  # frozen: its statistics do not change
    before = model.stage2[0].bn1.running_mean.clone()
    with torch.autocast("cpu", torch.bfloat16):
        config(x)
    assert torch.equal(model.stage2[0].bn1.running_mean, before)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(config(x), model(x))


def test_gradients_accumulate_and_frozen_weights_have_none() -> None:
    model = random_network("resnet8-b")
    config = native(model)
    x, weights = batch(4)
    run(config, x, weights)
    once = [p.grad.clone() for p in model.parameters()]
    run(config, x, weights)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    model.zero_grad()
    model.conv1.requires_grad_(False)
    model.stage1.requires_grad_(False)
    run(config, x, weights)
    for (name, parameter), g in zip(model.named_parameters(), once, strict=True):
        if name.startswith(("conv1", "stage1")):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, g)


def test_replaced_weights_are_used() -> None:
    x, weights = batch(4)
    fresh = random_network("resnet8", seed=2)
    state = copy.deepcopy(fresh.state_dict())
    expected = run(native(fresh), x, weights)
    model = random_network("resnet8")
    config = native(model)
    run(config, x, weights)
    model.load_state_dict(state, assign=True)
    assert torch.equal(run(config, x, weights), expected)
    assert model.bn1.num_batches_tracked == 1


def test_a_weight_that_changes_before_backward_raises_an_error() -> None:
    model = random_network("resnet8")
    x, _ = batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = native(model)(x)
    with torch.no_grad():
        model.stage1[0].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_unsupported_layers_are_rejected() -> None:
    native(build("resnet8"))  # skips the test if the kernel is unavailable
    with pytest.raises(UnavailableError, match="unsupported shortcut"):
        # This shortcut pads channels with stride 1.
        native_network(ResNet(11, "bottleneck", "A"))
    for change in ({"bias": True}, {"padding": 0}, {"groups": 16}):
        model = build("resnet8")
        model.stage1[0].conv1 = nn.Conv2d(16, 16, 3, **({"padding": 1, "bias": False} | change))
        with pytest.raises(UnavailableError, match="unsupported layer"):
            native_network(model)


def test_the_default_dtype_does_not_matter() -> None:
    x, weights = batch(3)
    expected = run(native(random_network("resnet8")), x, weights)
    model = random_network("resnet8")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run(native(model), x, weights), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_backward_through_overwritten_activations_raises_an_error() -> None:
    config = native(random_network("resnet8"))
    x, _ = batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        first = config(x)
        config(x)
    with pytest.raises(RuntimeError, match="a later forward pass has overwritten"):
        first.sum().backward()


@pytest.mark.parametrize("arch", ["resnet8", "resnet11-bottleneck", "plain8"])
def test_losses_of_native_training_match_eager_training(unit: str, arch: str) -> None:
    """Rounding errors grow from step to step, so the tolerance of the first steps is tighter."""
    native(build("resnet8"))  # skips the test if the kernel is unavailable
    losses = {}
    for mode in ("eager", "native"):
        model = build(arch).to(memory_format=torch.channels_last)
        forward = prepare_model(model.train(), mode, "bf16")
        assert forward.execution == mode
        trainer = Trainer(model, forward.module, Recipe(arch=arch), "bf16")
        images, _ = batch(64, 16, 16)
        labels = torch.arange(64) % 10
        history = []
        for step in range(60):
            trainer.reset_sums()
            part = slice(step % 4 * 16, step % 4 * 16 + 16)
            trainer.step(images[part], labels[part], 0.02, step)
            history.append(trainer.sums[0].item() / 16)
        losses[mode] = torch.tensor(history)
    gap = (losses["eager"] - losses["native"]).abs() / losses["eager"]
    assert gap[:8].max() < 1e-2
    assert losses["native"][-8:].mean() < 0.6 * losses["native"][:8].mean()
    assert abs(losses["native"][-8:].mean() - losses["eager"][-8:].mean()) < 0.1


@pytest.mark.usefixtures("unit")
def test_auto_selects_native_execution_with_and_without_a_matrix_unit() -> None:
    model = build("resnet8").to(memory_format=torch.channels_last)
    native(model)  # skips the test if the kernel is unavailable
    prepared = prepare_model(model, "auto", "bf16")
    assert (prepared.execution, prepared.reason) == ("native", "")


def test_another_precision_causes_a_one_line_error() -> None:
    with pytest.raises(
        UsageError, match=r"native execution is not available: .*fp32; use execution=\"auto\""
    ):
        prepare_model(build("resnet8"), "native", "fp32")


def test_a_processor_without_bf16_vectors_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    native(build("resnet8"))  # skips the test if the kernel is unavailable
    monkeypatch.setenv("CC", "cc -mno-amx-tile -mno-amx-bf16 -mno-avx512bf16")
    with pytest.raises(UnavailableError, match="does not support AVX-512 BF16"):
        native_network(build("resnet8"))


def test_a_kernel_with_wrong_results_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    native(build("resnet8"))  # skips the test if the kernel is unavailable
    monkeypatch.setenv("CC", "cc -Dsqrt=fabs")
    with pytest.raises(UnavailableError, match="results differ from PyTorch's"):
        native_network(build("resnet8"))


def _without(structure: type[ctypes.Structure], field: str) -> type[ctypes.Structure]:
    fields = [entry for entry in structure._fields_ if entry[0] != field]
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


def _swapped(structure: type[ctypes.Structure], first: str, second: str) -> type[ctypes.Structure]:
    names = {first: second, second: first}
    fields = [(names.get(entry[0], entry[0]), entry[1]) for entry in structure._fields_]
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(
    ("mirror", "change", "message"),
    [
        ("_Conv", lambda s: _without(s, "skip_channels"), "conv .*: sizeof, skip_channels$"),
        ("_Conv", lambda s: _without(s, "images"), "conv .*images.*sizeof"),
        # The size of the struct is the same.
        ("_Conv", lambda s: _swapped(s, "g", "g_in"), "conv .*: g, g_in$"),
        ("_Norm", lambda s: _without(s, "eps"), "norm .*eps"),
        ("_Norm", lambda s: _swapped(s, "g_scale", "z_scale"), "norm .*: g_scale, z_scale$"),
    ],
)
def test_a_mirror_that_differs_from_its_struct_is_rejected_in_one_line(
    mirror: str, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native(build("resnet8"))  # skips the test if the kernel is unavailable
    monkeypatch.setattr(plan, mirror, change(getattr(plan, mirror)))
    with pytest.raises(UnavailableError, match=message) as caught:
        native_network(build("resnet8"))
    assert "\n" not in str(caught.value)


def test_a_field_that_exists_only_in_c_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native(build("resnet8"))  # skips the test if the kernel is unavailable
    for file in (Path(plan.__file__).parent).glob("*.[ch]"):
        text = file.read_text(encoding="utf-8")
        (tmp_path / file.name).write_text(text.replace("} Conv;", "long extra;\n} Conv;"))
    monkeypatch.setattr("resnet56.kernels.compiler.files", lambda package: tmp_path)
    # With another command, the kernel is compiled again.
    monkeypatch.setenv("CC", f"cc -I{tmp_path}")
    with pytest.raises(UnavailableError, match="struct conv differs between C and plan.py: sizeof"):
        native_network(build("resnet8"))
