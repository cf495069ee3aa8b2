"""Ship a run's weights with the package: python tools/ship.py RUN NAME DIR

Writes src/resnet56/weights/NAME.safetensors, in half precision, and NAME.json, its card, and the
folder's README.md, which says what the cards say. What a card says of accuracy is measured here, of
the half-precision weights, on the images in DIR.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from resnet56.data.readers import load_folder
from resnet56.evaluation import subject_of
from resnet56.files import read_json, write_json, write_text
from resnet56.model import describe
from resnet56.recipe import from_fields
from resnet56.runs import pretrained
from resnet56.runs.directory import RunDirectory
from results import command

USAGE = "usage: python tools/ship.py RUN NAME DIR"
README = """\
# The networks that come with the package

`NAME.safetensors` holds weights in half precision, `NAME.json` its card: architecture,
normalisation, recipe and everything measured. `resnet56.load("resnet56")` gives one to Python,
`resnet56 predict` and `resnet56 serve` use `resnet56` unless told otherwise, and `resnet56 evaluate
NAME --data DIR` measures one again. `tools/ship.py` wrote all files here.

**Data**: CIFAR-10's 50,000 training images; 92 of the set's 60,000 were re-encoded as JPEG, the
rest are byte-exact. One training each, whose recipe was fixed before it was run; nothing was chosen
by the test images, which were opened after it (docs/results.md) and for the figures below.

**Limits.** Each knows ten classes and answers with one of them whatever it is shown. They were
trained on centred objects in 32x32 pixels; larger pictures are cropped to their central square and
shrunk to that.
"""


def main(run: Path, name: str, folder: Path) -> None:
    """Write both files and say how good the network is."""
    # First what can go wrong, lest a card stay behind with the figures of the run's own weights.
    dataset = load_folder(folder)
    directory = RunDirectory(run)
    if dataset.classes != directory.load().network.classes:
        sys.exit(f"{folder} has other classes than {run}")
    pretrained.save(directory, name, pretrained.FOLDER)
    checkpoint = pretrained.load(name)
    subject = subject_of(checkpoint, torch.device("cpu"))
    card = pretrained.FOLDER / f"{name}.json"
    figures = {"test": subject.figures(dataset.test), "train": subject.figures(dataset.train)}
    evaluation = {"of": "the half-precision weights", "data": dataset.source, **figures}
    write_json(card, read_json(card) | {"evaluation": evaluation})
    write_text(
        pretrained.FOLDER / "README.md", "\n".join((README, *map(chapter, pretrained.names())))
    )
    print(f"{name}: {figures['test']['accuracy']:.2%} of {figures['test']['n']:,} test images")


def chapter(name: str) -> str:
    """What the card of `name` says, for people."""
    card = pretrained.card(name)
    recipe, evaluation = from_fields(card["recipe"], name), card["evaluation"]
    test, train = evaluation["test"], evaluation["train"]
    low, high = (100 * bound for bound in test["accuracy_interval"])
    calibration = test["calibration"]
    lines = [
        f"## {name}",
        "",
        f"- **Network**: {describe(recipe.arch).parameters:,} parameters.",
        f"- **Training**: `{command(recipe)}`, seed {recipe.seed}, {card['weights']} weights.",
        f"- **Accuracy** of the half-precision weights, in fp32: {100 * test['accuracy']:.2f} % of "
        f"the {test['n']:,} test images",
        f"  (95 % interval {low:.2f} to {high:.2f}), {100 * train['accuracy']:.2f} % of the "
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
    """Precision, recall and F1 of a class."""
    numbers = (f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
    return f"| {label} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(USAGE)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
