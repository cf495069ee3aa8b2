"""Add the weights of a run to the package: python tools/add_pretrained.py RUN NAME DIR

The tool writes src/resnet56/weights/NAME.safetensors in half precision, the model card NAME.json,
and README.md, which is generated from all cards. The metrics on a card are measured with the
half-precision weights on the images in DIR.
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

USAGE = "usage: python tools/add_pretrained.py RUN NAME DIR"
README = """\
# Pretrained weights

`NAME.safetensors` contains the weights in half precision. `NAME.json` contains the architecture,
the normalization constants, the recipe and all metrics. `tools/add_pretrained.py` writes all files
in this directory.

To load a model in Python, use `resnet56.load("resnet56")`. To evaluate a model, run
`resnet56 evaluate NAME --data DIR`. By default, `resnet56 predict` and `resnet56 serve` use
`resnet56`.

**Data.** The models were trained on the 50,000 training images of CIFAR-10, of which 72 were
re-encoded as JPEG. The metrics below were measured on the original images. Each model is the result
of a single training run with a recipe that was fixed beforehand. The test images were not used to
select a model.

**Limitations.** Each model assigns one of its ten classes to any image. The training images show
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
    lines = [
        f"## {name}",
        "",
        f"- **Network**: {describe(recipe.arch).parameters:,} parameters.",
        f"- **Training**: `{command(recipe)}`, seed {recipe.seed}, {weights} weights.",
        f"- **Accuracy** of the half-precision weights, computed in fp32: "
        f"{100 * test['accuracy']:.2f} % on the {test['n']:,} test images",
        f"  (95 % interval {low:.2f} % to {high:.2f} %), {100 * train['accuracy']:.2f} % on the "
        "training images.",
        f"- **Calibration**: expected calibration error {calibration['ece']:.3f}, Brier score "
        f"{calibration['brier']:.3f}.",
        "",
        "| class | precision, % | recall, % | F1, % |",
        "|---|---|---|---|",
        *(table_row(each, row) for each, row in test["per_class"].items()),
        "",
    ]
    return "\n".join(lines)


def table_row(label: str, row: dict[str, Any]) -> str:
    """Format the precision, recall and F1 score of a class."""
    numbers = (f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
    return f"| {label} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(USAGE)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
