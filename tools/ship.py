"""Add the weights of a run to the package: python tools/ship.py RUN NAME DIR

Writes src/resnet56/weights/NAME.safetensors (half precision), its card NAME.json, and the
directory's README.md, which is generated from the cards. The accuracy on a card is that of the
half-precision weights, measured here on the images in DIR.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from resnet56.data.readers import load_directory
from resnet56.evaluation import evaluated_model
from resnet56.files import read_json, write_json, write_text
from resnet56.model import describe
from resnet56.recipe import from_fields
from resnet56.runs import pretrained
from resnet56.runs.directory import RunDirectory
from results import command

USAGE = "usage: python tools/ship.py RUN NAME DIR"
README = """\
# Pretrained weights

`NAME.safetensors` holds weights in half precision. `NAME.json` contains the architecture,
normalization constants, recipe and all metrics. `resnet56.load("resnet56")` loads a network in
Python, and `resnet56 evaluate NAME --data DIR` evaluates it again. `resnet56 predict` and `resnet56
serve` use `resnet56` by default. `tools/ship.py` writes all files in this directory.

**Data.** The networks were trained on the 50,000 training images of CIFAR-10, of which 72 were
re-encoded as JPEG; the numbers below are for the original images. Each network is the result of a
single training run with a recipe that was fixed beforehand. Nothing was selected on the test
images.

**Limits.** Each network predicts one of ten classes for any image. The networks were trained on
centered objects in 32x32 pixels; larger images are cropped to the central square and resized.
"""


def main(run: Path, name: str, folder: Path) -> None:
    """Write all files and print the test accuracy."""
    # Check everything that can fail first, so that no card is left without measurements.
    dataset = load_directory(folder)
    directory = RunDirectory(run)
    if dataset.classes != directory.load().config.classes:
        sys.exit(f"the classes of {folder} differ from those of {run}")
    pretrained.save(directory, name, pretrained.DIRECTORY)
    checkpoint = pretrained.load(name)
    evaluated = evaluated_model(checkpoint, torch.device("cpu"))
    card = pretrained.DIRECTORY / f"{name}.json"
    metrics = {"test": evaluated.metrics(dataset.test), "train": evaluated.metrics(dataset.train)}
    evaluation = {"of": "the half-precision weights", "data": dataset.source, **metrics}
    write_json(card, read_json(card) | {"evaluation": evaluation})
    write_readme()
    print(f"{name}: {metrics['test']['accuracy']:.2%} test accuracy")


def write_readme() -> None:
    """Generate README.md from all cards."""
    sections = map(section, pretrained.names())
    write_text(pretrained.DIRECTORY / "README.md", "\n".join((README, *sections)))


def section(name: str) -> str:
    """Format the card of a network as Markdown."""
    card = pretrained.card(name)
    recipe, evaluation = from_fields(card["recipe"], name), card["evaluation"]
    test, train = evaluation["test"], evaluation["train"]
    low, high = (100 * bound for bound in test["accuracy_interval"])
    calibration = test["calibration"]
    weights = "EMA" if recipe.ema_decay else "final"
    lines = [
        f"## {name}",
        "",
        f"- **Network**: {describe(recipe.arch).parameters:,} parameters.",
        f"- **Training**: `{command(recipe)}`, seed {recipe.seed}, {weights} weights.",
        f"- **Accuracy** of the half-precision weights, in fp32: {100 * test['accuracy']:.2f} % on "
        f"the {test['n']:,} test images",
        f"  (95 % interval {low:.2f} to {high:.2f}), {100 * train['accuracy']:.2f} % on the "
        "training images.",
        f"- **Calibration**: expected calibration error {calibration['ece']:.3f}, Brier score "
        f"{calibration['brier']:.3f}.",
        "",
        "| class | precision % | recall % | F1 % |",
        "|---|---|---|---|",
        *(table_row(each, row) for each, row in test["per_class"].items()),
        "",
    ]
    return "\n".join(lines)


def table_row(label: str, row: dict[str, Any]) -> str:
    """Format precision, recall and F1 of a class."""
    numbers = (f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
    return f"| {label} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(USAGE)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
