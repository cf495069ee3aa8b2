"""Training steps: forward and backward pass, optimizer, schedule and EMA."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.custom import Custom
from resnet56.distillation import Teachers, distillation_loss
from resnet56.ema import EMA
from resnet56.kernels.cuda_graph import CUDAGraphs
from resnet56.optimizer import StateValues, make_optimizer, restore_state, state_of, trainable
from resnet56.recipe import Recipe
from resnet56.runtime import Precision, autocast


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate at `step`, which counts from 0: a warm-up, then the schedule."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    if recipe.schedule == "step":
        drops = sum(step >= epoch * steps_per_epoch for epoch in recipe.drop_epochs)
        return float(recipe.lr * recipe.drop_factor**drops)
    fraction = (step - warmup) / max(recipe.epochs * steps_per_epoch - warmup, 1)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * fraction))
    return recipe.lr * (1 - fraction)


class Trainer:
    """Performs training steps. Sums the loss and counts correct predictions on the device.

    Args:
        model: the model. Checkpoints contain its state.
        wrapped: the module to call in the forward pass: `model`, or a wrapper of `model` such as
            DistributedDataParallel.
        recipe: the recipe of the run.
        precision: precision of the forward and backward passes.
        teachers: teachers for distillation, or None.
        frozen: modules that stay in evaluation mode. Their parameters do not require gradients.
        custom: parts that replace built-in ones.
        cuda_graphs: run steps as CUDA graphs.

    Raises:
        UsageError: the function for the custom optimizer does not return a
            `torch.optim.Optimizer`, or the returned optimizer contains parameters that were not
            passed to the function.
        TrainingError: the custom optimizer raises an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        recipe: Recipe,
        precision: Precision,
        teachers: Teachers | None = None,
        *,
        frozen: Sequence[nn.Module] = (),
        custom: Custom | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.custom = custom or Custom()
        self.teachers = teachers
        self.frozen = frozen
        self.model = model
        self.wrapped = wrapped
        self.recipe = recipe
        self.precision = precision
        self.device = next(model.parameters()).device
        if self.custom.optimizer is None:
            self.optimizer = make_optimizer(model, recipe)
        else:
            self.optimizer = self.custom.make_optimizer(trainable(model), recipe.lr)
        # The schedule scales the learning rate of each group.
        self.lr_scales = [
            float(group["lr"]) / recipe.lr if "lr" in group else None
            for group in self.optimizer.param_groups
        ]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.emas = [EMA(model, decay) for decay in recipe.ema_decay]
        # MPS does not support float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=dtype, device=self.device)
        # Number of the first step whose loss is not finite, or -1 if all losses are finite.
        self.first_nonfinite_step = torch.tensor(-1, device=self.device)
        self.graphs = CUDAGraphs(self._run_step, self.device) if cuda_graphs else None

    def train_mode(self) -> None:
        """Set the model to training mode, except for its frozen modules."""
        self.model.train()
        for module in self.frozen:
            module.eval()

    def reset_sums(self, loss_sum: float = 0.0, correct: float = 0.0) -> None:
        """Reset the sums at the start of an epoch, or restore the sums of an interrupted epoch."""
        self.sums.copy_(torch.tensor([loss_sum, correct], dtype=self.sums.dtype))

    def step(self, images: Tensor, targets: Tensor, lr: float, step: int) -> None:
        """Perform one training step.

        The step adds the loss and the number of correct predictions to `sums`, without waiting for
        the device. If the targets are probabilities, the step adds the target probabilities of the
        predicted classes instead of the number of correct predictions.

        Args:
            images: (B, 3, S, S), normalized.
            targets: int64 labels (B,), or float32 probabilities (B, C).
            lr: learning rate.
            step: step number, which counts from 0 over all epochs.
        """
        member = None
        if self.teachers is not None and self.recipe.teacher_random:
            member = self.teachers.random_member(self.recipe.seed, step)
        values = [0.0 if scale is None else lr * scale for scale in self.lr_scales]
        values += [1 - ema.decay_at(step) for ema in self.emas]
        if self.graphs is None:
            self._run_step(images, targets, values, step, member)
        else:
            self.graphs(images, targets, torch.tensor(values), torch.tensor(step), variant=member)

    def _run_step(
        self,
        images: Tensor,
        targets: Tensor,
        values: Sequence[float] | Tensor,
        step: int | Tensor,
        member: int | None,
    ) -> None:
        """Perform a training step. All tensors that outlive the step are changed in place.

        Args:
            images: as for `step`.
            targets: as for `step`.
            values: the learning rate of each parameter group, and the weight of the model in each
                EMA.
            step: step number.
            member: index of the teacher, or None for all teachers.
        """
        groups = self.optimizer.param_groups
        for i, scale in enumerate(self.lr_scales):
            if scale is not None:
                groups[i]["lr"] = values[i]
        with self.custom.reported("model"), autocast(self.device, self.precision):
            logits = self.wrapped(images)
        logits = logits.float()
        if self.custom.loss is not None:
            loss = self.custom.compute_loss(logits, targets)
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        if self.teachers is not None:
            weight = self.recipe.teacher_weight
            distilled = self._distillation_loss(self.teachers, images, logits, member)
            loss = distilled if weight == 1 else (1 - weight) * loss + weight * distilled
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        with self.custom.reported("optimizer"):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        tensors = self.model.state_dict() if self.emas else {}
        for i, ema in enumerate(self.emas, start=len(groups)):
            ema.update(tensors, values[i])
        with torch.no_grad():
            predicted = logits.argmax(dim=1)
            if targets.is_floating_point():
                correct = targets.gather(1, predicted[:, None]).clamp(max=1).sum()
            else:
                correct = (predicted == targets).sum()
            self.sums += torch.stack((loss.detach() * len(targets), correct))
            valid = torch.isfinite(loss) | (self.first_nonfinite_step >= 0)
            self.first_nonfinite_step.copy_(torch.where(valid, self.first_nonfinite_step, step))

    def _distillation_loss(
        self, teachers: Teachers, images: Tensor, logits: Tensor, member: int | None
    ) -> Tensor:
        temperature = self.recipe.teacher_temperature
        probabilities = teachers.probabilities(images, temperature, member)
        return distillation_loss(logits, probabilities, temperature)

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights of the first EMA. Without an EMA, return the model's weights."""
        return self.emas[0].tensors if self.emas else self.model.state_dict()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors needed to resume training, in addition to `weights`.

        The result contains the state of the optimizer. With an EMA, it also contains the weights of
        the model. With several EMAs, it also contains the weights of each EMA.
        """
        with self.custom.reported("optimizer"):
            state, _ = state_of(self.model, self.optimizer)
        if self.emas:
            state |= {f"raw.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if len(self.emas) > 1:
            for i, ema in enumerate(self.emas):
                state |= {f"ema.{i}.{name}": tensor for name, tensor in ema.tensors.items()}
        return state

    def optimizer_values(self) -> StateValues:
        """Return the non-tensor state of the optimizer, as JSON values."""
        return state_of(self.model, self.optimizer)[1]

    def restore(
        self,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        values: StateValues | None = None,
    ) -> None:
        """Restore the state that `weights`, `state` and `optimizer_values` returned.

        The built-in optimizers do not need `values`.
        """
        self.model.load_state_dict(_with_prefix(state, "raw.") if self.emas else weights)
        for i, ema in enumerate(self.emas):
            ema.restore(_with_prefix(state, f"ema.{i}.") if len(self.emas) > 1 else weights)
        restore_state(self.model, self.optimizer, state, values)


def _with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors whose names start with `prefix`, and remove the prefix."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
