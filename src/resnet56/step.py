"""One training step, and what it is made of: optimizer, schedule, EMA."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.distillation import Teachers, distillation_loss
from resnet56.ema import EMA
from resnet56.errors import UsageError
from resnet56.kernels.compiler import UnavailableError
from resnet56.kernels.fused import fused_norm_relu
from resnet56.kernels.native import native_network
from resnet56.model import ResNet
from resnet56.recipe import Execution, Recipe
from resnet56.runtime import DTYPES, Precision, autocast


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step `step` (from 0): a warm-up line, then the recipe's schedule."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    if recipe.schedule == "step":
        drops = sum(step >= epoch * steps_per_epoch for epoch in recipe.drop_epochs)
        return float(recipe.lr * recipe.drop_factor**drops)
    done = (step - warmup) / max(recipe.epochs * steps_per_epoch - warmup, 1)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    return recipe.lr * (1 - done)


@dataclass(frozen=True)
class PreparedModel:
    """What a step calls, and how that runs."""

    module: nn.Module
    execution: Execution
    reason: str = ""  # why it is not the faster one
    remedy: str = ""  # what the user can do about it


def prepare_model(model: ResNet, wanted: str, precision: Precision) -> PreparedModel:
    """Decide how the steps of `model` run; the numbers are the same within rounding.

    Args:
        model: on its device.
        wanted: a recipe's `execution`. `auto` never compiles by `torch.compile`, whose minute
            only a long training earns back, nor takes native without a matrix unit.
        precision: of the forward pass.

    Raises:
        UsageError: what is wanted is not to be had here.
    """
    if wanted == "compiled":
        _probe_compiler(model)
        compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return PreparedModel(compiled, "compiled")
    makers: dict[Execution, Callable[[ResNet, Precision], nn.Module]] = {
        "native": partial(_native, vectors=wanted == "native"),
        "fused": _fused,
    }
    reasons: list[str] = []
    remedy = ""
    for execution, make in makers.items():
        if wanted in (execution, "auto"):
            try:
                if next(model.parameters()).device.type != "cpu":
                    raise UnavailableError("the kernels run on the CPU only")
                return PreparedModel(make(model, precision), execution, "; ".join(reasons))
            except UnavailableError as error:
                reasons.append(f"{execution} execution is not available: {error}")
                remedy = error.remedy
    if wanted in makers:
        raise UsageError(f"{reasons[0]}; use --execution auto")
    return PreparedModel(model, "eager", "; ".join(reasons), remedy)


def _native(model: ResNet, precision: Precision, *, vectors: bool) -> nn.Module:
    if precision != "bf16":
        raise UnavailableError(f"it requires bf16, not {precision}")
    return native_network(model, vectors=vectors)


def _fused(model: ResNet, precision: Precision) -> nn.Module:
    if precision == "fp16":
        raise UnavailableError("it does not support fp16")
    model.use(fused_norm_relu(DTYPES[precision]))
    return model


def _probe_compiler(model: nn.Module) -> None:
    """UsageError where torch.compile does not work; else the first step would find out."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=next(model.parameters()).device))
    except Exception as error:  # Dynamo's and Inductor's have no common base
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"torch.compile does not work here: {first}; use --execution eager"
        ) from None


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD; with `decay_norm` off, vectors (batch norm, biases) are spared the weight decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    spared = recipe.weight_decay if recipe.decay_norm else 0.0
    optimizer = torch.optim.SGD(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": spared},
        ],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )
    if recipe.momentum:
        # The fused kernel would leave its own buffers unwritten, should the first step of an
        # fp16 training overflow; from zero it makes the same first step.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Trainer:
    """A model in training: takes steps and keeps the sums of the epoch, all on the device.

    Args:
        model: the bare network; its state is what checkpoints hold.
        wrapped: what runs forward: the same model, or it inside DistributedDataParallel.
        recipe: how to train.
        precision: resolved, of the forward and backward pass.
        teachers: to distill from.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        recipe: Recipe,
        precision: Precision,
        teachers: Teachers | None = None,
    ) -> None:
        self.teachers = teachers
        self.model = model
        self.wrapped = wrapped
        self.recipe = recipe
        self.precision = precision
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.emas = [EMA(model, decay) for decay in recipe.ema_decay]
        self.begin_sums()
        self.bad_step = torch.tensor(-1, device=self.device)  # the first without a finite loss

    def begin_sums(self, loss_sum: float = 0.0, correct: float = 0.0) -> None:
        """Begin an epoch's sums, or take up those of an interrupted one."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no doubles
        self.sums = torch.tensor([loss_sum, correct], dtype=kind, device=self.device)

    def step(self, images: Tensor, targets: Tensor, lr: float, step: int) -> None:
        """One step of SGD on (B, 3, S, S) normalized images.

        Adds the batch's loss and hits to `sums`; nothing waits for the device. An image is a hit
        with the probability that its target gives to the predicted class: 1 or 0 for a label.

        Args:
            images: the batch.
            targets: labels (B,) int64, or probabilities (B, C) float32.
            lr: the learning rate.
            step: its number (from 0), over all epochs.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, self.precision):
            logits = self.wrapped(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        if self.teachers is not None:
            weight = self.recipe.teacher_weight
            distilled = self._distillation_loss(self.teachers, images, logits, step)
            loss = distilled if weight == 1 else (1 - weight) * loss + weight * distilled
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        tensors = self.model.state_dict() if self.emas else {}
        for ema in self.emas:
            ema.update(tensors, step)
        with torch.no_grad():
            predicted = logits.argmax(dim=1)
            if targets.is_floating_point():
                hits = targets.gather(1, predicted[:, None]).clamp(max=1).sum()
            else:
                hits = (predicted == targets).sum()
            self.sums += torch.stack((loss.detach() * len(targets), hits))
            fine = torch.isfinite(loss) | (self.bad_step >= 0)
            self.bad_step = torch.where(fine, self.bad_step, step)

    def _distillation_loss(
        self, teachers: Teachers, images: Tensor, logits: Tensor, step: int
    ) -> Tensor:
        recipe = self.recipe
        member = teachers.random_member(recipe.seed, step) if recipe.teacher_random else None
        probabilities = teachers.probabilities(images, recipe.teacher_temperature, member)
        return distillation_loss(logits, probabilities, recipe.teacher_temperature)

    def weights(self) -> Mapping[str, Tensor]:
        """The weights to use: the EMA of the first decay where there is one."""
        return self.emas[0].tensors if self.emas else self.model.state_dict()

    def state(self) -> dict[str, Tensor]:
        """What resuming needs besides `weights`: momentum, and the raw weights beside an EMA.

        Where there are several EMAs, all of them.
        """
        state = {
            f"momentum.{name}": self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if self.optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
        }
        if self.emas:
            state |= {f"raw.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if len(self.emas) > 1:
            for i, ema in enumerate(self.emas):
                state |= {f"ema.{i}.{name}": tensor for name, tensor in ema.tensors.items()}
        return state

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """The inverse of `weights` and `state`."""
        self.model.load_state_dict(_part(state, "raw.") if self.emas else weights)
        for i, ema in enumerate(self.emas):
            ema.restore(_part(state, f"ema.{i}.") if len(self.emas) > 1 else weights)
        for name, parameter in self.model.named_parameters():
            momentum = state.get(f"momentum.{name}")
            if momentum is not None:
                # In the parameter's memory layout, or the next step would round differently.
                buffer = torch.empty_like(parameter).copy_(momentum)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
