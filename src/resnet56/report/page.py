"""Content of the report on one run, for the templates."""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet56.data.cifar import OFFICIAL
from resnet56.report import plots, png, recipe_words, story, words
from resnet56.report.plots import Chart, Line
from resnet56.report.read import RunFacts
from resnet56.runs.schema import Evaluation

MAX_SAMPLES, MAX_VERSIONS, MAX_MISTAKES = 10, 8, 24  # numbers of images, to limit the file size
# Parts of the conclusion, in order. Most of them are empty for an untested run.
PARTS = (
    *("state", "result", "gap", "trend", "classes", "confusions", "confidence"),
    *("robustness", "hardware"),
)
MAX_CELLS = 150  # maximum number of classes for a confusion matrix as a table


@dataclass(frozen=True)
class EncodedImage:
    """A PNG image and its label."""

    name: str
    png: bytes
    label: str

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return plots.data_uri(self.png)


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image."""

    image: EncodedImage
    index: int
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Cell:
    """A cell of the confusion matrix: its count and its shade."""

    count: int
    shade: str  # "z" for a count of zero, "d1" to "d5" on the diagonal, "e1" to "e5" elsewhere
    label: str  # empty for a count of zero


def content(facts: RunFacts) -> dict[str, Any]:
    """Return the content of the report on one run."""
    return {
        "facts": facts,
        "title": title(facts),
        "arch": network_name(facts),
        "story": stories(facts),
        "sections": sections(facts),
        "evaluated": evaluated(facts.evaluation) if facts.evaluation else None,
        "conditions": conditions(facts.evaluation) if facts.evaluation else None,
        "training_charts": training_charts(facts),
        "means": means(facts),
        "reliability": reliability(facts),
        "robustness": robustness(facts),
        "confusion": confusion_table(facts) if len(facts.classes) <= MAX_CELLS else None,
        "confusion_chart": confusion_chart(facts),
        "originals": originals(facts),
        "samples_name": "Training images before and after augmentation"
        if facts.augmented
        else "Images of each class",
        "sheet": sample_sheet(facts),
        "mistakes": mistakes(facts),
        "recipe": recipe_table(facts),
        "system": system_table(facts.environment),
        "kept": kept_mistakes(facts),
        "recipe_note": "Disabled options and fields that do not apply are omitted."
        + (" The file recipe.json contains all fields." if facts.stored else ""),
        "unrecorded": unrecorded(facts),
        "no_curves": no_curves(facts),
        "curves_note": curves_note(facts),
        "normalization": normalization(facts),
        "machine": machine(facts.environment),
        "command": command(facts.environment),
    }


def network_name(facts: RunFacts) -> str:
    """Return the name of the network without its block type, such as 'ResNet-56' or 'Plain-56'."""
    if "model" in facts.custom:
        name = facts.config.arch.rpartition(".")[2]
        return name if name.isidentifier() else "The custom model"
    family = "Plain" if facts.description.shortcut == "none" else "ResNet"
    return f"{family}-{facts.description.depth}"


def title(facts: RunFacts) -> str:
    """Return the headline: the test result, or the state of the training run."""
    arch = network_name(facts)
    if facts.test:
        share, images = (
            words.percent(facts.test["accuracy"]),
            words.plural(facts.test["n"], "image"),
        )
        return f"{arch} reaches {share} test accuracy on {images}"
    if facts.recipe is None:
        return f"{arch}, not evaluated"
    if facts.rows:
        return f"{arch} after {words.plural(facts.progress.epoch, 'epoch')}, not yet tested"
    return f"{arch}, before the end of its first epoch"


def sections(facts: RunFacts) -> list[tuple[str, str]]:
    """Return the table of contents: the id and the name of each section."""
    meeting = [("meeting", "Meeting")] if facts.test else []
    return [
        *meeting,
        ("objective", "Objective"),
        ("architecture", "Architecture"),
        ("data", "Data"),
        ("configuration", "Configuration"),
        ("training", "Training"),
        ("testing", "Testing"),
        ("evaluation", "Evaluation"),
        ("parity", "Devices"),
        ("system", "System"),
        ("conclusion", "Conclusion"),
    ]


def evaluated(evaluation: Evaluation) -> str:
    """State which weights were evaluated, and how."""
    weights = "EMA" if evaluation["weights"] == "ema" else evaluation["weights"]
    decay = f" (decay {evaluation['ema_decay']:g})" if "ema_decay" in evaluation else ""
    epoch = (
        f" after epoch {evaluation['epoch']} (step {words.count(evaluation['step'])})"
        if evaluation["epoch"]
        else ""
    )
    return (
        f"The {weights} weights{decay}{epoch} were evaluated {conditions(evaluation)}. The images "
        "are normalized but not augmented."
    )


def conditions(evaluation: Evaluation) -> str:
    """State how a network was evaluated, such as 'in fp32 on the CPU'."""
    runtime = evaluation.get("runtime", evaluation["precision"])
    return f"in {runtime} on {device(evaluation['device'])}"


def device(name: str) -> str:
    """Return the name of a device for use in a sentence: 'the CPU', or a name like 'cuda:0'."""
    return "the CPU" if name == "cpu" else name


def unrecorded(facts: RunFacts) -> str | None:
    """State what is unknown about the training of a network without a recipe."""
    if facts.recipe:
        return None
    return story.unrecorded(facts.name, facts.metadata.get("file"), stored=facts.stored)


def no_curves(facts: RunFacts) -> str:
    """State why a network has no training curves."""
    if facts.recipe is None:
        return "The training curves are not recorded."
    if not facts.stored:
        return "The package includes the recipe of these weights, but not their training curves."
    return "No epoch is finished yet, so there are no curves."


def state(facts: RunFacts) -> list[str]:
    """State what is missing from the run, if anything."""
    if facts.recipe is not None:
        tested = facts.test is not None
        return story.unfinished(facts.progress.epoch, facts.recipe.epochs, tested=tested)
    return [] if facts.test else [story.unevaluated(str(facts.path))]


def stories(facts: RunFacts) -> dict[str, list[str]]:
    """Return the sentences for each section of the page."""
    test, train, recipe = facts.test, facts.train, facts.recipe
    names = (*PARTS, "meeting", "schedule", "optimizer", "augmentation")
    sentences: dict[str, list[str]] = {name: [] for name in names}
    sentences |= {"state": state(facts), "hardware": story.hardware(facts.comparisons)}
    if recipe:
        sentences |= {
            "trend": story.trend(facts.rows, recipe),
            "schedule": [recipe_words.schedule(recipe)],
            "optimizer": [recipe_words.optimizer(recipe, facts.custom)],
            "augmentation": [
                recipe_words.augmentation(recipe, flips=facts.flips, custom=facts.custom)
            ],
        }
    if test:
        interval = (test["accuracy_interval"][0], test["accuracy_interval"][1])
        robust = facts.evaluation.get("robustness") if facts.evaluation else None
        sentences |= {
            "result": [
                story.result(test),
                *story.against_chance(test),
            ],
            "gap": story.gap(
                train["accuracy"], test["accuracy"], interval, augmented=facts.training_augmented
            )
            if train
            else [],
            "classes": story.best_and_worst(test["per_class"]),
            "confusions": story.confusions(test["most_confused"]),
            "confidence": story.confidence(test["calibration"], test["accuracy"], interval),
            "robustness": story.robustness(robust),
            "meeting": story.meeting(
                network_name(facts),
                test,
                train,
                published=published_accuracy(facts),
                augmented=facts.training_augmented,
                finished=facts.finished,
            ),
        }
    sentences["takeaways"] = [sentence for part in PARTS for sentence in sentences[part]]
    return sentences


def published_accuracy(facts: RunFacts) -> float | None:
    """Return the test accuracy that the paper reports for this network and data, or None."""
    same_images = (facts.source or "").startswith(f"CIFAR-10 ({OFFICIAL})")
    return story.PUBLISHED.get(facts.config.arch) if same_images else None


def normalization(facts: RunFacts) -> str:
    """Name the images whose mean and standard deviation normalize the images of the run."""
    if facts.recipe is None:
        return "of the imported network"
    if facts.recipe.weights:
        return f"of {facts.recipe.weights}, the initial weights"
    return "of the training images"


def curves_note(facts: RunFacts) -> str:
    """Explain how the training curves were measured."""
    on = "augmented images" if facts.augmented else "images without augmentation"
    note = "Training loss and accuracy are averages over each epoch, measured while the weights "
    note += f"change, on {on}."
    if "loss" in facts.custom:
        note += " The training loss is the custom loss. Other losses are cross-entropy."
    if facts.test:
        note += " The dots show the results of the evaluated weights on the test images."
    return note


def loss_label(runs: Sequence[RunFacts]) -> str:
    """Return the label of the loss axis. Only the built-in training loss is cross-entropy."""
    return "loss" if any("loss" in facts.custom for facts in runs) else "cross-entropy, nats"


def training_charts(facts: RunFacts) -> list[Chart]:
    """Plot loss, accuracy, learning rate and throughput over the finished epochs, if any."""
    rows = facts.rows
    if not rows:
        return []
    last = rows[-1]
    ends = f"after epoch {last['epoch']}"
    validated = [row for row in rows if "val_accuracy" in row]
    losses, accuracies = (
        [_line("training", rows, "train_loss")],
        [_line("training", rows, "train_accuracy")],
    )
    loss_alt = f"Training loss {words.loss(rows[0]['train_loss'])} in epoch {rows[0]['epoch']}, "
    loss_alt += f"{words.loss(last['train_loss'])} in epoch {last['epoch']}."
    accuracy_alt = f"Training accuracy {words.percent(last['train_accuracy'])} {ends}."
    if validated:
        losses.append(_line("validation", validated, "val_loss"))
        accuracies.append(_line("validation", validated, "val_accuracy"))
        accuracy_alt += f" Validation: {words.percent(validated[-1]['val_accuracy'])}."
    if facts.test and facts.evaluation:
        epoch = [float(facts.evaluation.get("epoch", last["epoch"]))]
        losses.append(Line("test", epoch, [facts.test["loss"]]))
        accuracies.append(Line("test", epoch, [facts.test["accuracy"]]))
        accuracy_alt += f" Test: {words.percent(facts.test['accuracy'])}."
    rates = [_line("learning rate", rows, "lr")]
    speeds = [_line("throughput", rows, "images_per_second")]
    return [
        plots.curves("loss", "Loss", loss_alt, losses, loss_label([facts])),
        plots.curves("accuracy", "Accuracy", accuracy_alt, accuracies, "accuracy, %", percent=True),
        plots.curves(
            "learning-rate",
            "Learning rate at the end of each epoch",
            f"Learning rate {last['lr']:.3g} {ends}.",
            rates,
            "learning rate",
        ),
        plots.curves(
            "speed",
            "Throughput",
            f"{last['images_per_second']:.0f} images/s in epoch {last['epoch']}.",
            speeds,
            "training images/s",
        ),
    ]


def _line(label: str, rows: Sequence[Mapping[str, Any]], key: str) -> Line:
    return Line(label, [row["epoch"] for row in rows], [row[key] for row in rows])


def means(facts: RunFacts) -> list[tuple[str, str]]:
    """Return the keys and labels of the averages below the table of metrics per class."""
    if not facts.test:
        return []
    rows = facts.test["per_class"].values()
    present = sum(row["support"] > 0 for row in rows)
    macro = "macro average" if present == len(rows) else f"macro average of {present} classes"
    return [("macro", macro), ("weighted", "weighted average")]


def reliability(facts: RunFacts) -> Chart | None:
    """Plot accuracy against confidence on the test images."""
    if not facts.test:
        return None
    calibration = facts.test["calibration"]
    alt = (
        f"Accuracy against confidence in {len(calibration['bins'])} bins; expected calibration "
        f"error {calibration['ece']:.4f}, Brier score {calibration['brier']:.4f}."
    )
    return plots.reliability("reliability", calibration["bins"], alt)


def robustness(facts: RunFacts) -> Chart | None:
    """Plot the accuracy under each corruption, if it was measured."""
    metrics = facts.evaluation.get("robustness") if facts.evaluation else None
    measured = metrics["corruptions"] if metrics else {}
    corruptions = {story.spaced(name): values for name, values in measured.items() if values}
    if metrics is None or not corruptions:
        return None
    alt = f"Mean accuracy over all corruptions: {words.percent(metrics['mean_accuracy'])}."
    return plots.robustness("robustness", corruptions, alt)


def shade(share: float, *, diagonal: bool) -> str:
    """Return the shade of a cell that contains this share of the true class."""
    steps = (0.5, 0.75, 0.9, 0.95) if diagonal else (0.005, 0.01, 0.02, 0.05)
    return ("d" if diagonal else "e") + str(1 + sum(share >= step for step in steps))


def confusion_table(facts: RunFacts) -> list[list[Cell]] | None:
    """Return the cells of the confusion matrix, indexed by true class and predicted class."""
    if not facts.test:
        return None
    table = []
    for i, row in enumerate(facts.test["confusion_matrix"]):
        total = max(sum(row), 1)
        cells = []
        for j, number in enumerate(row):
            label = (
                f"true {facts.classes[i]}, predicted {facts.classes[j]}: {words.count(number)} "
                f"({words.percent(number / total)})"
            )
            step = shade(number / total, diagonal=i == j) if number else "z"
            cells.append(Cell(number, step, label if number else ""))
        table.append(cells)
    return table


def confusion_chart(facts: RunFacts) -> Chart | None:
    """Plot the confusion matrix, for Markdown and for more than `MAX_CELLS` classes."""
    if not facts.test:
        return None
    return plots.confusion("confusion", facts.test["confusion_matrix"], facts.classes)


def originals(facts: RunFacts) -> list[tuple[EncodedImage, list[EncodedImage]]]:
    """Return training images, with augmented versions if training augments images."""
    if facts.samples is None:
        return []
    shown = []
    samples = facts.samples
    for i, image in enumerate(samples.originals[:MAX_SAMPLES]):
        label = facts.classes[int(samples.original_labels[i])]
        versions = [
            EncodedImage(f"sample-{i + 1}-{j + 1}", png.encode(version), f"{label}, augmented")
            for j, version in enumerate(samples.augmented[i, :MAX_VERSIONS])
            if facts.augmented
        ]
        shown.append((EncodedImage(f"sample-{i + 1}", png.encode(image), label), versions))
    return shown


def sample_sheet(facts: RunFacts) -> EncodedImage | None:
    """Combine the training images, one per row, with their augmented versions to the right."""
    if facts.samples is None or not len(facts.samples.originals):
        return None
    versions = facts.samples.augmented[:MAX_SAMPLES, : MAX_VERSIONS if facts.augmented else 0]
    firsts = facts.samples.originals[:MAX_SAMPLES, None]
    rows = np.concatenate((firsts, versions), axis=1)
    return EncodedImage("samples", png.encode_grid(rows), "Training images")


def mistakes(facts: RunFacts) -> list[Mistake]:
    """Return the most confident mistakes."""
    if facts.samples is None:
        return []
    samples, names = facts.samples, facts.classes
    shown = []
    for i, image in enumerate(samples.mistakes[:MAX_MISTAKES]):
        index = int(samples.mistake_index[i])
        true, predicted = (
            names[int(samples.mistake_true[i])],
            names[int(samples.mistake_predicted[i])],
        )
        label = f"Test image {index}, {true} classified as {predicted}"
        encoded = EncodedImage(f"mistake-{i + 1:02}", png.encode(image), label)
        shown.append(Mistake(encoded, index, true, predicted, float(samples.mistake_confidence[i])))
    return shown


def kept_mistakes(facts: RunFacts) -> list[tuple[int, int, int, str, str]]:
    """Return the mistakes for the cells of the interactive confusion matrix.

    Returns:
        Each mistake consists of the true class, the predicted class, the index in the test set, the
        confidence in percent, and the image as PNG in base64. The mistakes are in descending order
        of confidence.
    """
    if facts.samples is None or not facts.test or len(facts.classes) > MAX_CELLS:
        return []
    samples = facts.samples
    return [
        (
            int(samples.mistake_true[i]),
            int(samples.mistake_predicted[i]),
            int(samples.mistake_index[i]),
            words.percent(float(samples.mistake_confidence[i])),
            base64.b64encode(png.encode(image)).decode("ascii"),
        )
        for i, image in enumerate(samples.mistakes)
    ]


def recipe_table(facts: RunFacts) -> dict[str, str]:
    """Return the fields of the recipe that apply to the run, as text."""
    if facts.recipe is None:
        fields = {}
    else:
        fields = recipe_words.fields(facts.recipe, flips=facts.flips, custom=facts.custom)
        fields |= {kind: part["name"] for kind, part in facts.custom.items()}
    return {name: plain(value) for name, value in fields.items()}


def plain(value: Any) -> str:
    """Format a value from the recipe or the environment."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def machine(environment: Mapping[str, Any]) -> str | None:
    """Return the name of the GPU, or of the processor without a GPU. Omits trademark signs."""
    name = environment.get("gpu") or environment.get("processor")
    return re.sub(r"\((R|TM)\)", "", name) if name else None


