"""Build the model, the trainer and the batches of a recipe."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet56.custom import Custom, make_model
from resnet56.data.augment import Augmentation
from resnet56.data.batches import Batches
from resnet56.data.dataset import Dataset, Split, channel_statistics, training_split
from resnet56.distillation import Teachers, fingerprint
from resnet56.distributed import Distributed, synchronize_batch_norm
from resnet56.errors import UsageError, option
from resnet56.execution import PreparedModel, prepare_model
from resnet56.model import build
from resnet56.recipe import Recipe
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.schema import CustomPart, InitialWeights, Teacher
from resnet56.runs.sources import open_model
from resnet56.runtime import Precision, resolve_precision
from resnet56.step import Trainer
from resnet56.training.fine_tuning import freeze, load_weights


@dataclass(frozen=True)
class TrainingSetup:
    """The objects that training creates from a recipe and a data set.

    Attributes:
        config: architecture, classes and normalization of the model.
        precision: precision of the forward and backward passes.
        trainer: performs the training steps.
        prepared: the forward pass of the model, and its execution mode.
        batches: training batches on the device.
        validation: validation images, or None.
        teachers: entries for environment.json.
        initial_weights: entry for environment.json, or None if training starts from random weights.
        custom: names and hashes of the custom parts, for environment.json.
    """

    config: ModelConfig
    precision: Precision
    trainer: Trainer
    prepared: PreparedModel
    batches: Batches
    validation: Split | None
    teachers: list[Teacher]
    initial_weights: InitialWeights | None
    custom: dict[str, CustomPart]


def set_up(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    dist: Distributed,
    saved: Checkpoint | None = None,
    custom: Custom | None = None,
) -> TrainingSetup:
    """Build the model, the trainer and the batches of a training run.

    Args:
        recipe: the training configuration.
        dataset: training images.
        device: training device.
        dist: rank and world size.
        saved: checkpoint to continue from, or None. If a checkpoint is given, the function ignores
            the initial weights of the recipe.
        custom: parts that replace built-in ones, or None.

    Raises:
        RunError: the initial weights or the weights of a teacher do not exist or are damaged.
        UsageError: the validation set, the execution mode, the initial weights, the frozen layers,
            a teacher or a custom part cannot be used.
        TrainingError: a custom part raises an exception.
    """
    custom = custom or Custom()
    precision = resolve_precision(recipe.precision, device)
    training, validation = training_split(dataset, recipe.val_size)
    if custom.loss is not None and recipe.teacher and recipe.teacher_weight == 1:
        raise UsageError(
            "the loss has no effect, because the loss on the labels has weight 0; set "
            f"{option('teacher_weight')} below 1"
        )
    if recipe.freeze and not recipe.weights and custom.model is None:
        raise UsageError(
            f"{option('freeze')} requires {option('weights')}, because frozen layers would keep "
            "their random weights"
        )
    start = saved
    if recipe.weights and saved is None:
        start = open_model(recipe.weights).checkpoint
    # Use the normalization constants of the initial weights.
    if start is not None:
        mean, std = start.config.mean, start.config.std
    else:
        mean, std = channel_statistics(training.images)
    parts = custom.identities()
    arch = parts["model"]["name"] if "model" in parts else recipe.arch
    config = ModelConfig(arch, dataset.classes, mean, std)
    teachers = {name: open_model(name).checkpoint for name in recipe.teacher}
    ensemble = Teachers(teachers, config, device, precision) if teachers else None
    classes = len(dataset.classes)
    images = training.images[: recipe.batch_size]
    custom.check(classes, images.to(device), mixed=recipe.mix != "none")
    model: nn.Module
    if custom.model is None:
        model = build(recipe.arch, classes=classes, seed=recipe.seed)
    else:
        model = make_model(custom.model, classes, device, recipe.seed)
        parts["model"]["parameters"] = sum(p.numel() for p in model.parameters())
    initial: InitialWeights | None = None
    if saved is not None:
        initial = saved.metadata.get("initial_weights")
    elif start is not None:
        initial = load_weights(model, start, recipe, config)
    trainer, prepared = _build_trainer(model, recipe, device, precision, dist, ensemble, custom)
    augmentation = augmentation_of(recipe, allow_flip=dataset.allow_flip)
    if custom.augment is not None:
        augmentation = replace(augmentation, function=custom.augmented)
    batches = Batches(
        training.to(device),
        mean,
        std,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        augmentation=augmentation,
        classes=classes,
        rank=dist.rank,
        world_size=dist.world_size,
    )
    records: list[Teacher] = [
        {"teacher": name, "arch": teacher.config.arch, "sha256": fingerprint(teacher)}
        for name, teacher in teachers.items()
    ]
    return TrainingSetup(
        config, precision, trainer, prepared, batches, validation, records, initial, parts
    )


def augmentation_of(recipe: Recipe, *, allow_flip: bool) -> Augmentation:
    """Return the augmentation of a recipe, without flips unless `allow_flip` is set."""
    return Augmentation(
        padding=recipe.padding,
        flip=recipe.flip and allow_flip,
        alternate_flip=recipe.alternate_flip,
        cutout=recipe.cutout,
        trivial_augment=recipe.trivial_augment,
        sizes=recipe.sizes,
        mix=recipe.mix,
        mix_alpha=recipe.mix_alpha,
        mix_probability=recipe.mix_probability,
        plain_tail_from=recipe.epochs - recipe.plain_tail if recipe.plain_tail else None,
    )


def step_costs(recipe: Recipe) -> list[float]:
    """Return the duration of a step in each epoch, relative to that of a step on 32x32 images."""
    rest = [32] * (recipe.epochs - len(recipe.sizes))
    # A fifth of the duration of a step does not depend on the image size. Relative to the
    # duration for 32x32 images, the measured durations are 0.39 for 16x16 and 0.64 for 24x24 images
    # (resnet56, batch size 64, two CPU cores, results/fast-seed0).
    return [0.2 + 0.8 * (side / 32) ** 2 for side in (*recipe.sizes, *rest)][: recipe.epochs]


def _build_trainer(
    model: nn.Module,
    recipe: Recipe,
    device: torch.device,
    precision: Precision,
    dist: Distributed,
    teachers: Teachers | None,
    custom: Custom,
) -> tuple[Trainer, PreparedModel]:
    """Move the model to its device, and build its trainer and forward pass."""
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dist.world_size == 1:
        frozen = freeze(model, recipe.freeze)
        builtin = custom.model is None
        prepared = prepare_model(
            model,
            recipe.execution,
            precision,
            builtin=builtin,
            graph_step=custom.loss is None
            and custom.optimizer is None
            and recipe.optimizer == "sgd",
        )
        trainer = Trainer(
            model,
            prepared.module,
            recipe,
            precision,
            teachers,
            frozen=frozen,
            custom=custom,
            cuda_graphs=prepared.cuda_graphs,
        )
        return trainer, prepared
    if recipe.execution not in ("auto", "eager"):
        raise UsageError(
            f"{recipe.execution} execution does not support several processes; use "
            f"{option('execution', 'auto')}"
        )
    model = synchronize_batch_norm(model)
    frozen = freeze(model, recipe.freeze)
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids)
    # DDP need not broadcast the batch norm statistics, because they are already synchronized. Set
    # the attribute instead of the constructor argument, whose name depends on the PyTorch release.
    wrapped.broadcast_buffers = False
    prepared = PreparedModel(wrapped, "eager", "several processes require synchronized batch norm")
    trainer = Trainer(model, wrapped, recipe, precision, teachers, frozen=frozen, custom=custom)
    return trainer, prepared
