"""Statements about a run, shared by the report, the slides, and comparisons."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from resnet56.report import story, words
from resnet56.report.read import RunFacts
from resnet56.report.story import Gap


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
        images = words.plural(facts.test["n"], "image")
        return f"{arch} reaches {words.percent(facts.test['accuracy'])} test accuracy on {images}"
    if facts.recipe is None:
        return f"{arch}, not evaluated"
    if facts.rows:
        return f"{arch} after {words.plural(facts.progress.epoch, 'epoch')}, not yet tested"
    return f"{arch}, before the end of its first epoch"


def gap(facts: RunFacts) -> Gap | None:
    """Compare training accuracy with test accuracy, if both were measured."""
    test, train = facts.test, facts.train
    if not test or not train:
        return None
    low, high = test["accuracy_interval"]
    return story.gap(
        train["accuracy"], test["accuracy"], (low, high), augmented=facts.training_augmented
    )


def state(facts: RunFacts) -> list[str]:
    """State what is missing from the run, if anything."""
    if facts.recipe is not None:
        tested = facts.test is not None
        return story.unfinished(facts.progress.epoch, facts.recipe.epochs, tested=tested)
    return [] if facts.test else [story.unevaluated(str(facts.path))]


def next_step(facts: RunFacts) -> list[str]:
    """State how to test a finished training run, if it was not tested."""
    untested = facts.recipe is not None and facts.test is None and facts.finished
    if not untested or "model" in facts.custom:  # `resnet56 evaluate` rejects custom models.
        return []
    return [f"To test the run: {shlex.join(['resnet56', 'evaluate', str(facts.path)])}"]


def no_curves(facts: RunFacts) -> str:
    """State why a network has no training curves."""
    if facts.recipe is None:
        return "The training curves are not recorded."
    if not facts.stored:
        return "The package includes the recipe of these weights, but not their training curves."
    return "No epoch is finished yet, so there are no curves."


def machine(environment: Mapping[str, Any]) -> str | None:
    """Return the name of the GPU or, without a GPU, of the processor, without trademark signs."""
    name = environment.get("gpu") or environment.get("processor")
    return re.sub(r"\((R|TM)\)", "", name) if name else None
