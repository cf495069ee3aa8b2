"""Steps against plain PyTorch loops, schedules against PyTorch's own."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from requires_kernels import skip_without_kernel
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.ema import EMA, reestimate_batch_norm
from resnet56.errors import UsageError
from resnet56.model import build
from resnet56.recipe import RECIPES, Recipe
from resnet56.runs.checkpoint import not_finite
from resnet56.step import Trainer, learning_rate, make_optimizer, prepare_model

CPU = torch.device("cpu")
BATCH = 8
LR = 0.05


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """So small a network is slower on several threads that others want too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**fields: Any) -> Recipe:
    return Recipe(**({"arch": "resnet8", "lr": LR, "weight_decay": 5e-3} | fields))


def trainer(plan: Recipe, precision: Any = "fp32", arch: str = "resnet8") -> Trainer:
    model = build(arch, seed=0)
    return Trainer(model, model, plan, precision)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def run(trained: Trainer, steps: range, lr: float = LR) -> list[float]:
    """Take the steps; return each one's loss."""
    sums = [float(trained.sums[0])]
    for step in steps:
        trained.step(*batch(step), lr, step)
        sums.append(float(trained.sums[0]))
    return [(after - before) / BATCH for before, after in itertools.pairwise(sums)]


def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


class PlainLoop:
    """A training as a tutorial writes it."""

    def __init__(self, plan: Recipe, arch: str = "resnet8") -> None:
        self.model = build(arch, seed=0)
        self.smoothing = plan.label_smoothing
        decayed, spared = [], []
        for name, parameter in self.model.named_parameters():
            is_norm_or_bias = "bn" in name or "shortcut.1" in name or name == "fc.bias"
            (spared if is_norm_or_bias and not plan.decay_norm else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": spared}]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=LR,
            momentum=plan.momentum,
            nesterov=plan.nesterov,
            fused=False,
            foreach=False,
        )
        self.losses: list[float] = []
        self.hits = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.hits += int((logits.argmax(1) == labels).sum())


# Learning rates


def rates(plan: Recipe, steps_per_epoch: int) -> list[float]:
    return [learning_rate(plan, i, steps_per_epoch) for i in range(plan.epochs * steps_per_epoch)]


def test_the_reports_rate_halves_every_ten_epochs() -> None:
    for epoch in range(40):
        for step in (0, 1249):  # the first and the last of 1,250
            rate = learning_rate(RECIPES["report"], 1250 * epoch + step, 1250)
            assert rate == pytest.approx(0.02 * 0.5 ** (epoch // 10))


def test_he2015s_rate_is_divided_by_ten_after_82_and_123_epochs() -> None:
    at = {0: 0.1, 82 * 390 - 1: 0.1, 82 * 390: 0.01, 123 * 390 - 1: 0.01, 123 * 390: 0.001}
    at[164 * 390 - 1] = 0.001
    for step, rate in at.items():
        assert learning_rate(RECIPES["he2015"], step, 390) == pytest.approx(rate)


def pytorchs(scheduler: Any, steps: int) -> list[float]:
    optimizer = scheduler.optimizer
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


def test_step_is_pytorchs_multi_step() -> None:
    plan = recipe(epochs=6, drop_epochs=(2, 3, 5), drop_factor=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [14, 21, 35], gamma=0.3)
    assert rates(plan, 7) == pytest.approx(pytorchs(scheduler, 42))


def test_step_may_drop_within_an_epoch() -> None:
    plan = recipe(epochs=2, drop_epochs=(0.5, 1.25), drop_factor=0.1)
    expected = [LR] * 4 + [LR / 10] * 6 + [LR / 100] * 6
    assert rates(plan, 8) == pytest.approx(expected)


def test_cosine_is_pytorchs_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=42)
    expected = pytorchs(scheduler, 42)
    assert rates(recipe(epochs=6, schedule="cosine"), 7) == pytest.approx(expected)


def test_cosine_begins_after_the_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=28)
    plan = recipe(epochs=6, schedule="cosine", warmup_epochs=2)
    assert rates(plan, 7)[14:] == pytest.approx(pytorchs(scheduler, 28))


