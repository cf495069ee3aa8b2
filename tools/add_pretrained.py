"""Add the weights of a run to the package: python tools/add_pretrained.py RUN NAME DIR

The tool writes src/resnet56/weights/NAME.safetensors in half precision, the model card NAME.json,
and README.md, which is generated from all cards. The metrics on a card are measured with the
half-precision weights on the images in DIR.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from resnet56.data.class_names import CIFAR100
from resnet56.data.readers import load_directory
from resnet56.evaluation import evaluated_model
from resnet56.files import read_json, write_json, write_text
from resnet56.model import describe
from resnet56.recipe import from_fields
from resnet56.runs import pretrained
from resnet56.runs.directory import RunDirectory
from results import command

USAGE = "usage: python tools/add_pretrained.py RUN NAME DIR"
MAX_ROWS = 20  # in the table of classes
README = """\
# Pretrained weights

`NAME.safetensors` contains the weights in half precision. `NAME.json` contains the architecture,
the normalization constants, the recipe and all metrics. `tools/add_pretrained.py` writes all files
in this directory.

To load a model in Python, use `resnet56.load("resnet56")`. To evaluate a model, run
`resnet56 evaluate NAME --data DIR`. By default, `resnet56 predict` and `resnet56 serve` use
`resnet56`.

**Data.** The models were trained on all 50,000 training images of CIFAR-10 or CIFAR-100. For
`resnet56-bottleneck`, 72 of the training images were re-encoded as JPEG. The metrics below were
measured on the original images.

**Recipes.** The commands below train with the same settings as the models. `resnet56` was trained
with the recipe `best`, and the other models with the earlier settings of `best`: Cutout only and
120 epochs. Of the recipes that we compared, `best` reaches the highest mean test accuracy.

**Seeds.** Each model is the result of the training run with seed 0, whatever its test accuracy. The
settings were fixed before each run. The two other seeds of `best` reach lower test accuracies than
`resnet56`; see `docs/results.md`.

**Limitations.** Each model assigns one of its classes to any image. The training images show
centered objects at 32x32 pixels. The package crops other images to the center square and resizes
them to 32x32 pixels.
"""


def main(run: Path, name: str, data: Path) -> None:
    """Write all files and print the test accuracy."""
    # Check everything that can fail before writing, so that no card remains without metrics.
    dataset = load_directory(data)
    directory = RunDirectory(run)
    if dataset.classes != directory.load().config.classes:
        sys.exit(f"the classes of {data} differ from those of {run}")
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
    """Format the card of a model as Markdown."""
    card = pretrained.card(name)
    recipe, evaluation = from_fields(card["recipe"], name), card["evaluation"]
    test, train = evaluation["test"], evaluation["train"]
    low, high = (100 * bound for bound in test["accuracy_interval"])
    calibration = test["calibration"]
    weights = "EMA" if recipe.ema_decay else "final"
    classes = card["config"]["classes"]
    data_set = "CIFAR-100" if tuple(classes) == CIFAR100 else "CIFAR-10"
    lines = [
        f"## {name}",
        "",
        f"- **Network**: `{recipe.arch}`, {describe(recipe.arch, len(classes)).parameters:,} "
        "parameters.",
        f"- **Data**: {data_set}, {len(classes)} classes.",
        f"- **Training**: `{command(recipe)}`, seed {recipe.seed}, {weights} weights.",
        f"- **Accuracy** of the half-precision weights, computed in fp32: "
        f"{100 * test['accuracy']:.2f} % on the {test['n']:,} test images",
        f"  (95 % interval {low:.2f} % to {high:.2f} %), {100 * train['accuracy']:.2f} % on the "
        "training images.",
        f"- **Calibration**: expected calibration error {calibration['ece']:.3f}, Brier score "
        f"{calibration['brier']:.3f}.",
        *per_class(name, test["per_class"]),
        "",
    ]
    return "\n".join(lines)


def per_class(name: str, metrics: dict[str, Any]) -> list[str]:
    """Return a table of the metrics of each class, or a reference to the card of many classes."""
    if len(metrics) > MAX_ROWS:
        return [f"- **Classes**: `{name}.json` contains the metrics of each class."]
    head = ["", "| class | precision, % | recall, % | F1, % |", "|---|---|---|---|"]
    return [*head, *(table_row(label, row) for label, row in metrics.items())]


def table_row(label: str, row: dict[str, Any]) -> str:
    """Format the precision, recall and F1 score of a class."""
    numbers = (f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
    return f"| {label} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(USAGE)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
