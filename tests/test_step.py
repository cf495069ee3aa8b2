"""Training steps and schedules, compared with plain PyTorch."""

import itertools
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from requires_kernels import skip_without_kernel
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56 import execution
from resnet56.ema import EMA, reestimate_batch_norm
from resnet56.errors import UsageError
from resnet56.execution import prepare_model
from resnet56.kernels.compiler import UnavailableError
from resnet56.model import build
from resnet56.optimizer import make_optimizer
from resnet56.recipe import RECIPES, Recipe
from resnet56.runs.checkpoint import not_finite
from resnet56.step import Trainer, learning_rate

CPU = torch.device("cpu")
BATCH = 8
LR = 0.05


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread, which is faster for such a small model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_recipe(**fields: Any) -> Recipe:
    return Recipe(**({"arch": "resnet8", "lr": LR, "weight_decay": 5e-3} | fields))


def make_trainer(recipe: Recipe, precision: Any = "fp32", arch: str = "resnet8") -> Trainer:
    model = build(arch, seed=0)
    return Trainer(model, model, recipe, precision)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def run(trainer: Trainer, steps: range, lr: float = LR) -> list[float]:
    """Take the steps and return their losses."""
    sums = [float(trainer.sums[0])]
    for step in steps:
        trainer.step(*batch(step), lr, step)
        sums.append(float(trainer.sums[0]))
    return [(after - before) / BATCH for before, after in itertools.pairwise(sums)]


def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


class PlainLoop:
    """A training loop in the style of a PyTorch tutorial."""

    def __init__(self, recipe: Recipe, arch: str = "resnet8") -> None:
        self.model = build(arch, seed=0)
        self.smoothing = recipe.label_smoothing
        decayed, undecayed = [], []
        for name, parameter in self.model.named_parameters():
            is_norm_or_bias = "bn" in name or "shortcut.1" in name or name == "fc.bias"
            (undecayed if is_norm_or_bias and not recipe.decay_norm else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed}]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=LR,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=False,
            foreach=False,
        )
        self.losses: list[float] = []
        self.correct = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.correct += int((logits.argmax(1) == labels).sum())


# Learning rates


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    return [
        learning_rate(recipe, i, steps_per_epoch) for i in range(recipe.epochs * steps_per_epoch)
    ]


def test_the_recipe_report_halves_the_rate_every_ten_epochs() -> None:
    for epoch in range(40):
        for step in (0, 1249):  # the first and the last of 1,250
            rate = learning_rate(RECIPES["report"], 1250 * epoch + step, 1250)
            assert rate == pytest.approx(0.02 * 0.5 ** (epoch // 10))


def test_the_recipe_he2015_divides_the_rate_by_ten_after_82_and_123_epochs() -> None:
    expected = {0: 0.1, 82 * 390 - 1: 0.1, 82 * 390: 0.01, 123 * 390 - 1: 0.01, 123 * 390: 0.001}
    expected[164 * 390 - 1] = 0.001
    for step, rate in expected.items():
        assert learning_rate(RECIPES["he2015"], step, 390) == pytest.approx(rate)


def scheduler_rates(scheduler: Any, steps: int) -> list[float]:
    optimizer = scheduler.optimizer
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


def test_step_schedule_matches_multi_step_lr() -> None:
    recipe = make_recipe(epochs=6, drop_epochs=(2, 3, 5), drop_factor=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [14, 21, 35], gamma=0.3)
    assert rates(recipe, 7) == pytest.approx(scheduler_rates(scheduler, 42))


def test_step_schedule_can_drop_within_an_epoch() -> None:
    recipe = make_recipe(epochs=2, drop_epochs=(0.5, 1.25), drop_factor=0.1)
    expected = [LR] * 4 + [LR / 10] * 6 + [LR / 100] * 6
    assert rates(recipe, 8) == pytest.approx(expected)


def test_cosine_schedule_matches_cosine_annealing_lr() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=42)
    expected = scheduler_rates(scheduler, 42)
    assert rates(make_recipe(epochs=6, schedule="cosine"), 7) == pytest.approx(expected)


def test_cosine_schedule_starts_after_the_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=28)
    recipe = make_recipe(epochs=6, schedule="cosine", warmup_epochs=2)
    assert rates(recipe, 7)[14:] == pytest.approx(scheduler_rates(scheduler, 28))


