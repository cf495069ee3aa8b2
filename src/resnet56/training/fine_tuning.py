"""Start from trained weights, and freeze layers."""

from collections.abc import Sequence

from torch import nn

from resnet56.distillation import fingerprint
from resnet56.errors import UsageError, one_line, option
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import Checkpoint, ModelConfig, require_fit
from resnet56.runs.schema import InitialWeights

BODY = "body"  # name for all modules except the classifier
CLASSIFIER = "fc"


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, recipe: Recipe, config: ModelConfig
) -> InitialWeights:
    """Load the weights of a checkpoint, except those of the classifier if the classes differ.

    Args:
        model: the model to train, with random weights.
        checkpoint: the checkpoint that the `weights` field of the recipe specifies.
        recipe: the training configuration.
        config: architecture and classes of the model.

    Returns:
        The entry for environment.json.

    Raises:
        UsageError: the checkpoint has a different architecture.
        RunError: the weights do not match the model.
    """
    arch = checkpoint.config.arch
    if arch != config.arch:
        custom = "model" in checkpoint.metadata.get("custom", {})
        remedy = f"pass model={arch}" if custom else f"set {option('arch', arch)}"
        raise UsageError(
            f"the weights of {recipe.weights} belong to {arch}, but the run trains {config.arch}; "
            f"{remedy} or choose other {option('weights')}"
        )
    new_classifier = checkpoint.config.classes != config.classes
    kept = {
        name: tensor
        for name, tensor in checkpoint.model.items()
        if not (new_classifier and name.startswith(f"{CLASSIFIER}."))
    }
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (new_classifier and name.startswith(f"{CLASSIFIER}."))
    }
    require_fit(kept, expected, f"the weights of {recipe.weights} do not match {config.arch}")
    model.load_state_dict(kept, strict=False)
    return {
        "weights": recipe.weights,
        "arch": arch,
        "sha256": fingerprint(checkpoint),
        "new_classifier": new_classifier,
    }


def freeze(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Disable gradients for the parameters of the given modules.

    Args:
        model: the model to train.
        names: names of modules, such as "stage1" or "stage3.0", or "body".

    Returns:
        The frozen modules.

    Raises:
        UsageError: a module does not exist, or no layer remains to train.
    """
    children = [name for name, _ in model.named_children()]
    frozen: list[nn.Module] = []
    for name in names:
        if name == BODY and CLASSIFIER in children:
            frozen += [model.get_submodule(child) for child in children if child != CLASSIFIER]
            continue
        try:
            frozen.append(model.get_submodule(name))
        except AttributeError:
            choices = [*children, BODY] if CLASSIFIER in children else children
            raise UsageError(
                f"{option('freeze')}: the network has no layer {one_line(repr(name))}; choose "
                f"{', '.join(choices[:10])} or a part of one, such as {_example(model)}"
            ) from None
    for module in frozen:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f"{option('freeze')} {' '.join(names)} leaves no layer to train; freeze fewer layers"
        )
    return frozen


def _example(model: nn.Module) -> str:
    """Return the name of a nested module as an example for the user."""
    nested = [name for name, _ in model.named_modules() if "." in name]
    return nested[0] if nested else "stage3.0"
