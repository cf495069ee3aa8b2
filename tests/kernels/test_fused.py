"""The fused kernel against PyTorch's operations in double precision."""

import itertools
import sys

import pytest
import torch
from requires_kernels import skip_without_kernel
from torch import Tensor, nn

from resnet56.errors import UsageError
from resnet56.kernels.compiler import UnavailableError
from resnet56.kernels.fused import fused_norm_relu
from resnet56.model import NormReLU, build, norm_relu
from resnet56.recipe import Recipe
from resnet56.runtime import Resolved
from resnet56.step import Trainer, make_forward

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel is made for Linux")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}  # relative; bf16 has eight bits


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def fused(dtype: torch.dtype) -> NormReLU:
    try:
        return fused_norm_relu(dtype)
    except UnavailableError as reason:
        skip_without_kernel(reason)


def tensors(dtype: torch.dtype, channels: int, mean: float = 0.0) -> list[Tensor]:
    """x, residual and the output's gradient; 231 positions, so that the last block is short."""
    generator = torch.Generator().manual_seed(channels)
    made = [torch.randn(11, channels, 3, 7, generator=generator) for _ in range(3)]
    made[0] = made[0] * torch.linspace(0.5, 2, channels)[:, None, None] + mean
    return [t.to(dtype, memory_format=torch.channels_last) for t in made]


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


def everything(
    function: NormReLU, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, grad: Tensor
) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    out = function(norm, x, residual)
    out.backward(grad)
    found = {
        "out": out, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
        "mean": norm.running_mean, "var": norm.running_var,
    }  # fmt: skip
    return found if residual is None else found | {"residual": residual.grad}


def assert_close(mine: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    for name, value in exact.items():
        distance = (mine[name].double() - value).norm() / value.norm()
        assert distance < tolerance, name


@pytest.mark.parametrize(
    ("channels", "with_residual", "mean"),
    [(16, False, 0.0), (16, True, 0.0), (64, True, 0.0), (256, False, 0.0), (32, True, 30.0)],
)
def test_it_computes_what_pytorch_computes_in_double(
    fused: NormReLU, dtype: torch.dtype, channels: int, with_residual: bool, mean: float
) -> None:
    x, residual, grad = tensors(dtype, channels, mean)
    second = residual if with_residual else None
    mine = everything(fused, norm_of(channels), x, second, grad)
    wide = None if second is None else second.double()
    exact = everything(norm_relu, norm_of(channels).double(), x.double(), wide, grad.double())
    assert_close(mine, exact, TOLERANCE[dtype])


def test_any_memory_layout_gives_the_same(fused: NormReLU, dtype: torch.dtype) -> None:
    x, residual, grad = tensors(dtype, 16)
    one = everything(fused, norm_of(16), x, residual, grad)
    other = everything(fused, norm_of(16), *(t.contiguous() for t in (x, residual, grad)))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_threads_give_the_same_bits_and_others_the_same_numbers(
    fused: NormReLU, dtype: torch.dtype
) -> None:
    x, residual, grad = tensors(dtype, 64)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (2, 2, 3, 8):  # four blocks of rows: some threads get none
            torch.set_num_threads(threads)
            runs.append(everything(fused, norm_of(64), x, residual, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    for other in runs[2:]:
        assert_close(other, {n: t.double() for n, t in runs[0].items()}, TOLERANCE[dtype])


def test_a_nan_is_not_hidden(fused: NormReLU, dtype: torch.dtype) -> None:
    x, residual, grad = tensors(dtype, 16)
    x[0, 3, 0, 0] = float("nan")
    found = everything(fused, norm_of(16), x, residual, grad)
    assert found["out"][:, 3].isnan().all()
    assert not found["out"][:, 2].isnan().any()
    assert found["x"][:, 3].isnan().all()


def test_it_counts_batches_and_leaves_evaluation_alone(fused: NormReLU, dtype: torch.dtype) -> None:
    x, residual, _ = tensors(dtype, 16)
    norm = norm_of(16)
    fused(norm, x, residual)
    assert norm.num_batches_tracked == 1
    norm.eval()
    before = norm.running_mean.clone()
    assert torch.equal(fused(norm, x, residual), norm_relu(norm, x, residual))
    assert torch.equal(norm.running_mean, before)


def test_what_it_cannot_do_is_left_to_pytorch(fused: NormReLU, dtype: torch.dtype) -> None:
    x = torch.randn(4, 10, 5, 5, dtype=dtype)  # ten channels are no whole vector
    assert torch.equal(fused(norm_of(10), x), norm_relu(norm_of(10), x))
    x = torch.randn(4, 16, 5, 5, dtype=torch.float64)
    norm = norm_of(16).double()
    assert torch.equal(fused(norm, x), norm_relu(norm_of(16).double(), x))
    x = tensors(dtype, 16)[0]
    bare = nn.BatchNorm2d(16, affine=False)
    assert torch.equal(fused(bare, x), norm_relu(nn.BatchNorm2d(16, affine=False), x))


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("resnet8", "fp32"), ("resnet8-b", "fp32"), ("resnet11-bottleneck", "fp32"),
        ("plain8", "fp32"),
        ("resnet8", "bf16"), ("resnet11-bottleneck", "bf16"),
    ],
)  # fmt: skip
def test_a_hundred_fused_steps_lose_what_eager_ones_lose(arch: str, precision: Resolved) -> None:
    """The losses drift apart by rounding alone, so the first ones must agree best."""
    try:
        losses = {way: run(arch, way, 100, precision) for way in ("fused", "eager")}
    except UsageError as reason:
        skip_without_kernel(reason)
    gap = (losses["eager"] - losses["fused"]).abs() / losses["eager"]
    soon, late = (1e-5, 2e-2) if precision == "fp32" else (2e-3, 0.1)
    assert gap[:10].max() < soon
    assert gap.max() < late
    assert losses["fused"][-10:].mean() < 0.6 * losses["fused"][:10].mean()  # it did learn


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's about itself
def test_compiled_steps_lose_what_eager_ones_lose() -> None:
    try:
        compiled = run("resnet8", "compiled", 5)
    except UsageError as reason:
        pytest.skip(str(reason))
    eager = run("resnet8", "eager", 5)
    assert ((compiled - eager).abs() / eager).max() < 1e-4


def test_where_nothing_compiles_compiled_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match="does not work here: no C\\+\\+ compiler; use"):
        make_forward(build("resnet8"), "compiled", "fp32")


