"""Content of the slides about one run, for the template.

Slides are read from a distance, so their text is limited to short sentences about the results of
the run, and a slide shows at most a dozen bars, images or classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resnet56.recipe import Recipe
from resnet56.report import charts, images, statements, story
from resnet56.report.images import Augmented
from resnet56.report.plots import Chart, shortened
from resnet56.report.read import RunFacts
from resnet56.report.recipe_words import MIX_NAMES, NONE, Custom
from resnet56.report.words import big, count, listed, percent, plural, points, quoted
from resnet56.runs.schema import ConfusedPair, Evaluation, Metrics

MAX_CELLS = 12  # maximum number of classes for a slide with a confusion matrix
MAX_BARS = 10
MAX_PAIRS = 7
MAX_ORIGINALS, MAX_VERSIONS = 5, 5
MAX_MISTAKES = 12
MAX_DROPS = 4  # maximum number of learning-rate drops to list
MAX_COMMAND = 100  # maximum number of characters of a command on a slide
CHART_SIZE = (3.3, 1.95)  # in inches. The text is larger relative to the chart than in the report.

SIZE = "32 \N{MULTIPLICATION SIGN} 32"
UNTESTED = "There are no test results yet"


@dataclass(frozen=True)
class Slide:
    """The text of a slide."""

    id: str
    name: str  # topic above the title
    title: str
    sentences: Sequence[str] = ()


@dataclass(frozen=True)
class Bar:
    """A labeled horizontal bar."""

    label: str
    value: str
    share: float  # fraction of the full length
    interval: tuple[float, float] | None = None  # confidence interval, as fractions


def content(facts: RunFacts) -> dict[str, Any]:
    """Return the content of the ten slides about a run."""
    test = facts.test
    few = len(facts.classes) <= MAX_CELLS
    originals = images.originals(facts)
    return {
        "facts": facts,
        "slides": slides(facts),
        "name": shortened(facts.name),
        "charts": training_charts(facts),
        "strip": [image for image, _ in originals],
        "originals": few_versions(originals) if facts.augmented else originals,
        "validated": last_validated(facts),
        "class_bars": class_bars(test) if test else [],
        "all_bars": test is None or len(story.scores(test["per_class"], "recall")) <= MAX_BARS,
        "confusion": charts.confusion_table(facts) if few else None,
        "pair_bars": pair_bars(test) if test else [],
        "mistakes": images.mistakes(facts)[:MAX_MISTAKES],
        "wrong": story.mistakes(test) if test else None,
        "split_bars": split_bars(facts),
        "command": command(facts),
    }


def slides(facts: RunFacts) -> list[Slide]:
    """Return the text of the slides, in order."""
    network = (
        [custom_model(facts)] if "model" in facts.custom else [idea(facts), architecture(facts)]
    )
    return [
        opening(facts),
        *network,
        data(facts),
        training(facts),
        results(facts),
        confusion(facts),
        mistakes(facts),
        overfitting(facts),
        takeaways(facts),
    ]


def opening(facts: RunFacts) -> Slide:
    """Return the slide on the main result, the data and the training run."""
    sentences = [f"{facts.source}."] if facts.source else []
    machine = statements.machine(facts.environment)
    if facts.rows:
        on = f" on {machine}" if machine else ""
        epochs = plural(facts.progress.epoch, "epoch")
        sentences.append(f"Trained for {epochs} in {time_taken(facts.seconds)}{on}.")
    return Slide("title", facts.name, headline(facts), sentences)


def headline(facts: RunFacts) -> str:
    """Return the title of the deck."""
    arch, validated = statements.network_name(facts), last_validated(facts)
    if facts.test is None and validated:
        return (
            f"{arch} reaches {percent(validated['val_accuracy'])} validation accuracy after "
            f"{plural(validated['epoch'], 'epoch')}"
        )
    return statements.title(facts)


def idea(facts: RunFacts) -> Slide:
    """Return the slide on residual blocks, or on plain blocks."""
    network, arch = facts.description, statements.network_name(facts)
    blocks = plural(sum(part.blocks for part in network.parts), "block")
    size = f"{arch} has {blocks} of {network.layers_per_block} layers."
    if network.shortcut == "none":
        title = "A plain network: no block has a shortcut"
        sentences = [size, f"Every signal passes through all {network.depth} layers."]
    else:
        title = "Each block adds its input to its output"
        sentences = [
            size,
            "The layers of a block compute a residual, and the shortcut adds the input to it.",
            "Signals and gradients therefore have a short path through all "
            f"{network.depth} layers.",
        ]
    return Slide("idea", "Idea", title, sentences)


def custom_model(facts: RunFacts) -> Slide:
    """Return the slide on a custom model, whose layers are not recorded."""
    title = f"A custom model with {count(facts.description.parameters)} parameters"
    return Slide("custom-model", "Architecture", title, [f"Its name is {facts.config.arch}."])


def architecture(facts: RunFacts) -> Slide:
    """Return the slide on the size of the network."""
    network = facts.description
    title = f"From {SIZE} pixels to {len(facts.classes):,} classes in {network.depth} layers"
    sentences = [
        f"{count(network.parameters)} parameters, {big(network.macs)} multiply-accumulates per "
        "image.",
        "Stages 2 and 3 halve the resolution and double the number of channels.",
    ]
    return Slide("architecture", "Architecture", title, sentences)


def data(facts: RunFacts) -> Slide:
    """Return the slide on the images, the classes and the augmentation."""
    splits = evaluated_splits(facts.evaluation)
    classes = plural(len(facts.classes), "class", "classes")
    numbers = [f"{count(metrics['n'])} {name}" for name, metrics in splits.items()]
    title = f"{listed(numbers)} images in {classes}" if numbers else f"Images in {classes}"
    sentences = [f"The images have {SIZE} pixels and are normalized per channel."]
    if facts.recipe:
        sentences.append(augmentation(facts.recipe, flips=facts.flips, custom=facts.custom))
    return Slide("data", "Data", title, sentences)


def augmentation(recipe: Recipe, *, flips: bool, custom: Custom = NONE) -> str:
    """Name the operations that augment training images."""
    if "augment" in custom:
        recipe = replace(recipe, trivial_augment=False, padding=0, cutout=0)
        flips = False
    names = [
        *([custom["augment"]["name"]] if "augment" in custom else []),
        *(["TrivialAugment"] if recipe.trivial_augment else []),
        *(["random crops"] if recipe.padding else []),
        *(["horizontal flips"] if flips else []),
        *(["Cutout"] if recipe.cutout else []),
        *([MIX_NAMES[recipe.mix]] if recipe.mix != "none" else []),
    ]
    if not names:
        return "Training images are not augmented."
    return f"Training images are augmented with {listed(names)}; test images are not."


def training(facts: RunFacts) -> Slide:
    """Return the slide on the training time, the optimizer and the schedule."""
    sentences = (
        [optimizer(facts.recipe, facts.custom), schedule(facts.recipe)] if facts.recipe else []
    )
    if facts.rows:
        title = f"{plural(facts.rows[-1]['epoch'], 'epoch')} in {time_taken(facts.seconds)}"
    elif facts.recipe and not facts.stored:
        title = f"{plural(facts.recipe.epochs, 'epoch')}"
    else:
        title = "No training curves"
        file = facts.metadata.get("file")
        imported = f"The weights were imported from {shortened(file)}." if file else None
        sentences = [imported or statements.no_curves(facts)]
    return Slide("training", "Training", title, sentences)


def optimizer(recipe: Recipe, custom: Custom = NONE) -> str:
    """Describe the optimizer in a few words."""
    replaced = "optimizer" in custom
    decay = f"weight decay {recipe.weight_decay:g}"
    momentum = f"{'Nesterov ' if recipe.nesterov else ''}momentum {recipe.momentum:g}"
    is_sgd = recipe.optimizer == "sgd" and not replaced
    settings = [
        *([momentum] if recipe.momentum and is_sgd else []),
        f"batch size {count(recipe.batch_size)}",
        *([decay] if recipe.weight_decay and not replaced else []),
        *(["a custom loss"] if "loss" in custom else []),
        *(["distillation"] if recipe.teacher else []),
        *(["EMA"] if recipe.ema_decay else []),
        *(["pretrained weights"] if recipe.weights else []),
        *(["frozen layers"] if recipe.freeze else []),
    ]
    name = custom["optimizer"]["name"] if replaced else "SGD" if is_sgd else "AdamW"
    return f"Optimizer: {name} with {listed(settings)}."


def schedule(recipe: Recipe) -> str:
    """Describe the learning-rate schedule in a few words."""
    start = f"{recipe.lr:g}"
    if recipe.warmup_epochs:
        word = "epoch" if recipe.warmup_epochs == 1 else "epochs"
        start = f"warm-up to {start} over {recipe.warmup_epochs:g} {word}"
    drops = [f"{epoch:g}" for epoch in recipe.drop_epochs if epoch < recipe.epochs]
    if recipe.schedule == "cosine":
        rest = "then cosine decay to zero"
    elif recipe.schedule == "one-cycle":
        rest = "then linear decay to zero"
    elif not drops:
        rest = "then constant" if recipe.warmup_epochs else "constant"
    elif len(drops) > MAX_DROPS:
        rest = f"multiplied {len(drops)} times by {recipe.drop_factor:g}"
    else:
        word = "epoch" if len(drops) == 1 else "epochs"
        rest = f"multiplied by {recipe.drop_factor:g} after {word} {listed(drops)}"
    return f"Learning rate: {start}, {rest}."


def results(facts: RunFacts) -> Slide:
    """Return the slide on the test accuracy, its interval, and the accuracies of the classes."""
    test = facts.test
    if test is None:
        sentences = (
            statements.state(facts) if facts.recipe else ["The test images have not been used."]
        )
        return Slide("results", "Results", UNTESTED, sentences)
    low, high = test["accuracy_interval"]
    right = test["n"] - story.mistakes(test)
    title = f"{count(right)} of {count(test['n'])} test images are classified correctly"
    sentences = [
        f"The 95 % confidence interval is {percent(low)} to {percent(high)}.",
        *(story.against_chance(test) or class_range(test)),
    ]
    return Slide("results", "Results", title, sentences)


def class_range(test: Metrics) -> list[str]:
    """State the lowest and the highest class accuracy."""
    recalls = story.scores(test["per_class"], "recall")
    low, high = min(recalls.values()), max(recalls.values())
    if low == high:
        return [f"All {len(recalls)} classes have the same accuracy."] if len(recalls) > 1 else []
    return [
        f"Accuracy per class ranges from {percent(low)} ({classes_with(recalls, low)}) to "
        f"{percent(high)} ({classes_with(recalls, high)})."
    ]


def classes_with(values: Mapping[str, float], value: float) -> str:
    """Return the name of the class with this value.

    If several classes have this value, return the number of these classes instead.
    """
    names = [name for name, other in values.items() if other == value]
    return quoted(shortened(names[0])) if len(names) == 1 else f"{len(names)} classes"


def confusion(facts: RunFacts) -> Slide:
    """Return the slide on the most frequent error."""
    test = facts.test
    if test is None:
        return Slide("confusion", "Confusion matrix", UNTESTED)
    errors = test["most_confused"]
    if not errors:
        return Slide("confusion", "Confusion matrix", "No classes are confused")
    first = errors[0]
    affected, part = plural(first["count"], "image"), percent(first["fraction"])
    sentences = [
        f"This error affects {affected}, {part} of the class.",
        *story.reverse_error(errors),
    ]
    return Slide("confusion", "Confusion matrix", most_frequent_error(errors), sentences)


def most_frequent_error(errors: Sequence[ConfusedPair]) -> str:
    """Name the two classes of the most frequent error.

    If several errors are equally frequent, the result names the classes of the first of them.
    """
    first = errors[0]
    subject = "One of the most frequent errors" if story.is_tied(errors) else "Most frequent error"
    true, predicted = (quoted(shortened(first[key])) for key in ("true", "predicted"))
    return f"{subject}: {true} classified as {predicted}"


def mistakes(facts: RunFacts) -> Slide:
    """Return the slide on the number of mistakes."""
    test = facts.test
    if test is None:
        return Slide("mistakes", "Mistakes", UNTESTED)
    number = story.mistakes(test)
    if not number:
        title = f"No mistakes on {plural(test['n'], 'test image')}"
        return Slide("mistakes", "Mistakes", title)
    verb = "is" if number == 1 else "are"
    title = f"{count(number)} of {plural(test['n'], 'test image')} {verb} misclassified"
    shown = min(len(facts.samples.mistakes), MAX_MISTAKES) if facts.samples else 0
    sentences = []
    if shown:
        subject = "The mistake" if shown == 1 else f"The {shown} most confident mistakes"
        sentences = [f"{subject}: predicted class, true class, and confidence."]
    return Slide("mistakes", "Mistakes", title, sentences)


def overfitting(facts: RunFacts) -> Slide:
    """Return the slide that compares training accuracy and test accuracy."""
    title, sentences = UNTESTED, []
    validated = last_validated(facts)
    if facts.test:
        title = "The training accuracy was not measured"
        if gap := statements.gap(facts):
            title, sentences = gap_in_brief(gap), [capitalized(gap.details)]
    elif validated:
        difference = validated["train_accuracy"] - validated["val_accuracy"]
        title = (
            f"Training accuracy is {points(difference)} above validation accuracy"
            if difference >= 0
            else f"Validation accuracy is {points(-difference)} above training accuracy"
        )
        sentences = [
            f"After epoch {validated['epoch']}. Training accuracy is a running average over "
            "augmented images."
        ]
    return Slide("overfitting", "Overfitting", title, sentences)


def gap_in_brief(gap: story.Gap) -> str:
    """State how training accuracy compares with test accuracy, and by how much they differ."""
    numbers = (
        f"a gap of {points(gap.difference)}"
        if gap.difference >= 0
        else f"test accuracy is {points(-gap.difference)} higher"
    )
    return f"{capitalized(gap.verdict.removeprefix('There is '))}: {numbers}"


def capitalized(text: str) -> str:
    """Return `text` with its first letter capitalized."""
    return text[:1].upper() + text[1:]


def takeaways(facts: RunFacts) -> Slide:
    """Return the slide that states each result in one sentence."""
    test = facts.test
    sentences = statements.state(facts) if facts.recipe else []
    parameters = f"{count(facts.description.parameters)} parameters"
    validated = last_validated(facts)
    if test is None and validated:
        accuracy = percent(validated["val_accuracy"])
        sentences.append(f"Validation accuracy after epoch {validated['epoch']}: {accuracy}.")
    if test is None:
        title = f"{statements.network_name(facts)} with {parameters}"
        return Slide("takeaways", "Takeaways", title, sentences or ["The network was not tested."])
    title = f"{percent(test['accuracy'])} test accuracy with {parameters}"
    low, high = test["accuracy_interval"]
    sentences.append(f"The 95 % confidence interval is {percent(low)} to {percent(high)}.")
    if gap := statements.gap(facts):
        sentences.append(f"{gap_in_brief(gap)}.")
    if test["most_confused"]:
        sentences.append(f"{most_frequent_error(test['most_confused'])}.")
    sentences.append(confidence(test))
    if facts.robustness:
        mean = percent(facts.robustness["mean_accuracy"])
        sentences.append(f"Mean accuracy on corrupted images: {mean}.")
    return Slide("takeaways", "Takeaways", title, sentences)


def confidence(test: Metrics) -> str:
    """State in a few words whether the network is overconfident."""
    mean = story.mean_confidence(test["calibration"]["bins"])
    low, high = test["accuracy_interval"]
    difference = mean - test["accuracy"]
    if low <= mean <= high:
        return f"Confidence matches accuracy: {percent(mean)} on average."
    word = "Overconfident" if difference > 0 else "Underconfident"
    return f"{word} by {points(abs(difference))}."


def training_charts(facts: RunFacts) -> list[Chart]:
    """Plot loss and accuracy over epochs."""
    return [replace(chart, size=CHART_SIZE) for chart in charts.training_charts(facts)[:2]]


def few_versions(originals: Sequence[Augmented]) -> list[Augmented]:
    """Return the first training images, and the first augmented versions of each."""
    return [(image, versions[:MAX_VERSIONS]) for image, versions in originals[:MAX_ORIGINALS]]


def evaluated_splits(evaluation: Evaluation | None) -> dict[str, Metrics]:
    """Return the metrics for each evaluated split, keyed by the name of the split."""
    if evaluation is None:
        return {}
    splits = {"training": evaluation.get("train"), "validation": evaluation.get("validation")}
    return {name: m for name, m in splits.items() if m} | {"test": evaluation["test"]}


def split_bars(facts: RunFacts) -> list[Bar]:
    """Return a bar for the accuracy on each split."""
    bars = []
    for name, metrics in evaluated_splits(facts.evaluation).items():
        low, high = metrics["accuracy_interval"]
        accuracy = metrics["accuracy"]
        bars.append(Bar(name, percent(accuracy), accuracy, (low, high)))
    validated = last_validated(facts)
    if not bars and validated:
        for name, accuracy in (
            ("training", validated["train_accuracy"]),
            ("validation", validated["val_accuracy"]),
        ):
            bars.append(Bar(name, percent(accuracy), accuracy))
    return bars


def last_validated(facts: RunFacts) -> Mapping[str, Any] | None:
    """Return the row of the last epoch with validation metrics, or None."""
    return facts.validated[-1] if facts.validated else None


def class_bars(test: Metrics) -> list[Bar]:
    """Return class accuracies in descending order. With many classes, omit those in the middle."""
    ranked = sorted(story.scores(test["per_class"], "recall").items(), key=lambda item: -item[1])
    if len(ranked) > MAX_BARS:
        ranked = ranked[: MAX_BARS // 2] + ranked[-MAX_BARS // 2 :]
    return [Bar(shortened(name), percent(value), value) for name, value in ranked]


def pair_bars(test: Metrics) -> list[Bar]:
    """Return a bar for each of the most frequent errors."""
    errors = test["most_confused"][:MAX_PAIRS]
    most = max((pair["count"] for pair in errors), default=1)
    return [
        Bar(
            f"{shortened(pair['true'])} \N{RIGHTWARDS ARROW} {shortened(pair['predicted'])}",
            f"{count(pair['count'])} ({percent(pair['fraction'])})",
            pair["count"] / most,
        )
        for pair in errors
    ]


def time_taken(seconds: float) -> str:
    """Format a duration: 45 -> '45 s', 110 -> '1 min 50 s', 4500 -> '1 h 15 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{count(hours)} h {minutes} min"


def command(facts: RunFacts) -> str | None:
    """Return the command that started the run, if it fits on a slide."""
    text = facts.environment.get("command", "")
    return text if text.startswith("resnet56 ") and len(text) <= MAX_COMMAND else None
