"""The optimizer of a recipe, and the state of any optimizer in a checkpoint."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from resnet56.errors import TrainingError, one_line
from resnet56.recipe import Recipe

PREFIX = "optimizer."  # names of state tensors have the form optimizer.KEY.PARAMETER

# The values of the state that are not tensors. "groups" contains the settings of each parameter
# group. "state" maps the name of each parameter to its values.
StateValues = dict[str, Any]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe for the parameters that require gradients.

    Without `decay_norm`, weight decay does not apply to batch norm parameters and biases.
    """
    parameters = trainable(model)
    vector_decay = recipe.weight_decay if recipe.decay_norm else 0.0
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": vector_decay},
    ]
    # If the first fp16 step overflows, the fused SGD kernel does not initialize the buffers that it
    # creates. Buffers filled with zeros give the same first step as missing buffers. Resuming also
    # checks the saved state against these buffers.
    if recipe.optimizer == "adamw":
        adamw = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
        for parameter in parameters:
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return adamw
    sgd = torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True
    )
    if recipe.momentum:
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], StateValues]:
    """Return the state of an optimizer: its tensors by name, and all other values as JSON.

    Raises:
        TrainingError: the state contains unsupported objects, or parameters of another model.
    """
    tensors: dict[str, Tensor] = {}
    values: StateValues = {"groups": [], "state": {}}
    content = optimizer.state_dict()
    names = _names(model, optimizer)
    for index, entries in content["state"].items():
        for key, value in entries.items():
            if index not in names or not isinstance(key, str) or "." in key:
                raise _unsupported(optimizer, key)
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{key}.{names[index]}"] = value
            else:
                settings = values["state"].setdefault(names[index], {})
                settings[key] = _plain(value, optimizer, key)
    for group in content["param_groups"]:
        settings = {key: value for key, value in group.items() if key != "params"}
        values["groups"].append(
            {key: _plain(value, optimizer, key) for key, value in settings.items()}
        )
    return tensors, values


def restore_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    values: StateValues | None = None,
) -> None:
    """Restore the state that `state_of` returned. Ignore tensors whose names lack `PREFIX`.

    Args:
        model: the model that the optimizer trains.
        optimizer: a new optimizer with the same settings.
        tensors: tensors of a checkpoint.
        values: all other values of the state, or None if the state consists only of tensors.

    Raises:
        TrainingError: the state does not match the optimizer.
    """
    content = optimizer.state_dict()
    names = _names(model, optimizer)
    indices = {name: index for index, name in names.items()}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    try:
        for name, entries in values["state"].items() if values else ():
            state[indices[name]] = dict(entries)
        for name, value in tensors.items():
            if name.startswith(PREFIX):
                key, _, owner = name.removeprefix(PREFIX).partition(".")
                if value.shape == parameters[owner].shape:
                    # Keep the memory format of the parameter, because it affects rounding in the
                    # next step.
                    value = torch.empty_like(parameters[owner], dtype=value.dtype).copy_(value)
                state.setdefault(indices[owner], {})[key] = value
        for group, saved in zip(
            content["param_groups"], values["groups"] if values else (), strict=bool(values)
        ):
            for key, value in saved.items():
                is_tuple = isinstance(group.get(key), tuple)
                group[key] = tuple(value) if is_tuple else value
        optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"the saved state does not match the optimizer {type(optimizer).__name__}: "
            f"{one_line(error)}"
        ) from None


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Return a mapping from the indices of parameters in the state to their names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return {index: names[p] for index, p in enumerate(ordered) if p in names}


def _plain(value: Any, optimizer: torch.optim.Optimizer, key: object) -> Any:
    """Convert `value` to a JSON value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item, optimizer, key) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _unsupported(optimizer, key)


def _unsupported(optimizer: torch.optim.Optimizer, key: object) -> TrainingError:
    return TrainingError(
        f"the optimizer {type(optimizer).__name__} cannot be saved: checkpoints do not support the "
        f"entry {one_line(repr(key))} of its state"
    )
