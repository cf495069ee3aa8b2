"""A recipe in words: what a table of its fields does not show at a glance."""

from itertools import groupby

from resnet56.recipe import Recipe
from resnet56.report.words import listed, plural

TIMES = "\N{MULTIPLICATION SIGN}"


def schedule(recipe: Recipe) -> str:
    """How the learning rate goes, in a sentence."""
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


def augmentation(recipe: Recipe, *, mirrors: bool) -> str:
    """What happens to a training image before the network sees it, in a sentence."""
    steps = []
    if recipe.trivial_augment:
        steps.append("changed in place or colour, in one of fourteen ways (TrivialAugment)")
    if recipe.padding:
        steps.append(
            f"padded with {plural(recipe.padding, 'black pixel')} on each side and cropped to "
            f"32 {TIMES} 32 at a random place"
        )
    if mirrors:
        when = "in every other epoch" if recipe.alternate_flip else "half of the time"
        steps.append(f"mirrored left to right {when}")
    if recipe.cutout:
        steps.append(
            f"covered by a {recipe.cutout} {TIMES} {recipe.cutout} square of the mean colour at a "
            "random place (Cutout)"
        )
    if steps:
        sentence = f"In training, every image is {listed(steps)}, anew in each epoch."
    else:
        sentence = "Training images are not augmented."
    sentence = " ".join([sentence, *_mixing(recipe)])
    runs = [(size, len(list(epochs))) for size, epochs in groupby(recipe.sizes) if size != 32]
    if not runs:
        return sentence
    shrunk = [f"to {size} {TIMES} {size} for {plural(epochs, 'epoch')}" for size, epochs in runs]
    return f"{sentence} In the beginning it is shrunk: {listed(shrunk)}."


MIXED = {
    "cutmix": "a random rectangle of each image is replaced by that of another image (CutMix)",
    "mixup": "each image is blended with another image (mixup)",
    "ricap": "each image is composed of random crops of four images (RICAP), instead of a padded "
    "crop",
}


def _mixing(recipe: Recipe) -> list[str]:
    """How images are mixed, and when they no longer are, in sentences."""
    sentences = []
    if recipe.mix != "none":
        share = f"{100 * recipe.mix_probability:g} % of" if recipe.mix_probability < 1 else "all"
        without = ", without Cutout" if recipe.cutout else ""
        sentences.append(
            f"In {share} batches, {MIXED[recipe.mix]}{without}; the shares follow a beta "
            f"distribution with \N{GREEK SMALL LETTER ALPHA} = {recipe.mix_alpha:g}, and the "
            "targets are probabilities in the same shares. Training accuracy then counts the "
            "share of the predicted class."
        )
    if recipe.plain_tail and (recipe.mix != "none" or recipe.cutout or recipe.trivial_augment):
        sentences.append(
            f"In the last {_epochs(recipe.plain_tail)} there are only crops and flips."
        )
    return sentences


def is_augmented(recipe: Recipe, *, mirrors: bool) -> bool:
    """Whether training images are changed at random at all."""
    return bool(
        recipe.padding or mirrors or recipe.cutout or recipe.trivial_augment or recipe.mix != "none"
    )


def optimizer(recipe: Recipe) -> str:
    """Optimizer, momentum, decay and what else acts on the weights, in sentences."""
    momentum = f"momentum {recipe.momentum:g}" if recipe.momentum else "no momentum"
    if recipe.nesterov:
        momentum = f"Nesterov {momentum}"
    sentences = [
        f"Stochastic gradient descent with {momentum} in batches of "
        f"{plural(recipe.batch_size, 'image')}, for {plural(recipe.epochs, 'epoch')}."
    ]
    if recipe.weight_decay:
        spared = "" if recipe.decay_norm else ", batch norm and biases excepted"
        sentences.append(f"Weights decay with {recipe.weight_decay:g}{spared}.")
    if recipe.label_smoothing:
        sentences.append(f"Targets are smoothed by {recipe.label_smoothing:g}.")
    if recipe.ema_decay:
        sentences.append(
            f"The weights that count are a moving average over the steps (decay "
            f"{recipe.ema_decay:g})."
        )
    return " ".join(sentences)


def _epochs(number: float) -> str:
    return "epoch" if number == 1 else f"{number:g} epochs"