@pytest.mark.parametrize(("warmup", "steps_per_epoch"), [(0, 5), (1, 5), (1.5, 8), (3, 7)])
def test_one_cycle_is_a_line_up_and_a_line_down(warmup: float, steps_per_epoch: int) -> None:
    plan = recipe(epochs=6, schedule="one-cycle", warmup_epochs=warmup)
    curve = rates(plan, steps_per_epoch)
    peak = int(warmup * steps_per_epoch)
    assert min(curve) > 0
    assert curve[peak] == LR
    assert [step for step, rate in enumerate(curve) if rate >= LR] == [peak]
    rise = [b - a for a, b in itertools.pairwise([0, *curve[: peak + 1]])]
    fall = [a - b for a, b in itertools.pairwise([*curve[peak:], 0])]  # 0 is one step after
    assert rise == pytest.approx([LR / (peak + 1)] * (peak + 1))
    assert fall == pytest.approx([LR / (len(curve) - peak)] * (len(curve) - peak))


@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
@pytest.mark.parametrize("warmup", [0.5, 1.3, 2, 50])
def test_rates_stay_above_zero_and_not_above_the_peak(schedule: Any, warmup: float) -> None:
    curve = rates(recipe(epochs=3, schedule=schedule, warmup_epochs=warmup, drop_epochs=(2.5,)), 7)
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
def test_five_steps_are_those_of_a_plain_loop(arch: str, fields: dict[str, Any]) -> None:
    plan = recipe(**fields)
    mine, plain = trainer(plan, arch=arch), PlainLoop(plan, arch)
    losses = run(mine, range(5))
    for step in range(5):
        plain.step(*batch(step))
    assert losses == pytest.approx(plain.losses, rel=1e-4)
    assert mine.sums.tolist() == pytest.approx([BATCH * sum(plain.losses), plain.hits], rel=1e-4)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(mine.weights()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_step_uses_the_rate_it_is_given() -> None:
    plan = recipe(lr=0.3, momentum=0.0, weight_decay=0.0)
    mine = trainer(plan)
    before = copy(mine.weights())["fc.bias"]
    images, labels = batch(0)
    mine.step(images, labels, 0.01, 0)
    model = build("resnet8", seed=0)
    F.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(mine.weights()["fc.bias"], before - 0.01 * model.fc.bias.grad)


@pytest.mark.parametrize("decay_norm", [True, False])
def test_without_a_gradient_only_decayed_weights_shrink(decay_norm: bool) -> None:
    model = build("resnet8-b", seed=0)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    plan = recipe(decay_norm=decay_norm, weight_decay=0.5, lr=0.1)
    make_optimizer(model, plan).step()
    shrunk = {name for name, p in model.named_parameters() if float(p.detach().max()) < 1}
    kernels = {name for name, module in model.named_modules() if hasattr(module, "stride")}
    expected = {f"{name}.weight" for name in [*kernels, "fc"]}
    if decay_norm:
        expected = {name for name, _ in model.named_parameters()}
    assert shrunk == expected
    assert float(model.fc.weight.detach().max()) == pytest.approx(1 - 0.1 * 0.5)


# Targets that are probabilities


EXECUTIONS = ["eager", "fused", "native"]


def running(execution: str, plan: Recipe) -> Trainer:
    """A trainer that takes its steps in that way, or skip."""
    precision: Any = "bf16" if execution == "native" else "fp32"
    model = build("resnet8", seed=0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        forward = prepare_model(model.train(), execution, precision)
    except UsageError as reason:
        skip_without_kernel(reason)
    return Trainer(model, forward.module, plan, precision)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_targets_are_labels(execution: str, smoothing: float) -> None:
    plan = recipe(label_smoothing=smoothing)
    soft, hard = running(execution, plan), running(execution, plan)
    for step in range(3):
        images, labels = batch(step)
        soft.step(images, F.one_hot(labels, 10).float(), LR, step)
        hard.step(images, labels, LR, step)
    assert soft.sums.tolist() == pytest.approx(hard.sums.tolist(), rel=1e-5)
    for name, tensor in hard.weights().items():
        torch.testing.assert_close(soft.weights()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_gradient_of_mixed_targets_is_the_mean_of_softmax_minus_target(execution: str) -> None:
    """By hand for the last layer's bias, whose gradient is the logits' mean gradient."""
    mine = running(execution, recipe(momentum=0.0, weight_decay=0.0))
    images, _ = batch(0)
    targets = torch.rand(BATCH, 10, generator=torch.Generator().manual_seed(3)).softmax(dim=1)
    logits: list[Tensor] = []
    mine.model.fc.register_forward_hook(lambda *call: logits.append(call[2].detach().float()))
    before = mine.model.fc.bias.detach().clone()
    mine.step(images, targets, LR, 0)
    by_hand = (logits[0].softmax(dim=1) - targets).mean(dim=0)
    tolerance = 1e-2 if execution == "native" else 1e-5  # bf16
    moved = (before - mine.model.fc.bias.detach()) / LR
    torch.testing.assert_close(moved, by_hand, rtol=tolerance, atol=tolerance / 10)
    loss = -(targets * logits[0].log_softmax(dim=1)).sum(dim=1)
    assert float(mine.sums[0]) == pytest.approx(float(loss.sum()), rel=1e-5)
    hits = targets[torch.arange(BATCH), logits[0].argmax(dim=1)].sum()
    assert float(mine.sums[1]) == pytest.approx(float(hits))


def test_sums_begin_anew_or_where_they_were_left() -> None:
    mine = trainer(recipe())
    (loss,) = run(mine, range(1))
    hits = int(mine.sums[1])
    mine.begin_sums()
    assert mine.sums.tolist() == [0, 0]
    fresh = trainer(recipe())
    fresh.begin_sums(12.5, 40)
    run(fresh, range(1))
    assert fresh.sums.tolist() == pytest.approx([12.5 + BATCH * loss, 40 + hits])


# Taken from a run of this code (PyTorch 2.13 on a CPU), to notice when anything in the chain of
# initial weights, forward pass, loss and step changes.
GOLDEN = [2.3057, 2.2363, 2.2357]


def test_the_first_losses_are_what_they_were() -> None:
    assert run(trainer(recipe()), range(3)) == pytest.approx(GOLDEN, rel=1e-3)


def test_training_learns_a_batch_by_heart() -> None:
    mine = trainer(recipe(weight_decay=0.0))
    images, labels = batch(0)
    for step in range(25):
        mine.begin_sums()
        mine.step(images, labels, LR, step)
    loss, hits = mine.sums.tolist()
    assert hits == BATCH
    assert loss / BATCH < 0.3


# Averaged weights


@pytest.mark.parametrize("decay", [0.2, 0.999])  # the first is reached at step 2
def test_averaged_weights_are_a_naive_loops(decay: float) -> None:
    plan = recipe(ema_decay=(decay,))
    mine = trainer(plan)
    shadow = {name: t.double() for name, t in copy(mine.model.state_dict()).items()}
    for step in range(5):
        run(mine, range(step, step + 1))
        used = min(decay, (1 + step) / (10 + step))
        for name, tensor in mine.model.state_dict().items():
            shadow[name] = used * shadow[name] + (1 - used) * tensor.double()
            if not tensor.is_floating_point():
                shadow[name] = tensor.double()
    averaged = mine.weights()
    assert averaged.keys() == shadow.keys()
    for name, tensor in averaged.items():
        assert tensor.dtype == mine.model.state_dict()[name].dtype
        torch.testing.assert_close(tensor.double(), shadow[name], rtol=1e-5, atol=1e-6)
    assert int(averaged["bn1.num_batches_tracked"]) == 5


def test_averaging_does_not_touch_the_training() -> None:
    plain, averaged = trainer(recipe()), trainer(recipe(ema_decay=(0.9,)))
    assert run(plain, range(3)) == run(averaged, range(3))
    assert_equal(plain.model.state_dict(), averaged.model.state_dict())


def test_an_average_of_constant_weights_is_these_weights() -> None:
    model = build("resnet8")
    average = EMA(model, 0.99)
    for step in range(3):
        average.update(model.state_dict(), step)
    assert_equal(average.tensors, model.state_dict())


def test_several_averages_are_those_of_trainings_with_one_each() -> None:
    several = trainer(recipe(ema_decay=(0.3, 0.9), val_size=1))
    run(several, range(4))
    for ema in several.emas:
        single = trainer(recipe(ema_decay=(ema.decay,)))
        run(single, range(4))
        assert_equal(ema.tensors, single.weights())
    assert_equal(several.weights(), several.emas[0].tensors)


def test_reestimated_statistics_are_the_means_over_the_batches_of_what_each_norm_sees() -> None:
    model = build("resnet8-b", seed=0)
    run(Trainer(model, model, recipe(), "fp32"), range(2))
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


# Going on


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ema_decay": (0.9,)},
        {"momentum": 0.0},
        {"nesterov": True, "ema_decay": (0.3, 0.9), "val_size": 1},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_three_steps_and_two_after_a_restart_are_five(
    fields: dict[str, Any], memory_format: torch.memory_format
) -> None:
    def fresh(seed: int) -> Trainer:
        model = build("resnet8", seed=seed).to(memory_format=memory_format)  # type: ignore[call-overload]
        return Trainer(model, model, recipe(**fields), "fp32")

    straight, first, second = fresh(0), fresh(0), fresh(1)
    run(straight, range(5))
    run(first, range(3))
    # As through a file: copies, in plain memory order.
    weights = {name: t.contiguous() for name, t in copy(first.weights()).items()}
    state = {name: t.contiguous() for name, t in copy(first.state()).items()}
    run(first, range(3, 5))  # nothing that follows may change what was saved
    second.restore(weights, state)
    run(second, range(3, 5))
    assert_equal(second.weights(), straight.weights())
    assert_equal(second.state(), straight.state())
    assert_equal(second.model.state_dict(), straight.model.state_dict())


def test_a_restart_before_the_first_step_is_a_start() -> None:
    straight, first = trainer(recipe()), trainer(recipe())
    other = build("resnet8", seed=1)
    second = Trainer(other, other, recipe(), "fp32")
    second.restore(copy(first.weights()), copy(first.state()))
    run(straight, range(2))
    run(second, range(2))
    assert_equal(second.weights(), straight.weights())


# Losses that are no numbers


def test_the_first_step_with_a_loss_that_is_not_finite_is_remembered() -> None:
    mine = trainer(recipe())
    assert mine.bad_step == -1
    run(mine, range(2))
    assert mine.bad_step == -1
    images, labels = batch(2)
    mine.step(images / 0, labels, LR, 2)
    assert mine.bad_step == 2
    mine.step(images, labels, LR, 3)  # weights are no numbers any more
    assert mine.bad_step == 2


def test_a_loss_that_is_not_finite_in_the_very_first_step_is_noticed() -> None:
    mine = trainer(recipe())
    mine.step(torch.full((BATCH, 3, 32, 32), torch.nan), batch(0)[1], LR, 0)
    assert mine.bad_step == 0


# Narrow arithmetic


def test_bf16_is_close_to_fp32() -> None:
    wide, narrow = trainer(recipe()), trainer(recipe(), "bf16")
    assert run(narrow, range(3)) == pytest.approx(run(wide, range(3)), rel=0.05)
    assert all(p.dtype == torch.float32 for p in narrow.model.parameters())
    assert run(narrow, range(3, 4)) != run(wide, range(3, 4))  # it was narrow


@pytest.fixture
def needs_fp16() -> None:
    try:
        with torch.autocast("cpu", torch.float16):
            narrow = F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).dtype
    except (RuntimeError, UserWarning) as error:
        pytest.skip(f"no fp16 on this processor: {error}")
    if narrow != torch.float16:
        pytest.skip("no fp16 autocast on this processor")


@pytest.mark.usefixtures("needs_fp16")
def test_fp16_with_loss_scaling_is_close_to_fp32() -> None:
    wide, narrow = trainer(recipe()), trainer(recipe(), "fp16")
    assert narrow.scaler.is_enabled()
    assert not wide.scaler.is_enabled()
    assert run(narrow, range(3)) == pytest.approx(run(wide, range(3)), rel=0.01)
    for name, tensor in wide.weights().items():
        torch.testing.assert_close(narrow.weights()[name], tensor, rtol=0.05, atol=0.02)


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN, as it may."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
    yield
    torch.use_deterministic_algorithms(before)


def overflowing(steps: int) -> Trainer:
    """A trainer in fp16 whose first `steps` steps overflow, and no later one."""
    mine = trainer(recipe(), "fp16")
    mine.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0 ** (10 + 40 * steps), backoff_factor=2.0**-40
    )
    return mine


@pytest.mark.usefixtures("needs_fp16", "filled_memory")
def test_a_step_whose_gradients_overflow_leaves_the_weights_as_they_were() -> None:
    mine = overflowing(1)
    before = {name: p.detach().clone() for name, p in mine.model.named_parameters()}
    run(mine, range(1))
    assert_equal(dict(mine.model.named_parameters()), before)
    assert mine.scaler.get_scale() == 2**10
    assert mine.bad_step == -1
    run(mine, range(1, 2))
    assert mine.scaler.get_scale() == 2**10
    assert not_finite(dict(mine.model.named_parameters())) == []


@pytest.mark.usefixtures("needs_fp16", "filled_memory")
def test_steps_after_an_overflow_in_the_first_are_as_though_it_had_not_been() -> None:
    mine, plain = overflowing(1), overflowing(0)
    run(mine, range(1))
    for trained in (mine, plain):
        run(trained, range(1, 4))
    assert_equal(dict(mine.model.named_parameters()), dict(plain.model.named_parameters()))
    assert_equal(mine.state(), plain.state())