def run(arch: str, execution: str, steps: int, precision: Resolved = "fp32") -> Tensor:
    model = build(arch).to(memory_format=torch.channels_last)
    forward = make_forward(model, execution, precision)
    trainer = Trainer(model.train(), forward.module, Recipe(arch=arch, lr=0.01), precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    losses = []
    for step, part in zip(range(steps), itertools.cycle(torch.arange(64).split(16)), strict=False):
        trainer.begin_sums()
        trainer.step(images[part], labels[part], 0.01, step)
        losses.append(trainer.sums[0].item() / len(part))
    return torch.tensor(losses)


@linux_only
def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UnavailableError, match="no C compiler 'no-such-compiler'"):
        fused_norm_relu(torch.float32)


@linux_only
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "sh -c 'echo broken >&2; exit 3'")
    with pytest.raises(UnavailableError, match="could not compile it: broken"):
        fused_norm_relu(torch.float32)


@pytest.mark.parametrize(
    ("flaw", "complaint"),
    [
        ("-Dsqrt=fabs", "does not agree with PyTorch"),
        ("-Domp_get_max_threads=omp_get_num_threads", "not the one that PyTorch uses"),
    ],
)
def test_a_kernel_that_would_be_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, fused: NormReLU, flaw: str, complaint: str
) -> None:
    monkeypatch.setenv("CC", f"cc {flaw}")
    with pytest.raises(UnavailableError, match=complaint):
        fused_norm_relu(torch.float32)


@linux_only
def test_auto_goes_on_with_pytorch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    model = build("resnet8")
    forward = make_forward(model, "auto", "fp32")
    assert (forward.module, forward.execution) == (model, "eager")
    assert "no C compiler" in forward.reason
    with pytest.raises(UsageError, match="no-such-compiler.*--execution auto"):
        make_forward(model, "fused", "fp32")


@linux_only
def test_a_folder_from_which_nothing_may_run_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")  # as with noexec

    try:
        fused_norm_relu(torch.float32)
    except UnavailableError as reason:
        skip_without_kernel(reason)
    monkeypatch.setattr("ctypes.CDLL", refuse)
    forward = make_forward(build("resnet8"), "auto", "fp32")
    assert forward.execution == "eager"
    assert "failed to map segment" in forward.reason
    assert "TMPDIR" in forward.remedy
