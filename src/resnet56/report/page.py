"""Content of the report on one run, for the templates."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from resnet56.data.cifar import OFFICIAL
from resnet56.report import charts, images, recipe_words, statements, story, words
from resnet56.report.read import RunFacts
from resnet56.runs.schema import Evaluation

# Parts of the conclusion, in order. Most of them are empty for an untested run.
PARTS = (
    *("state", "result", "gap", "trend", "classes", "confusions", "confidence"),
    *("robustness", "hardware"),
)
MAX_CELLS = 150  # maximum number of classes for a confusion matrix as a table


def content(facts: RunFacts) -> dict[str, Any]:
    """Return the content of the report on one run."""
    confusion = charts.confusion_table(facts) if len(facts.classes) <= MAX_CELLS else None
    return {
        "facts": facts,
        "title": statements.title(facts),
        "arch": statements.network_name(facts),
        "story": stories(facts),
        "sections": sections(facts),
        "evaluated": evaluated(facts.evaluation) if facts.evaluation else None,
        "conditions": conditions(facts.evaluation) if facts.evaluation else None,
        "training_charts": charts.training_charts(facts),
        "means": means(facts),
        "reliability": charts.reliability(facts),
        "robustness": charts.robustness(facts),
        "confusion": confusion,
        "confusion_chart": charts.confusion_chart(facts),
        "originals": images.originals(facts),
        "samples_name": "Training images before and after augmentation"
        if facts.augmented
        else "Images of each class",
        "sheet": images.sample_sheet(facts),
        "mistakes": images.mistakes(facts),
        "recipe": recipe_table(facts),
        "system": system_table(facts.environment),
        "kept": images.kept_mistakes(facts) if confusion else [],
        "recipe_note": "Disabled options and fields that do not apply are omitted."
        + (" The file recipe.json contains all fields." if facts.stored else ""),
        "unrecorded": unrecorded(facts),
        "no_curves": statements.no_curves(facts),
        "curves_note": curves_note(facts),
        "normalization": normalization(facts),
        "machine": statements.machine(facts.environment),
        "command": command(facts.environment),
    }


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
    """State how a network was evaluated, for example 'in fp32 on the CPU'."""
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


def stories(facts: RunFacts) -> dict[str, list[str]]:
    """Return the sentences for each section of the page."""
    test, recipe = facts.test, facts.recipe
    names = (*PARTS, "meeting", "schedule", "optimizer", "augmentation")
    sentences: dict[str, list[str]] = {name: [] for name in names}
    state = statements.state(facts) + statements.next_step(facts)
    sentences |= {"state": state, "hardware": story.hardware(facts.comparisons)}
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
        low, high = test["accuracy_interval"]
        gap = statements.gap(facts)
        sentences |= {
            "result": [story.result(test), *story.against_chance(test)],
            "gap": [f"{gap.verdict}: {gap.details}"] if gap else [],
            "classes": story.best_and_worst(test["per_class"]),
            "confusions": story.confusions(test["most_confused"]),
            "confidence": story.confidence(test["calibration"], test["accuracy"], (low, high)),
            "robustness": story.robustness(facts.robustness),
            "meeting": story.meeting(
                statements.network_name(facts),
                test,
                facts.train,
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
    """State which images determine the mean and standard deviation for the normalization."""
    if facts.recipe is None:
        return "of the imported network"
    if facts.recipe.weights:
        return f"of {facts.recipe.weights}, the initial weights"
    return "of the training images"


def curves_note(facts: RunFacts) -> str:
    """Explain how the training curves were measured."""
    on = "augmented images" if facts.augmented else "images without augmentation"
    note = "Training loss and accuracy are averages over each epoch. They are measured while the "
    note += f"weights change, and on {on}."
    if "loss" in facts.custom:
        note += " The training loss is the custom loss. All other losses are cross-entropy losses."
    if facts.test:
        note += " The dots show the results of the evaluated weights on the test images."
    return note


def means(facts: RunFacts) -> list[tuple[str, str]]:
    """Return the keys and labels of the averages in the last rows of the table of class metrics."""
    if not facts.test:
        return []
    rows = facts.test["per_class"].values()
    present = sum(row["support"] > 0 for row in rows)
    macro = "macro average" if present == len(rows) else f"macro average of {present} classes"
    return [("macro", macro), ("weighted", "weighted average")]


def recipe_table(facts: RunFacts) -> dict[str, str]:
    """Return the fields of the recipe that apply to the run, as text."""
    if facts.recipe is None:
        fields = {}
    else:
        fields = recipe_words.fields(facts.recipe, flips=facts.flips, custom=facts.custom)
        fields |= {kind: part["name"] for kind, part in facts.custom.items()}
    return {name: words.plain(value) for name, value in fields.items()}


def command(environment: Mapping[str, Any]) -> str | None:
    """Return the command that started the run."""
    recorded: str | None = environment.get("command")
    return recorded and re.sub(r"^__main__\.py\b", "python -m resnet56", recorded)


def system_table(environment: Mapping[str, Any]) -> dict[str, str]:
    """Describe the machine and the software of the run. Omit missing values."""
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
