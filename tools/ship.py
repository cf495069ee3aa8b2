"""Ship a run's weights with the package: python tools/ship.py RUN NAME DIR

Writes src/resnet56/weights/NAME.safetensors, in half precision, and NAME.json, its card. What the
card says of accuracy is measured here, of the half-precision weights, on the images in DIR.
"""

import sys
from pathlib import Path

import torch

from resnet56 import shipped
from resnet56.evaluation import subject_of
from resnet56.readers import load_folder
from resnet56.rundir import RunDirectory, read_json, write_json

USAGE = "usage: python tools/ship.py RUN NAME DIR"


def main(run: Path, name: str, folder: Path) -> None:
    """Write both files and say how good the network is."""
    # First what can go wrong, lest a card stay behind with the figures of the run's own weights.
    dataset = load_folder(folder)
    directory = RunDirectory(run)
    if dataset.classes != directory.load().network.classes:
        sys.exit(f"{folder} has other classes than {run}")
    shipped.save(directory, name, shipped.FOLDER)
    checkpoint = shipped.load(name)
    subject = subject_of(checkpoint, torch.device("cpu"))
    card = shipped.FOLDER / f"{name}.json"
    figures = {"test": subject.figures(dataset.test), "train": subject.figures(dataset.train)}
    evaluation = {"of": "the half-precision weights", "data": dataset.source, **figures}
    write_json(card, read_json(card) | {"evaluation": evaluation})
    print(f"{name}: {figures['test']['accuracy']:.2%} of {figures['test']['n']:,} test images")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(USAGE)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
