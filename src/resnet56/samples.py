"""Select augmented training images and misclassified test images for the report."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, augment, sample_params
from resnet56.data.batches import seeded
from resnet56.data.dataset import Split, Triple
from resnet56.data.mixing import mix_images, sample_mix_params
from resnet56.metrics import FloatArray, IntArray, softmax

MAX_MISTAKES = 500
MOST_CONFIDENT = 24  # number of mistakes to select regardless of their classes
MAX_ORIGINALS = 10  # maximum number of training images
VARIANTS = 5  # number of augmented versions of each training image


def augmented_samples(
    training: Split, mean: Triple, std: Triple, augmentation: Augmentation
) -> dict[str, Any]:
    """Augment one training image of each class, for at most `MAX_ORIGINALS` classes.

    Args:
        training: training images and labels.
        mean, std: channel statistics, for pixels in [0, 1].
        augmentation: augmentation of the training images.

    Returns:
        originals: (K, 3, 32, 32) uint8.
        original_labels: (K,).
        augmented: (K, V, 3, 32, 32) uint8, the V versions of each original.
    """
    labels = training.labels.cpu().numpy()
    index = torch.from_numpy(np.unique(labels, return_index=True)[1][:MAX_ORIGINALS])
    originals = training.images[index].cpu()
    images = originals.repeat_interleave(VARIANTS, dim=0)
    params = sample_params(len(images), augmentation, torch.Generator().manual_seed(0))
    means, stds = torch.tensor(mean), torch.tensor(std)
    with seeded(0, images.device):  # custom augmentations can use random numbers
        augmented = augment(images, params, means, stds, augmentation)
        if augmentation.mix != "none":
            unmixed = augment(images, params, means, stds, augmentation.before_mixing())
            _mix_variants(augmented, unmixed, augmentation)
    # Undo the normalization. Pixels that Cutout has erased then have the mean color.
    pixels = augmented * stds[:, None, None] + means[:, None, None]
    variants = (255 * pixels).round().clamp(0, 255).byte()
    return {
        "originals": originals.numpy(),
        "original_labels": labels[index],
        "augmented": variants.contiguous().view(-1, VARIANTS, 3, 32, 32).numpy(),
    }


def _mix_variants(augmented: Tensor, unmixed: Tensor, augmentation: Augmentation) -> None:
    """Mix the same fraction of the versions as in training, but at least one version.

    Args:
        augmented: (K * V, 3, 32, 32), changed in place.
        unmixed: the same images, augmented for mixing. The k-th versions of all originals form a
            batch.
        augmentation: augmentation of the training images.
    """
    count = len(augmented) // VARIANTS
    mixes = sample_mix_params(
        augmentation.mix, augmentation.mix_alpha, 1.0, steps=VARIANTS, batch=count, seed=0
    )
    for variant in range(math.ceil(VARIANTS * augmentation.mix_probability)):
        mix, batch = mixes[variant], unmixed[variant::VARIANTS]
        assert mix is not None
        images = [batch, *(batch[partners] for partners in mix.partners)]
        augmented[variant::VARIANTS] = mix_images(images, mix)


def select_mistakes(logits: FloatArray, split: Split, limit: int = MAX_MISTAKES) -> dict[str, Any]:
    """Return wrong predictions, sorted by descending confidence.

    If there are more than `limit` wrong predictions, the function selects predictions from all
    off-diagonal cells of the confusion matrix. It first selects the `MOST_CONFIDENT` predictions
    with the highest confidence across all cells. It then adds the most confident prediction of each
    cell, then the second most confident, and so on. Cells with more wrong predictions come first.

    Args:
        logits: (N, C) logits of the images in `split`.
        split: N images and their labels.
        limit: maximum number of images.

    Returns:
        mistakes: (M, 3, 32, 32) uint8.
        mistake_index: (M,) indices into `split`.
        mistake_true, mistake_predicted: (M,) class indices.
        mistake_confidence: (M,) probabilities of the predicted classes.
    """
    labels, predicted = split.labels.cpu().numpy(), logits.argmax(axis=1)
    confidence = softmax(logits).max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    index = wrong[_select_evenly(labels[wrong] * logits.shape[1] + predicted[wrong], limit)]
    return {
        "mistakes": split.images[torch.from_numpy(index)].cpu().numpy(),
        "mistake_index": index,
        "mistake_true": labels[index],
        "mistake_predicted": predicted[index],
        "mistake_confidence": confidence[index],
    }


def _select_evenly(cells: IntArray, limit: int) -> IntArray:
    """Select at most `limit` indices into `cells`, evenly distributed over the values of `cells`.

    The result is in ascending order, and contains the first `MOST_CONFIDENT` indices.
    """
    by_cell = np.argsort(cells, kind="stable")
    _, starts, counts = np.unique(cells[by_cell], return_index=True, return_counts=True)
    rank, size = np.empty_like(by_cell), np.empty_like(by_cell)
    rank[by_cell] = np.arange(len(cells)) - np.repeat(starts, counts)  # position within the cell
    size[by_cell] = np.repeat(counts, counts)
    rank[:MOST_CONFIDENT] = -1
    return np.sort(np.lexsort((-size, rank))[:limit])
