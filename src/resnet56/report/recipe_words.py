"""Descriptions of a recipe in sentences."""

from itertools import groupby

from resnet56.recipe import Recipe
from resnet56.report.words import listed, plural

TIMES = "\N{MULTIPLICATION SIGN}"


def schedule(recipe: Recipe) -> str:
    """Describe the learning-rate schedule."""
    start = (
        f"The learning rate rises linearly to {recipe.lr:g} over the first "
        f"{_epochs(recipe.warmup_epochs)}, then "
        if recipe.warmup_epochs
        else f"The learning rate starts at {recipe.lr:g} and "
    )
    if recipe.schedule == "cosine":
        return f"{start}follows a cosine to zero at epoch {recipe.epochs}."
    if recipe.schedule == "one-cycle":
        return f"{start}falls linearly to zero at epoch {recipe.epochs}."
    drops = [f"{epoch:g}" for epoch in recipe.drop_epochs if epoch < recipe.epochs]
    if not drops:
        return f"{start}stays constant."
    word = "epoch" if len(drops) == 1 else "epochs"
    return f"{start}is multiplied by {recipe.drop_factor:g} after {word} {listed(drops)}."


def augmentation(recipe: Recipe, *, flips: bool) -> str:
    """Describe the augmentation of training images."""
    steps = []
    if recipe.trivial_augment:
        steps.append(
            "transformed by one of fourteen operations on geometry or color (TrivialAugment)"
        )
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
            f"covered by a {recipe.cutout} {TIMES} {recipe.cutout} square of the mean color at a "
            "random position (Cutout)"
        )
    if steps:
        sentence = f"In each epoch, every training image is {listed(steps)}."
    else:
        sentence = "Training images are not augmented."
    sentence = " ".join([sentence, *_mixing(recipe)])
    runs = [(size, len(list(epochs))) for size, epochs in groupby(recipe.sizes) if size != 32]
    if not runs:
        return sentence
    downscaled = [
        f"to {size} {TIMES} {size} for {plural(epochs, 'epoch')}" for size, epochs in runs
    ]
    return f"{sentence} At first, images are downscaled {listed(downscaled)}."


MIX_EFFECTS = {
    "cutmix": "a random rectangle of each image is replaced by that of another image (CutMix)",
    "mixup": "each image is blended with another image (mixup)",
    "ricap": "each image is composed of random crops of four images (RICAP), instead of a padded "
    "crop",
}


def _mixing(recipe: Recipe) -> list[str]:
    """Describe how images are mixed and when mixing ends."""
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
    if recipe.weak_augmentation_epochs and (
        recipe.mix != "none" or recipe.cutout or recipe.trivial_augment
    ):
        epochs = _epochs(recipe.weak_augmentation_epochs)
        sentences.append(f"In the last {epochs}, augmentation is limited to crops and flips.")
    return sentences


def is_augmented(recipe: Recipe, *, flips: bool) -> bool:
    """Whether training images are augmented at all."""
    return bool(
        recipe.padding or flips or recipe.cutout or recipe.trivial_augment or recipe.mix != "none"
    )


def optimizer(recipe: Recipe) -> str:
    """Describe the optimizer, weight decay, label smoothing and EMA."""
    momentum = f"momentum {recipe.momentum:g}" if recipe.momentum else "no momentum"
    if recipe.nesterov:
        momentum = f"Nesterov {momentum}"
    sentences = [
        f"The network is trained by stochastic gradient descent with {momentum} and a batch size "
        f"of {recipe.batch_size:,}, for {plural(recipe.epochs, 'epoch')}."
    ]
    if recipe.weight_decay:
        exempt = "" if recipe.decay_norm else ", not applied to batch norm and biases"
        sentences.append(f"Weight decay is {recipe.weight_decay:g}{exempt}.")
    if recipe.label_smoothing:
        sentences.append(f"Label smoothing is {recipe.label_smoothing:g}.")
    if recipe.teacher:
        teachers = (
            "a trained network"
            if len(recipe.teacher) == 1
            else (f"an ensemble of {len(recipe.teacher)} trained networks")
        )
        one = ", one random member per step" if recipe.teacher_random else ""
        rest = (
            f" with weight {recipe.teacher_weight:g} beside the labels"
            if recipe.teacher_weight < 1
            else " instead of the labels"
        )
        sentences.append(
            f"The network is distilled from {teachers}{one}: it learns their probabilities on the "
            f"same augmented images at temperature {recipe.teacher_temperature:g}{rest}."
        )
    if recipe.ema_decay:
        decays = listed([f"{decay:g}" for decay in recipe.ema_decay])
        word = "decay" if len(recipe.ema_decay) == 1 else "decays"
        chosen = (
            "; the best of them on the validation images is used"
            if len(recipe.ema_decay) > 1
            else ""
        )
        sentences.append(
            "The final weights are an exponential moving average over the steps "
            f"({word} {decays}){chosen}."
        )
    return " ".join(sentences)


def _epochs(number: float) -> str:
    return "epoch" if number == 1 else f"{number:g} epochs"
