"""What errors in test code cost: python tools/mistakes.py DIR [RUN|NAME]

Tests one trained network on the CIFAR-10 test images, correctly and with common errors, and prints
a table. Nothing is trained.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, crop_and_flip, draw, normalize
from resnet56.data.dataset import Split
from resnet56.data.readers import load_folder
from resnet56.evaluation import predict_logits
from resnet56.inference import restore
from resnet56.model import ResNet
from resnet56.runs.checkpoint import Network
from resnet56.runs.sources import open_network

CPU = torch.device("cpu")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
USAGE = "usage: python tools/mistakes.py DIR [RUN|NAME]"


@torch.inference_mode()
def by_batch_statistics(model: ResNet, images: Tensor, network: Network) -> Tensor:
    """Logits of a network left in training mode, in batches of 32."""
    model = copy.deepcopy(model).train()
    mean, std = torch.tensor(network.mean), torch.tensor(network.std)
    return torch.cat([model(normalize(part, mean, std)) for part in images.split(32)])


def test_procedures(
    model: ResNet, split: Split, network: Network
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield a description, logits (N, C) and labels (N,) for each procedure."""
    images, labels, own = split.images, split.labels, (network.mean, network.std)
    yield "correctly", predict_logits(model, images, *own), labels
    yield "in bf16 instead of fp32", predict_logits(model, images, *own, "bf16"), labels
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed, ordered = labels[shuffled], labels.sort(stable=True).indices
    by_batch = by_batch_statistics(model, images[shuffled], network)
    yield "in training mode, batches of 32, shuffled", by_batch, mixed
    by_class = by_batch_statistics(model, images[ordered], network)
    yield "the same, images sorted by class", by_class, labels[ordered]
    yield "normalized with ImageNet's constants", predict_logits(model, images, *IMAGENET), labels
    yield "not normalized, values from 0 to 1", predict_logits(model, images, *NONE), labels
    yield (
        "channels in the order blue, green, red",
        predict_logits(model, images.flip(1), *own),
        labels,
    )
    draws = draw(len(images), Augmentation(), torch.Generator().manual_seed(0))
    augmented = crop_and_flip(images, draws, 4)
    yield (
        "cropped and flipped at random, as in training",
        predict_logits(model, augmented, *own),
        labels,
    )


def main(folder: str, what: str = "resnet56") -> None:
    """Print the table."""
    checkpoint = open_network(what).checkpoint
    model, split = restore(checkpoint, CPU), load_folder(Path(folder)).test
    print(f"| how `{what}` is tested | accuracy, % | points |\n|---|---|---|")
    right = None
    for name, logits, labels in test_procedures(model, split, checkpoint.network):
        accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
        right = accuracy if right is None else right
        print(f"| {name} | {accuracy:.2f} | {accuracy - right:+.2f} |", flush=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(USAGE)
    main(*sys.argv[1:])