@pytest.mark.parametrize(("warmup", "steps_per_epoch"), [(0, 5), (1, 5), (1.5, 8), (3, 7)])
def test_one_cycle_rises_and_falls_linearly(warmup: float, steps_per_epoch: int) -> None:
    recipe = make_recipe(epochs=6, schedule="one-cycle", warmup_epochs=warmup)
    curve = rates(recipe, steps_per_epoch)
    peak = int(warmup * steps_per_epoch)
    assert min(curve) > 0
    assert curve[peak] == LR
    assert [step for step, rate in enumerate(curve) if rate >= LR] == [peak]
    rise = [b - a for a, b in itertools.pairwise([0, *curve[: peak + 1]])]
    # One step after the end, the rate is 0.
    fall = [a - b for a, b in itertools.pairwise([*curve[peak:], 0])]
    assert rise == pytest.approx([LR / (peak + 1)] * (peak + 1))
    assert fall == pytest.approx([LR / (len(curve) - peak)] * (len(curve) - peak))


@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
@pytest.mark.parametrize("warmup", [0.5, 1.3, 2, 50])
def test_rates_are_positive_and_at_most_the_peak(schedule: Any, warmup: float) -> None:
    curve = rates(
        make_recipe(epochs=3, schedule=schedule, warmup_epochs=warmup, drop_epochs=(2.5,)), 7
    )
    assert min(curve) > 0
    assert max(curve) <= LR * (1 + 1e-12)
    rising = curve[: min(int(warmup * 7) + 1, len(curve))]
    assert rising == sorted(rising)


# Steps


@pytest.mark.parametrize("arch", ["resnet8", "resnet8-b", "plain8"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True},
        {"label_smoothing": 0.1},
        {"decay_norm": False, "nesterov": True},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_five_steps_match_a_plain_loop(arch: str, fields: dict[str, Any]) -> None:
    recipe = make_recipe(**fields)
    trainer, plain = make_trainer(recipe, arch=arch), PlainLoop(recipe, arch)
    losses = run(trainer, range(5))
    for step in range(5):
        plain.step(*batch(step))
    assert losses == pytest.approx(plain.losses, rel=1e-4)
    assert trainer.sums.tolist() == pytest.approx(
        [BATCH * sum(plain.losses), plain.correct], rel=1e-4
    )
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.weights()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_step_uses_the_given_rate() -> None:
    recipe = make_recipe(lr=0.3, momentum=0.0, weight_decay=0.0)
    trainer = make_trainer(recipe)
    before = copy(trainer.weights())["fc.bias"]
    images, labels = batch(0)
    trainer.step(images, labels, 0.01, 0)
    model = build("resnet8", seed=0)
    F.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(trainer.weights()["fc.bias"], before - 0.01 * model.fc.bias.grad)


@pytest.mark.parametrize("decay_norm", [True, False])
def test_adamw_matches_the_plain_implementation(decay_norm: bool) -> None:
    """Both optimizers receive the same gradients in three steps."""
    recipe = make_recipe(optimizer="adamw", decay_norm=decay_norm, weight_decay=0.1, lr=0.01)
    model, other = build("resnet8", seed=0), build("resnet8", seed=0)
    optimizer = make_optimizer(model, recipe)
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    plain = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.1 * decay_norm}],
        lr=0.01,
        weight_decay=0.1,
        foreach=False,
        fused=False,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        optimizer.step()
        plain.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_norm", [True, False])
