"""The few images that a run keeps for its report: augmented ones, and its surest mistakes."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, augment, draw
from resnet56.data.dataset import Split, Triple
from resnet56.data.mixing import draw_mixes, mix_images
from resnet56.metrics import Floats, softmax

MISTAKES = 24
ORIGINALS, VARIANTS = 10, 5  # training images, one per class, and augmented versions of each


def gallery(
    training: Split, mean: Triple, std: Triple, augmentation: Augmentation
) -> dict[str, Any]:
    """A few training images, and what the augmentation makes of them.

    Args:
        training: the images trained on.
        mean, std: of their channels, in units of [0, 1].
        augmentation: of the training.

    Returns:
        `originals` (K, 3, 32, 32) uint8, `original_labels` (K,), and `augmented`
        (K, V, 3, 32, 32) uint8.
    """
    labels = training.labels.cpu().numpy()
    index = torch.from_numpy(np.unique(labels, return_index=True)[1][:ORIGINALS])
    originals = training.images[index].cpu()
    images = originals.repeat_interleave(VARIANTS, dim=0)
    draws = draw(len(images), augmentation, torch.Generator().manual_seed(0))
    means, stds = torch.tensor(mean), torch.tensor(std)
    seen = augment(images, draws, means, stds, augmentation)
    if augmentation.mix != "none":
        mixed = augment(images, draws, means, stds, augmentation.before_mixing())
        _mix_columns(seen, mixed, augmentation)
    # Bytes again, for people: what Cutout erases is the mean.
    in_units = seen * stds[:, None, None] + means[:, None, None]
    variants = (255 * in_units).round().clamp(0, 255).byte()
    return {
        "originals": originals.numpy(),
        "original_labels": labels[index],
        "augmented": variants.contiguous().view(-1, VARIANTS, 3, 32, 32).numpy(),
    }


def _mix_columns(seen: Tensor, views: Tensor, augmentation: Augmentation) -> None:
    """Let as many of the versions in `seen` be mixed ones as in the training, but one at least.

    Args:
        seen: (K * V, 3, 32, 32), changed in place.
        views: the same images as they are before mixing; the k-th versions of all originals make
            a batch.
        augmentation: of the training.
    """
    count = len(seen) // VARIANTS
    mixes = draw_mixes(
        augmentation.mix, augmentation.mix_alpha, 1.0, steps=VARIANTS, batch=count, seed=0
    )
    for column in range(math.ceil(VARIANTS * augmentation.mix_probability)):
        mix, batch = mixes[column], views[column::VARIANTS]
        assert mix is not None
        images = [batch, *(batch[partners] for partners in mix.partners)]
        seen[column::VARIANTS] = mix_images(images, mix)


def surest_mistakes(logits: Floats, split: Split) -> dict[str, Any]:
    """The wrong predictions with the highest confidence, highest first.

    Args:
        logits: (N, C) of the images of `split`.
        split: N images and their labels.

    Returns:
        `mistakes` (M, 3, 32, 32) uint8, and `mistake_index`, `mistake_true`, `mistake_predicted`
        and `mistake_confidence`, each (M,).
    """
    labels, predicted = split.labels.cpu().numpy(), logits.argmax(axis=1)
    confidence = softmax(logits).max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    index = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return {
        "mistakes": split.images[torch.from_numpy(index)].cpu().numpy(),
        "mistake_index": index,
        "mistake_true": labels[index],
        "mistake_predicted": predicted[index],
        "mistake_confidence": confidence[index],
    }