def command(environment: Mapping[str, Any]) -> str | None:
    """Return the command that started the run."""
    recorded: str | None = environment.get("command")
    return recorded and re.sub(r"^__main__\.py\b", "python -m resnet56", recorded)


def system_table(environment: Mapping[str, Any]) -> dict[str, str]:
    """Describe the machine and the software of the run. Omits missing values."""
    gigabytes: Callable[[Any], str] = "{} GB".format
    shown: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("gpu", "GPU", str),
        ("gpu_memory_gb", "GPU memory", gigabytes),
        ("cuda", "CUDA", str),
        ("processor", "processor", str),
        ("cores", "cores", str),
        ("threads", "threads", str),
        ("memory_gb", "memory", gigabytes),
        ("system", "system", str),
        ("device", "device", str),
        ("precision", "precision", str),
        ("execution", "execution mode", str),
        ("processes", "processes", str),
        ("python", "Python", str),
    )
    table = {label: form(environment[key]) for key, label, form in shown if environment.get(key)}
    for name, version in (environment.get("versions") or {}).items():
        table[str(name)] = str(version)
    git = environment.get("git")
    if git:
        changed = ", with changes" if git.get("changed") else ""
        table["commit"] = f"{git.get('commit')}{changed}"
    if environment.get("resumed"):
        table["resumed"] = words.plural(len(environment["resumed"]), "time")
    return table