def test_weight_decay_applies_to_the_right_parameters(decay_norm: bool) -> None:
    model = build("resnet8-b", seed=0)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    recipe = make_recipe(decay_norm=decay_norm, weight_decay=0.5, lr=0.1)
    make_optimizer(model, recipe).step()
    shrunk = {name for name, p in model.named_parameters() if float(p.detach().max()) < 1}
    kernels = {name for name, module in model.named_modules() if hasattr(module, "stride")}
    expected = {f"{name}.weight" for name in [*kernels, "fc"]}
    if decay_norm:
        expected = {name for name, _ in model.named_parameters()}
    assert shrunk == expected
    assert float(model.fc.weight.detach().max()) == pytest.approx(1 - 0.1 * 0.5)


# Probabilities as targets


EXECUTIONS = ["eager", "fused", "native"]


def trainer_for(execution: str, recipe: Recipe) -> Trainer:
    """Return a trainer with this execution mode, or skip the test."""
    precision: Any = "bf16" if execution == "native" else "fp32"
    model = build("resnet8", seed=0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        prepared = prepare_model(model.train(), execution, precision)
    except UsageError as reason:
        skip_without_kernel(reason)
    return Trainer(model, prepared.module, recipe, precision)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_targets_match_labels(execution: str, smoothing: float) -> None:
    recipe = make_recipe(label_smoothing=smoothing)
    one_hot, plain = trainer_for(execution, recipe), trainer_for(execution, recipe)
    for step in range(3):
        images, labels = batch(step)
        one_hot.step(images, F.one_hot(labels, 10).float(), LR, step)
        plain.step(images, labels, LR, step)
    assert one_hot.sums.tolist() == pytest.approx(plain.sums.tolist(), rel=1e-5)
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(one_hot.weights()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_gradient_of_mixed_targets_is_the_mean_of_softmax_minus_target(execution: str) -> None:
    """The gradient of the last bias is the mean gradient of the logits."""
    trainer = trainer_for(execution, make_recipe(momentum=0.0, weight_decay=0.0))
    images, _ = batch(0)
    targets = torch.rand(BATCH, 10, generator=torch.Generator().manual_seed(3)).softmax(dim=1)
    logits: list[Tensor] = []
    trainer.model.fc.register_forward_hook(lambda *call: logits.append(call[2].detach().float()))
    before = trainer.model.fc.bias.detach().clone()
    trainer.step(images, targets, LR, 0)
    expected = (logits[0].softmax(dim=1) - targets).mean(dim=0)
    tolerance = 1e-2 if execution == "native" else 1e-5  # bf16
    moved = (before - trainer.model.fc.bias.detach()) / LR
    torch.testing.assert_close(moved, expected, rtol=tolerance, atol=tolerance / 10)
    loss = -(targets * logits[0].log_softmax(dim=1)).sum(dim=1)
    assert float(trainer.sums[0]) == pytest.approx(float(loss.sum()), rel=1e-5)
    correct = targets[torch.arange(BATCH), logits[0].argmax(dim=1)].sum()
    assert float(trainer.sums[1]) == pytest.approx(float(correct))


def test_sums_start_from_zero_or_from_the_given_values() -> None:
    trainer = make_trainer(make_recipe())
    (loss,) = run(trainer, range(1))
    correct = int(trainer.sums[1])
    trainer.reset_sums()
    assert trainer.sums.tolist() == [0, 0]
    fresh = make_trainer(make_recipe())
    fresh.reset_sums(12.5, 40)
    run(fresh, range(1))
    assert fresh.sums.tolist() == pytest.approx([12.5 + BATCH * loss, 40 + correct])


# The losses that this code printed with PyTorch 2.13 on a CPU. The test detects changes in the
# initialization, forward pass, loss and optimizer.
GOLDEN = {"resnet8": [2.3057, 2.2363, 2.2357], "resnet56": [2.2916, 3.4756, 3.9976]}


@pytest.mark.parametrize("arch", GOLDEN)
def test_the_first_losses_have_not_changed(arch: str) -> None:
    losses = run(make_trainer(make_recipe(arch=arch), arch=arch), range(3))
    assert losses == pytest.approx(GOLDEN[arch], rel=1e-3)


def test_training_overfits_one_batch() -> None:
    trainer = make_trainer(make_recipe(weight_decay=0.0))
    images, labels = batch(0)
    for step in range(25):
        trainer.reset_sums()
        trainer.step(images, labels, LR, step)
    loss, correct = trainer.sums.tolist()
    assert correct == BATCH
    assert loss / BATCH < 0.3


# EMA


@pytest.mark.parametrize("decay", [0.2, 0.999])  # the first decay is reached at step 2
def test_ema_matches_a_naive_loop(decay: float) -> None:
    recipe = make_recipe(ema_decay=(decay,))
    trainer = make_trainer(recipe)
    shadow = {name: t.double() for name, t in copy(trainer.model.state_dict()).items()}
    for step in range(5):
        run(trainer, range(step, step + 1))
        used = min(decay, (1 + step) / (10 + step))
        for name, tensor in trainer.model.state_dict().items():
            shadow[name] = used * shadow[name] + (1 - used) * tensor.double()
            if not tensor.is_floating_point():
                shadow[name] = tensor.double()
    averaged = trainer.weights()
    assert averaged.keys() == shadow.keys()
    for name, tensor in averaged.items():
        assert tensor.dtype == trainer.model.state_dict()[name].dtype
        torch.testing.assert_close(tensor.double(), shadow[name], rtol=1e-5, atol=1e-6)
    assert int(averaged["bn1.num_batches_tracked"]) == 5


def test_ema_does_not_change_training() -> None:
    plain, averaged = make_trainer(make_recipe()), make_trainer(make_recipe(ema_decay=(0.9,)))
    assert run(plain, range(3)) == run(averaged, range(3))
    assert_equal(plain.model.state_dict(), averaged.model.state_dict())


def test_ema_of_constant_weights_is_constant() -> None:
    model = build("resnet8")
    ema = EMA(model, 0.99)
    for step in range(3):
        ema.update(model.state_dict(), 1 - ema.decay_at(step))
    assert_equal(ema.tensors, model.state_dict())


def test_ema_with_a_tensor_as_weight_matches_a_number() -> None:
    averages = [EMA(build("resnet8", seed=0), 0.9) for _ in range(2)]
    state = build("resnet8", seed=1).state_dict()
    state["bn1.num_batches_tracked"] += 7
    averages[0].update(state, 0.3)
    averages[1].update(state, torch.tensor(0.3))
    for name, tensor in averages[0].tensors.items():
        torch.testing.assert_close(averages[1].tensors[name], tensor, rtol=1e-6, atol=1e-7)
    assert int(averages[1].tensors["bn1.num_batches_tracked"]) == 7


def test_steps_with_tensors_match_steps_with_numbers() -> None:
    """A CUDA graph reads the learning rate, EMA weights and step number from tensors."""
    fields = {"ema_decay": (0.9, 0.99), "val_size": 1, "nesterov": True}
    numbers, tensors = make_trainer(make_recipe(**fields)), make_trainer(make_recipe(**fields))
    tensors.graphs = lambda *inputs, variant: tensors._run_step(*inputs, variant)  # type: ignore[assignment]
    for step in range(3):
        for trainer in (numbers, tensors):
            trainer.step(*batch(step), LR / (step + 1), step)
    torch.testing.assert_close(tensors.sums, numbers.sums)
    expected = {**numbers.weights(), **numbers.state()}
    for name, tensor in {**tensors.weights(), **tensors.state()}.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    tensors.step(torch.full_like(batch(0)[0], torch.nan), batch(0)[1], LR, 3)
    assert tensors.first_nonfinite_step == 3


def test_several_emas_match_runs_with_one_ema_each() -> None:
    several = make_trainer(make_recipe(ema_decay=(0.3, 0.9), val_size=1))
    run(several, range(4))
    for ema in several.emas:
        single = make_trainer(make_recipe(ema_decay=(ema.decay,)))
        run(single, range(4))
        assert_equal(ema.tensors, single.weights())
    assert_equal(several.weights(), several.emas[0].tensors)


def test_reestimated_statistics_are_means_over_the_batches() -> None:
    model = build("resnet8-b", seed=0)
    run(Trainer(model, model, make_recipe(), "fp32"), range(2))
    before = copy(model.state_dict())
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].double())
            )
    batches = [batch(step)[0] for step in range(5, 8)]
    reestimate_batch_norm(model, batches)
    assert not model.training
    after = model.state_dict()
    assert len(seen) == 9
    for name, inputs in seen.items():
        assert len(inputs) == 3
        mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
        var = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
        torch.testing.assert_close(
            after[f"{name}.running_mean"].double(), mean, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(after[f"{name}.running_var"].double(), var, rtol=1e-4, atol=1e-5)
        assert int(after[f"{name}.num_batches_tracked"]) == 2
    assert {n for n in after if not torch.equal(after[n], before[n])} == {
        f"{name}.{statistic}" for name in seen for statistic in ("running_mean", "running_var")
    }


# Resuming


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ema_decay": (0.9,)},
        {"momentum": 0.0},
        {"optimizer": "adamw"},
        {"nesterov": True, "ema_decay": (0.3, 0.9), "val_size": 1},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_three_steps_and_two_resumed_steps_match_five(
    fields: dict[str, Any], memory_format: torch.memory_format
) -> None:
    def fresh(seed: int) -> Trainer:
        model = build("resnet8", seed=seed).to(memory_format=memory_format)  # type: ignore[call-overload]
        return Trainer(model, model, make_recipe(**fields), "fp32")

    straight, first, second = fresh(0), fresh(0), fresh(1)
    run(straight, range(5))
    run(first, range(3))
    # Contiguous copies, as if loaded from a file.
    weights = {name: t.contiguous() for name, t in copy(first.weights()).items()}
    state = {name: t.contiguous() for name, t in copy(first.state()).items()}
    run(first, range(3, 5))  # these steps must not change the saved tensors
    second.restore(weights, state)
    run(second, range(3, 5))
    assert_equal(second.weights(), straight.weights())
    assert_equal(second.state(), straight.state())
    assert_equal(second.model.state_dict(), straight.model.state_dict())


def test_resuming_before_the_first_step() -> None:
    straight, first = make_trainer(make_recipe()), make_trainer(make_recipe())
    other = build("resnet8", seed=1)
    second = Trainer(other, other, make_recipe(), "fp32")
    second.restore(copy(first.weights()), copy(first.state()))
    run(straight, range(2))
    run(second, range(2))
    assert_equal(second.weights(), straight.weights())


# Non-finite losses


def test_the_first_step_with_a_non_finite_loss_is_recorded() -> None:
    trainer = make_trainer(make_recipe())
    assert trainer.first_nonfinite_step == -1
    run(trainer, range(2))
    assert trainer.first_nonfinite_step == -1
    images, labels = batch(2)
    trainer.step(images / 0, labels, LR, 2)
    assert trainer.first_nonfinite_step == 2
    trainer.step(images, labels, LR, 3)  # the weights are NaN
    assert trainer.first_nonfinite_step == 2


def test_a_non_finite_loss_in_step_zero_is_recorded() -> None:
    trainer = make_trainer(make_recipe())
    trainer.step(torch.full((BATCH, 3, 32, 32), torch.nan), batch(0)[1], LR, 0)
    assert trainer.first_nonfinite_step == 0


# Reduced precision


def test_bf16_is_close_to_fp32() -> None:
    reference, reduced = make_trainer(make_recipe()), make_trainer(make_recipe(), "bf16")
    assert run(reduced, range(3)) == pytest.approx(run(reference, range(3)), rel=0.05)
    assert all(p.dtype == torch.float32 for p in reduced.model.parameters())
    assert run(reduced, range(3, 4)) != run(reference, range(3, 4))  # the precision was reduced


@pytest.fixture
def needs_fp16() -> None:
    try:
        with torch.autocast("cpu", torch.float16):
            dtype = F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).dtype
    except (RuntimeError, UserWarning) as error:
        pytest.skip(f"fp16 is not available on this processor: {error}")
    if dtype != torch.float16:
        pytest.skip("fp16 autocast is not available on this processor")


