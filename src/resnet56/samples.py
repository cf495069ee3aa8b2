"""Select images for the report: augmented training images and confident mistakes."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, augment, sample_params
from resnet56.data.dataset import Split, Triple
from resnet56.data.mixing import mix_images, sample_mix_params
from resnet56.metrics import FloatArray, softmax

MISTAKES = 24  # maximum number of mistakes
ORIGINALS, VARIANTS = 10, 5  # training images, and augmented versions of each


def augmented_samples(
    training: Split, mean: Triple, std: Triple, augmentation: Augmentation
) -> dict[str, Any]:
    """Augment one training image of each class, for at most `ORIGINALS` classes.

    Args:
        training: training images and labels.
        mean, std: channel statistics, for pixels in [0, 1].
        augmentation: augmentation of the training images.

    Returns:
        `originals` (K, 3, 32, 32) uint8, `original_labels` (K,), and `augmented`
        (K, V, 3, 32, 32) uint8.
    """
    labels = training.labels.cpu().numpy()
    index = torch.from_numpy(np.unique(labels, return_index=True)[1][:ORIGINALS])
    originals = training.images[index].cpu()
    images = originals.repeat_interleave(VARIANTS, dim=0)
    params = sample_params(len(images), augmentation, torch.Generator().manual_seed(0))
    means, stds = torch.tensor(mean), torch.tensor(std)
    augmented = augment(images, params, means, stds, augmentation)
    if augmentation.mix != "none":
        unmixed = augment(images, params, means, stds, augmentation.before_mixing())
        _mix_variants(augmented, unmixed, augmentation)
    # Undo the normalization. Pixels that Cutout erased become the mean.
    pixels = augmented * stds[:, None, None] + means[:, None, None]
    variants = (255 * pixels).round().clamp(0, 255).byte()
    return {
        "originals": originals.numpy(),
        "original_labels": labels[index],
        "augmented": variants.contiguous().view(-1, VARIANTS, 3, 32, 32).numpy(),
    }


def _mix_variants(augmented: Tensor, unmixed: Tensor, augmentation: Augmentation) -> None:
    """MixParams the same share of the variants as in training, but at least one variant.

    Args:
        augmented: (K * V, 3, 32, 32), changed in place.
        unmixed: the same images as augmented before mixing. The k-th variants of all originals
            form a batch.
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


def confident_mistakes(logits: FloatArray, split: Split) -> dict[str, Any]:
    """Return the wrong predictions with the highest confidence, in descending order.

    Args:
        logits: (N, C), of the images of `split`.
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
