"""Descriptions of a recipe, as sentences and as a list of the fields that apply."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from resnet56.recipe import Recipe
from resnet56.report.words import listed, plural
from resnet56.runs.schema import CustomPart

Custom = Mapping[str, CustomPart]  # custom parts that replace parts of the recipe
NONE: Custom = {}

# Fields of a recipe that have no effect if a custom part replaces the built-in one.
REPLACED = {
    "model": ("arch",),
    "optimizer": ("optimizer", "momentum", "nesterov", "weight_decay", "decay_norm"),
    "loss": ("label_smoothing",),
    "augment": ("padding", "flip", "alternate_flip", "cutout", "trivial_augment"),
}

TIMES = "\N{MULTIPLICATION SIGN}"


def schedule(recipe: Recipe) -> str:
    """Describe the learning-rate schedule."""
    if recipe.warmup_epochs >= recipe.epochs:
        return f"The learning rate rises linearly toward {recipe.lr:g} until the end of training."
    start = (
        f"The learning rate rises linearly to {recipe.lr:g} over the first "
        f"{_epochs(recipe.warmup_epochs)}, then"
        if recipe.warmup_epochs
        else f"The learning rate starts at {recipe.lr:g} and"
    )
    if recipe.schedule == "cosine":
        return f"{start} decays to zero at epoch {recipe.epochs} (cosine schedule)."
    if recipe.schedule == "one-cycle":
        return f"{start} decays linearly to zero at epoch {recipe.epochs}."
    drops = [f"{epoch:g}" for epoch in recipe.drop_epochs if epoch < recipe.epochs]
    if not drops:
        return f"{start} stays constant."
    word = "epoch" if len(drops) == 1 else "epochs"
    return f"{start} is multiplied by {recipe.drop_factor:g} after {word} {listed(drops)}."


def augmentation(recipe: Recipe, *, flips: bool, custom: Custom = NONE) -> str:
    """Describe the augmentation of training images."""
    if "augment" in custom:
        sentence = f"The custom function {custom['augment']['name']} augments training images."
        recipe = replace(recipe, cutout=0, trivial_augment=False)
        return " ".join([sentence, *_mixing(recipe), *_sizes(recipe)])
    steps = []
    if recipe.trivial_augment:
        steps.append("changed by a random geometric or color transform (TrivialAugment)")
    if recipe.padding:
        steps.append(
            f"padded with {plural(recipe.padding, 'black pixel')} on each side and cropped to "
            f"32 {TIMES} 32 at a random position"
        )
    if flips:
        when = "in every other epoch" if recipe.alternate_flip else "with probability 0.5"
        steps.append(f"flipped horizontally {when}")
    if recipe.cutout:
        steps.append(
            f"partly covered by a {recipe.cutout} {TIMES} {recipe.cutout} square of the mean color "
            "at a random position (Cutout)"
        )
    if steps:
        # Use a comma even for two steps, because a step can contain "and".
        joined = ", and ".join(part for part in (", ".join(steps[:-1]), steps[-1]) if part)
        sentence = f"Each training image is {joined}."
    elif recipe.mix == "none":
        sentence = "Training images are not augmented."
    else:
        sentence = ""
    return " ".join(filter(None, [sentence, *_mixing(recipe), *_sizes(recipe)]))


MIX_NAMES = {"cutmix": "CutMix", "mixup": "mixup", "ricap": "RICAP"}
MIX_EFFECTS = {
    "cutmix": "a random rectangle of each image is replaced with the same rectangle of another "
    "image (CutMix)",
    "mixup": "each image is blended with another image (mixup)",
    "ricap": "each image is composed of random crops of four images (RICAP), instead of a padded "
    "crop",
}


def _mixing(recipe: Recipe) -> list[str]:
    """Describe how images are mixed and when augmentations end."""
    sentences = []
    if recipe.mix != "none":
        share = f"{100 * recipe.mix_probability:g} % of" if recipe.mix_probability < 1 else "all"
        without = ", without Cutout" if recipe.cutout else ""
        sentences.append(
            f"In {share} batches, {MIX_EFFECTS[recipe.mix]}{without}. The proportions follow a "
            f"beta distribution with \N{GREEK SMALL LETTER ALPHA} = {recipe.mix_alpha:g}, and the "
            "targets are mixed in the same proportions. Training accuracy is then the mean target "
            "probability of the predicted class."
        )
    if disabled := disabled_in_tail(recipe):
        names, verb = listed(disabled), "is" if len(disabled) == 1 else "are"
        epochs = _epochs(min(recipe.plain_tail, recipe.epochs))
        sentences.append(f"{names[0].upper()}{names[1:]} {verb} disabled in the last {epochs}.")
    return sentences


def disabled_in_tail(recipe: Recipe) -> list[str]:
    """Return the augmentations that the recipe disables in the last epochs."""
    used = (
        ("TrivialAugment", recipe.trivial_augment),
        ("Cutout", recipe.cutout),
        (MIX_NAMES.get(recipe.mix, ""), recipe.mix != "none"),
    )
    return [name for name, on in used if on] if recipe.plain_tail else []


def _sizes(recipe: Recipe) -> list[str]:
    """Describe the epochs with smaller images."""
    runs = [(size, len(list(epochs))) for size, epochs in groupby(recipe.sizes) if size != 32]
    if not runs:
        return []
    downscaled = [
        f"to {size} {TIMES} {size} for {plural(epochs, 'epoch')}" for size, epochs in runs
    ]
    return [f"At the start of training, images are downscaled {listed(downscaled)}."]


def fields(recipe: Recipe, *, flips: bool, custom: Custom = NONE) -> dict[str, Any]:
    """Return the fields that affect the run, excluding those of disabled options.

    Args:
        recipe: the recipe.
        flips: whether training images are flipped, which depends on the recipe and the data set.
        custom: custom parts that replace parts of the recipe.
    """
    return {
        name: value
        for name, value in recipe.to_json().items()
        if applies(recipe, name, custom) and not (name == "flip" and recipe.flip and not flips)
        if name not in OPTIONS or value not in (0, "none", "", [])  # 0 == False
    }


# Options that are disabled by 0, False, "none", an empty string or an empty list.
OPTIONS = (
    *("weights", "freeze"),
    *("nesterov", "warmup_epochs", "label_smoothing", "alternate_flip", "sizes", "cutout"),
    *("trivial_augment", "mix", "ema_decay", "teacher", "teacher_random", "val_size"),
)


def applies(recipe: Recipe, name: str, custom: Custom = NONE) -> bool:
    """Return whether a field has an effect, given the other fields and custom parts."""
    if any(name in REPLACED[kind] for kind in custom if kind in REPLACED):
        return False
    conditions = {
        "drop_epochs": recipe.schedule == "step",
        "drop_factor": recipe.schedule == "step"
        and any(epoch < recipe.epochs for epoch in recipe.drop_epochs),
        "momentum": recipe.optimizer == "sgd",
        "nesterov": recipe.optimizer == "sgd",
        "decay_norm": recipe.weight_decay > 0,
        "alternate_flip": recipe.flip,
        "mix_alpha": recipe.mix != "none",
        "mix_probability": recipe.mix != "none",
        "plain_tail": bool(disabled_in_tail(recipe)),
        "teacher_weight": bool(recipe.teacher),
        "teacher_temperature": bool(recipe.teacher),
        "teacher_random": len(recipe.teacher) > 1,
    }
    return conditions.get(name, True)


def is_augmented(recipe: Recipe, *, flips: bool) -> bool:
    """Return whether training images are augmented."""
    return bool(
        recipe.padding or flips or recipe.cutout or recipe.trivial_augment or recipe.mix != "none"
    )


def optimizer(recipe: Recipe, custom: Custom = NONE) -> str:
    """Describe the initial weights, the optimizer, weight decay, label smoothing and EMA."""
    momentum = f"momentum {recipe.momentum:g}, " if recipe.momentum else "no momentum, "
    if recipe.nesterov:
        momentum = f"Nesterov {momentum}"
    method = f"stochastic gradient descent ({momentum}"
    if recipe.optimizer == "adamw":
        method = "AdamW ("
    if "optimizer" in custom:
        method = f"the custom optimizer {custom['optimizer']['name']} ("
    sentences = [
        f"The network is trained with {method}batch size {recipe.batch_size:,}) for "
        f"{plural(recipe.epochs, 'epoch')}.",
        *_fine_tuning(recipe),
    ]
    if "loss" in custom:
        sentences.append(f"The loss is the custom function {custom['loss']['name']}.")
    if recipe.weight_decay and "optimizer" not in custom:
        exempt = "" if recipe.decay_norm else " and does not apply to batch norm or biases"
        sentences.append(f"The weight decay is {recipe.weight_decay:g}{exempt}.")
    if recipe.label_smoothing and "loss" not in custom:
        sentences.append(f"The label smoothing is {recipe.label_smoothing:g}.")
    if recipe.teacher:
        sentences.append(_distillation(recipe))
    if len(recipe.ema_decay) == 1:
        sentences.append(
            "The run uses an exponential moving average (EMA) of the weights, with a decay of "
            f"{recipe.ema_decay[0]:g} per step."
        )
    elif recipe.ema_decay:
        decays = listed([f"{decay:g}" for decay in recipe.ema_decay])
        sentences.append(
            f"The run keeps exponential moving averages (EMA) of the weights, with decays of "
            f"{decays} per step, and uses the one with the highest validation accuracy."
        )
    return " ".join(sentences)


def _fine_tuning(recipe: Recipe) -> list[str]:
    """Describe the initial weights and the frozen layers."""
    sentences = []
    if recipe.weights:
        sentences.append(f"Training starts from the weights of {recipe.weights}.")
    if "body" in recipe.freeze:
        sentences.append("Only the classifier is trained. All other layers are frozen.")
    elif recipe.freeze:
        layers = "layer" if len(recipe.freeze) == 1 else "layers"
        verb = "is" if len(recipe.freeze) == 1 else "are"
        sentences.append(f"The {layers} {listed(recipe.freeze)} {verb} frozen.")
    return sentences


def _distillation(recipe: Recipe) -> str:
    """Describe knowledge distillation."""
    teachers = (
        "a trained network"
        if len(recipe.teacher) == 1
        else f"an ensemble of {len(recipe.teacher)} trained networks"
    )
    random = (
        ", one random network per step" if recipe.teacher_random and len(recipe.teacher) > 1 else ""
    )
    labels = (
        "instead of the labels"
        if recipe.teacher_weight == 1
        else f"with weight {recipe.teacher_weight:g}, and the labels with weight "
        f"{1 - recipe.teacher_weight:g}"
    )
    return (
        f"The network learns to predict the class probabilities of {teachers} for the same "
        "augmented images (knowledge distillation at temperature "
        f"{recipe.teacher_temperature:g}{random}), {labels}."
    )


def _epochs(number: float) -> str:
    return "epoch" if number == 1 else f"{number:g} epochs"
