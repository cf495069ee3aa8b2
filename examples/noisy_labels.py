"""Train on wrong labels with cross-entropy, and with a loss that is robust to them.

Symmetric cross-entropy (Wang et al. 2019, arXiv:1908.06112) adds reverse cross-entropy, in which
the label and the prediction are swapped. The logarithm of zero is replaced with -4. The reverse
term is bounded, so images with a wrong label have less influence.

Run: python examples/noisy_labels.py --noise 0.4 --epochs 10
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet56 import RECIPES, Dataset, Split, load_data, train


def symmetric_cross_entropy(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return the mean loss over a batch of logits (B, classes) and labels (B,)."""
    wrong = 1 - logits.softmax(dim=1).gather(1, labels[:, None])
    return F.cross_entropy(logits, labels) + beta * 4 * wrong.mean()


def with_wrong_labels(data: Dataset, fraction: float) -> Dataset:
    """Replace a fraction of the training labels with other labels, chosen at random."""
    generator = torch.Generator().manual_seed(0)
    labels, classes = data.train.labels, len(data.classes)
    wrong = torch.rand(len(labels), generator=generator) < fraction
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    noisy = torch.where(wrong, (labels + shift) % classes, labels)
    source = f"{data.source}; {100 * fraction:g} % of the training labels are wrong"
    return replace(data, train=Split(data.train.images, noisy), source=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.4, help="fraction of wrong labels")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the reverse term")
    options = parser.parse_args()

    data = with_wrong_labels(load_data(options.data), options.noise)
    recipe = replace(RECIPES["quick"], arch=options.arch, epochs=options.epochs)
    robust = partial(symmetric_cross_entropy, beta=options.beta)
    for name, loss in (("cross-entropy", F.cross_entropy), ("symmetric", robust)):
        result = train(recipe, data, f"runs/noisy-{name}", loss=loss)
        print(f"{name}: test accuracy: {result['test']['accuracy']:.4f}")


if __name__ == "__main__":
    main()