@pytest.mark.usefixtures("needs_fp16")
def test_fp16_with_loss_scaling_is_close_to_fp32() -> None:
    reference, reduced = make_trainer(make_recipe()), make_trainer(make_recipe(), "fp16")
    assert reduced.scaler.is_enabled()
    assert not reference.scaler.is_enabled()
    assert run(reduced, range(3)) == pytest.approx(run(reference, range(3)), rel=0.01)
    for name, tensor in reference.weights().items():
        torch.testing.assert_close(reduced.weights()[name], tensor, rtol=0.05, atol=0.02)


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fill new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills new memory from torch.empty
    yield
    torch.use_deterministic_algorithms(before)


def overflowing(steps: int) -> Trainer:
    """Return an fp16 trainer whose first `steps` steps overflow."""
    trainer = make_trainer(make_recipe(), "fp16")
    trainer.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0 ** (10 + 40 * steps), backoff_factor=2.0**-40
    )
    return trainer


@pytest.mark.usefixtures("needs_fp16", "filled_memory")
def test_a_step_whose_gradients_overflow_does_not_change_the_weights() -> None:
    trainer = overflowing(1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    run(trainer, range(1))
    assert_equal(dict(trainer.model.named_parameters()), before)
    assert trainer.scaler.get_scale() == 2**10
    assert trainer.first_nonfinite_step == -1
    run(trainer, range(1, 2))
    assert trainer.scaler.get_scale() == 2**10
    assert not_finite(dict(trainer.model.named_parameters())) == []


@pytest.mark.usefixtures("needs_fp16", "filled_memory")
def test_an_overflow_in_the_first_step_does_not_change_later_steps() -> None:
    overflowed, plain = overflowing(1), overflowing(0)
    run(overflowed, range(1))
    for trainer in (overflowed, plain):
        run(trainer, range(1, 4))
    assert_equal(dict(overflowed.model.named_parameters()), dict(plain.model.named_parameters()))
    assert_equal(overflowed.state(), plain.state())


def test_cuda_graphs_require_a_cuda_device() -> None:
    with pytest.raises(UsageError, match="cuda-graph execution is not available: it requires a"):
        prepare_model(build("resnet8"), "cuda-graph", "bf16")
    assert "cuda-graph" not in prepare_model(build("resnet8"), "auto", "fp32").reason


def test_a_gpu_without_a_c_compiler_uses_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton needs a C compiler. The device is simulated, and nothing runs on it."""

    def triton_network(model: nn.Module) -> nn.Module:
        raise UnavailableError("Triton cannot compile the kernels: no compiler", "install gcc")

    module = SimpleNamespace(triton_network=triton_network)
    monkeypatch.setitem(sys.modules, "resnet56.kernels.triton_network", module)
    monkeypatch.setattr(execution._Request, "device", torch.device("cuda"))
    model = build("resnet8")
    prepared = prepare_model(model, "auto", "bf16")
    assert (prepared.execution, prepared.cuda_graphs) == ("cuda-graph", True)
    assert prepared.remedy == "install gcc"
    assert prepared.reason == (
        "native execution is not available: Triton cannot compile the kernels: no compiler"
    )
    with pytest.raises(UsageError, match="Triton cannot compile the kernels"):
        prepare_model(model, "native", "bf16")
    assert prepare_model(model, "auto", "fp16").execution == "eager"
    custom = prepare_model(model, "auto", "bf16", graph_step=False)
    assert custom.execution == "eager"
    assert "it supports only SGD and built-in losses" in custom.reason
    assert not prepare_model(model, "eager", "bf16").cuda_graphs
