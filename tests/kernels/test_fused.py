"""The fused kernel, compared with PyTorch's operations in double precision."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from requires_kernels import skip_without_kernel
from torch import Tensor, nn

from resnet56.errors import UsageError
from resnet56.execution import prepare_model
from resnet56.kernels.compiler import UnavailableError
from resnet56.kernels.fused import fused_norm_relu
from resnet56.model import NormReLU, build, norm_relu
from resnet56.recipe import Recipe
from resnet56.runtime import Precision
from resnet56.step import Trainer

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernels require Linux")

TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 6e-3,
}  # relative errors; bf16 has 8 significant bits


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
    """Return x, the residual, and the gradient of the output. The last block of pixels is short."""
    generator = torch.Generator().manual_seed(channels)
    result = [torch.randn(11, channels, 3, 7, generator=generator) for _ in range(3)]
    result[0] = result[0] * torch.linspace(0.5, 2, channels)[:, None, None] + mean
    return [t.to(dtype, memory_format=torch.channels_last) for t in result]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


def run_step(
    function: NormReLU, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, grad: Tensor
) -> dict[str, Tensor]:
    """Return the output, the gradients and the running statistics of one step."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    out = function(norm, x, residual)
    out.backward(grad)
    results = {
        "out": out, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
        "mean": norm.running_mean, "var": norm.running_var,
    }  # fmt: skip
    return results if residual is None else results | {"residual": residual.grad}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm()
        assert error < tolerance, name


@pytest.mark.parametrize(
    ("channels", "with_residual", "mean"),
    [(16, False, 0.0), (16, True, 0.0), (64, True, 0.0), (256, False, 0.0), (32, True, 30.0)],
)
def test_the_results_match_pytorch_in_double_precision(
    fused: NormReLU, dtype: torch.dtype, channels: int, with_residual: bool, mean: float
) -> None:
    x, residual, grad = tensors(dtype, channels, mean)
    second = residual if with_residual else None
    actual = run_step(fused, batch_norm(channels), x, second, grad)
    double = None if second is None else second.double()
    expected = run_step(norm_relu, batch_norm(channels).double(), x.double(), double, grad.double())
    assert_close(actual, expected, TOLERANCE[dtype])


def test_the_memory_layout_does_not_change_the_results(fused: NormReLU, dtype: torch.dtype) -> None:
    x, residual, grad = tensors(dtype, 16)
    channels_last = run_step(fused, batch_norm(16), x, residual, grad)
    contiguous = run_step(fused, batch_norm(16), *(t.contiguous() for t in (x, residual, grad)))
    assert all(torch.equal(channels_last[name], contiguous[name]) for name in contiguous)


