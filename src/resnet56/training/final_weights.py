"""Evaluate weights during training, and select the best EMA after the last epoch."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, channels_last, nn

from resnet56.data.batches import seeded
from resnet56.data.dataset import Split
from resnet56.ema import REESTIMATION_DECAY, REESTIMATION_IMAGES, reestimate_batch_norm
from resnet56.evaluation import evaluate
from resnet56.model import build
from resnet56.training.fine_tuning import freeze
from resnet56.training.setup import TrainingSetup


def measure(
    setup: TrainingSetup, name: str, split: Split, weights: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the loss and accuracy of `weights`, as `NAME_loss` and `NAME_accuracy`.

    Raises:
        NotFiniteError: an output is not finite.
    """
    config = setup.config
    with _loaded(setup, weights) as model:
        metrics = evaluate(model, split, config.classes, config.mean, config.std, setup.precision)
    return {f"{name}_loss": metrics["loss"], f"{name}_accuracy": metrics["accuracy"]}


def select_ema(
    setup: TrainingSetup, last_epoch: int
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """Select the EMA with the highest validation accuracy.

    Args:
        setup: the trainer with its EMAs, and the validation images.
        last_epoch: index of the epoch whose images are used to re-estimate batch norm statistics.

    Returns:
        The EMA weights (None without an EMA) and the metadata for the checkpoint.

    Raises:
        NotFiniteError: an output is not finite.
    """
    candidates: list[tuple[dict[str, Any], Mapping[str, Tensor]]] = []
    for ema in setup.trainer.emas:
        reestimated = ema.decay > REESTIMATION_DECAY
        weights = _reestimate(setup, ema.tensors, last_epoch) if reestimated else ema.tensors
        metrics: dict[str, Any] = {"decay": ema.decay, "reestimated": reestimated}
        if setup.validation is not None:
            metrics |= measure(setup, "val", setup.validation, weights)
        candidates.append((metrics, weights))
    if not candidates:
        return None, {}
    # The loss breaks ties. A single EMA needs no validation set.
    best, selected = max(
        candidates,
        key=lambda pair: (pair[0].get("val_accuracy", 0), -pair[0].get("val_loss", 0)),
    )
    metadata = {
        "ema_decay": best["decay"],
        "ema_candidates": [metrics for metrics, _ in candidates],
    }
    return selected, metadata


def _reestimate(
    setup: TrainingSetup, weights: Mapping[str, Tensor], epoch: int
) -> Mapping[str, Tensor]:
    """Return `weights` with batch norm statistics computed on images from an epoch."""
    # Only the main process runs this function, so the function uses global batches.
    batches = replace(setup.batches, rank=0, world_size=1)
    count = math.ceil(REESTIMATION_IMAGES / batches.global_batch)
    images = (images for images, _ in batches.epoch(epoch))
    # A custom model can use random numbers.
    random = seeded(setup.trainer.recipe.seed, setup.trainer.device)
    with _loaded(setup, weights) as model, random:
        frozen = freeze(model, setup.trainer.recipe.freeze)
        reestimate_batch_norm(model, itertools.islice(images, count), setup.precision, frozen)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextlib.contextmanager
def _loaded(setup: TrainingSetup, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Yield a model with `weights`.

    Some custom models do not support copying, so their own weights are replaced until the block
    ends.
    """
    if setup.trainer.custom.model is None:
        model = build(setup.config.arch, classes=len(setup.config.classes))
        model.to(setup.trainer.device, memory_format=channels_last)  # type: ignore[call-overload]
        model.load_state_dict(weights)
        yield model
        return
    custom = setup.trainer.model
    own = {name: tensor.clone() for name, tensor in custom.state_dict().items()}
    custom.load_state_dict(weights)
    try:
        yield custom
    finally:
        custom.load_state_dict(own)
