"""Measure the effect of mistakes in evaluation code: python tools/mistakes.py DIR [RUN|NAME]

The tool evaluates a trained model on the CIFAR-10 test images in DIR, correctly and with common
mistakes, and prints a table.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, crop_and_flip, normalize, sample_params
from resnet56.data.dataset import Split
from resnet56.data.readers import load_directory
from resnet56.inference import predict_logits, restore
from resnet56.model import ResNet
from resnet56.runs.checkpoint import ModelConfig
from resnet56.runs.sources import open_model

CPU = torch.device("cpu")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
USAGE = "usage: python tools/mistakes.py DIR [RUN|NAME]"


@torch.inference_mode()
def predict_with_batch_statistics(model: ResNet, images: Tensor, config: ModelConfig) -> Tensor:
    """Return the logits for batches of 32 images, with the model left in training mode."""
    model = copy.deepcopy(model).train()
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return torch.cat([model(normalize(part, mean, std)) for part in images.split(32)])


def evaluations(
    model: ResNet, split: Split, config: ModelConfig
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield a description, the logits (N, C) and the labels (N,) for each evaluation."""
    images, labels, constants = split.images, split.labels, (config.mean, config.std)
    yield "correctly", predict_logits(model, images, *constants), labels
    yield "in bf16 instead of fp32", predict_logits(model, images, *constants, "bf16"), labels
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled_labels, sorted_indices = labels[shuffled], labels.sort(stable=True).indices
    shuffled_logits = predict_with_batch_statistics(model, images[shuffled], config)
    yield "in training mode, batches of 32, shuffled", shuffled_logits, shuffled_labels
    sorted_logits = predict_with_batch_statistics(model, images[sorted_indices], config)
    yield "in training mode, batches of 32, sorted by class", sorted_logits, labels[sorted_indices]
    yield "normalized with ImageNet's constants", predict_logits(model, images, *IMAGENET), labels
    yield "not normalized, values from 0 to 1", predict_logits(model, images, *NONE), labels
    yield (
        "channels in the order blue, green, red",
        predict_logits(model, images.flip(1), *constants),
        labels,
    )
    params = sample_params(len(images), Augmentation(), torch.Generator().manual_seed(0))
    augmented = crop_and_flip(images, params, 4)
    yield (
        "cropped and flipped at random, as in training",
        predict_logits(model, augmented, *constants),
        labels,
    )


def main(directory: str, source: str = "resnet56") -> None:
    """Print the table."""
    checkpoint = open_model(source).checkpoint
    model, split = restore(checkpoint, CPU), load_directory(Path(directory)).test
    print(f"| how `{source}` is tested | accuracy, % | change, points |\n|---|---|---|")
    reference = None
    for name, logits, labels in evaluations(model, split, checkpoint.config):
        accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
        reference = accuracy if reference is None else reference
        print(f"| {name} | {accuracy:.2f} | {accuracy - reference:+.2f} |", flush=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(USAGE)
    main(*sys.argv[1:])