def test_results_are_deterministic_for_a_number_of_threads(
    fused: NormReLU, dtype: torch.dtype
) -> None:
    x, residual, grad = tensors(dtype, 64)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (2, 2, 3, 8):  # four of eight threads have no block of rows
            torch.set_num_threads(threads)
            runs.append(run_step(fused, batch_norm(64), x, residual, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    for other in runs[2:]:
        assert_close(other, {n: t.double() for n, t in runs[0].items()}, TOLERANCE[dtype])


def test_nan_propagates(fused: NormReLU, dtype: torch.dtype) -> None:
    x, residual, grad = tensors(dtype, 16)
    x[0, 3, 0, 0] = float("nan")
    results = run_step(fused, batch_norm(16), x, residual, grad)
    assert results["out"][:, 3].isnan().all()
    assert not results["out"][:, 2].isnan().any()
    assert results["x"][:, 3].isnan().all()


def test_training_counts_batches_and_evaluation_uses_pytorch(
    fused: NormReLU, dtype: torch.dtype
) -> None:
    x, residual, _ = tensors(dtype, 16)
    norm = batch_norm(16)
    fused(norm, x, residual)
    assert norm.num_batches_tracked == 1
    norm.eval()
    before = norm.running_mean.clone()
    assert torch.equal(fused(norm, x, residual), norm_relu(norm, x, residual))
    assert torch.equal(norm.running_mean, before)


def test_unsupported_inputs_use_pytorch(fused: NormReLU, dtype: torch.dtype) -> None:
    x = torch.randn(4, 10, 5, 5, dtype=dtype)  # ten channels do not fill a vector
    assert torch.equal(fused(batch_norm(10), x), norm_relu(batch_norm(10), x))
    x = torch.randn(4, 16, 5, 5, dtype=torch.float64)
    norm = batch_norm(16).double()
    assert torch.equal(fused(norm, x), norm_relu(batch_norm(16).double(), x))
    x = tensors(dtype, 16)[0]
    plain = nn.BatchNorm2d(16, affine=False)
    assert torch.equal(fused(plain, x), norm_relu(nn.BatchNorm2d(16, affine=False), x))


EARLY = {"fp32": 1e-5, "bf16": 2e-3}  # relative differences, which grow from step to step
LATE = {"fp32": 2e-2, "bf16": 0.1}


def fused_and_eager(arch: str, steps: int, precision: Precision) -> tuple[Tensor, Tensor]:
    try:
        return run(arch, "fused", steps, precision), run(arch, "eager", steps, precision)
    except UsageError as reason:
        skip_without_kernel(reason)


@pytest.mark.parametrize(
    ("arch", "precision"),
    [("resnet8", "fp32"), ("resnet8-b", "fp32"), ("plain8", "fp32"), ("resnet8", "bf16")],
)
def test_the_first_losses_of_fused_training_match_eager_training(
    arch: str, precision: Precision
) -> None:
    fused, eager = fused_and_eager(arch, 10, precision)
    assert ((eager - fused).abs() / eager).max() < EARLY[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_of_fused_training_match_eager_training(precision: Precision) -> None:
    """The losses differ most with bottleneck blocks."""
    fused, eager = fused_and_eager("resnet11-bottleneck", 60, precision)
    gap = (eager - fused).abs() / eager
    assert gap[:10].max() < EARLY[precision]
    assert gap.max() < LATE[precision]
    assert fused[-10:].mean() < 0.6 * fused[:10].mean()  # the loss decreases


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside PyTorch
def test_losses_of_compiled_training_match_eager_training() -> None:
    try:
        compiled = run("resnet8", "compiled", 5)
    except UsageError as reason:
        pytest.skip(str(reason))
    eager = run("resnet8", "eager", 5)
    assert ((compiled - eager).abs() / eager).max() < 1e-4


def test_compiled_mode_without_a_compiler_causes_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match="does not work on this machine: no C\\+\\+ compiler; use"):
        prepare_model(build("resnet8"), "compiled", "fp32")


def run(arch: str, execution: str, steps: int, precision: Precision = "fp32") -> Tensor:
    model = build(arch).to(memory_format=torch.channels_last)
    forward = prepare_model(model, execution, precision)
    trainer = Trainer(model.train(), forward.module, Recipe(arch=arch, lr=0.01), precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    losses = []
    for step, part in zip(range(steps), itertools.cycle(torch.arange(64).split(16)), strict=False):
        trainer.reset_sums()
        trainer.step(images[part], labels[part], 0.01, step)
        losses.append(trainer.sums[0].item() / len(part))
    return torch.tensor(losses)


def test_a_process_compiles_a_kernel_once(fused: NormReLU, dtype: torch.dtype) -> None:
    assert fused_norm_relu(dtype) is fused


@linux_only
def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UnavailableError, match="the C compiler 'no-such-compiler'"):
        fused_norm_relu(torch.float32)


@linux_only
def test_the_message_of_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "sh -c 'echo broken >&2; exit 3'")
    with pytest.raises(UnavailableError, match="sh failed to compile the kernel: broken"):
        fused_norm_relu(torch.float32)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("-Dsqrt=fabs", "results differ from PyTorch's"),
        ("-Domp_get_max_threads=omp_get_num_threads", "different OpenMP runtimes"),
    ],
)
def test_a_kernel_with_wrong_results_is_rejected(
    monkeypatch: pytest.MonkeyPatch, fused: NormReLU, flag: str, message: str
) -> None:
    monkeypatch.setenv("CC", f"cc {flag}")
    with pytest.raises(UnavailableError, match=message):
        fused_norm_relu(torch.float32)


@linux_only
def test_auto_falls_back_to_eager_and_reports_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    model = build("resnet8")
    forward = prepare_model(model, "auto", "fp32")
    assert (forward.module, forward.execution) == (model, "eager")
    assert "was not found" in forward.reason
    with pytest.raises(UsageError, match='no-such-compiler.*execution="auto"'):
        prepare_model(model, "fused", "fp32")


@linux_only
def test_a_noexec_temporary_directory_is_reported_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: str) -> None:
        # The message for a directory that is mounted with noexec.
        raise OSError(f"{path}: failed to map segment from shared object")

    try:
        fused_norm_relu(torch.float32)
    except UnavailableError as reason:
        skip_without_kernel(reason)
    # With another command, the kernel is compiled again.
    monkeypatch.setenv("CC", f"cc -I{tmp_path}")
    monkeypatch.setattr("ctypes.CDLL", refuse)
    forward = prepare_model(build("resnet8"), "auto", "fp32")
    assert forward.execution == "eager"
    assert "failed to map segment" in forward.reason
    assert "TMPDIR" in forward.remedy
