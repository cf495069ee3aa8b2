"""Recipes: all settings that determine how a model is trained.

This module does not import PyTorch, so listing the recipes is fast. The docstring below each field
is also the help text of its flag.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from resnet56.errors import UsageError, one_line, option

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["step", "cosine", "one-cycle"]
Mixing = Literal["none", "cutmix", "mixup", "ricap"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Execution = Literal["eager", "fused", "native", "cuda-graph", "compiled"]
ExecutionChoice = Literal["auto", Execution]

MAX_VALUE = 1_000_000  # upper bound of settings that have no other limit


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run."""

    arch: str = "resnet56"
    """Architecture: resnet56 (basic blocks, shortcut A), resnet56-b, resnet56-bottleneck, plain56
    (no shortcuts), and other depths."""

    weights: str = ""
    """Initial weights: a run, a file or a pretrained model of the same architecture. If the classes
    differ, the classifier is initialized at random. The images are normalized with the constants
    stored with these weights. The weights must not have been trained on the validation images."""

    freeze: tuple[str, ...] = ()
    """Layers of --weights to freeze: conv1, bn1, stage1, stage2, stage3, a part of a stage such as
    stage3.0, or body (all layers except the classifier). The batch norm statistics of frozen layers
    do not change either."""

    epochs: int = 40
    """Number of epochs."""

    batch_size: int = 32
    """Number of images per step across all processes."""

    lr: float = 0.02
    """Peak learning rate."""

    optimizer: Optimizer = "sgd"
    """Optimizer. sgd: stochastic gradient descent with momentum; adamw: AdamW (Loshchilov & Hutter
    2019), which requires a much lower learning rate, such as 0.001."""

    momentum: float = 0.9
    """Momentum of SGD."""

    nesterov: bool = False
    """Use Nesterov momentum with SGD."""

    weight_decay: float = 1e-4
    """Weight decay. With SGD, the decay is an L2 penalty; with AdamW, it is decoupled from the
    gradient."""

    decay_norm: bool = True
    """Also apply weight decay to batch norm parameters and biases."""

    schedule: Schedule = "step"
    """Learning-rate schedule after the warm-up. step: drop at drop_epochs; cosine: cosine decay to
    zero; one-cycle: linear decay to zero."""

    drop_epochs: tuple[float, ...] = (10, 20, 30)
    """Epochs after which the step schedule multiplies the learning rate by drop_factor."""

    drop_factor: float = 0.5
    """Factor by which the step schedule multiplies the learning rate at each drop."""

    warmup_epochs: float = 0.0
    """Number of epochs over which the learning rate increases linearly from zero."""

    label_smoothing: float = 0.0
    """Label smoothing: fraction of the target to distribute evenly over all classes."""

    padding: int = 4
    """Number of black pixels to add on each side before a random 32x32 crop. 0 disables the
    crop."""

    flip: bool = True
    """Flip images horizontally at random. Digits are never flipped, because mirrored digits are not
    valid."""

    alternate_flip: bool = False
    """Flip each image in every other epoch instead of at random (Jordan 2024,
    arXiv:2404.00498)."""

    sizes: tuple[int, ...] = ()
    """Image sizes of the first epochs, in pixels. Later epochs use 32x32 images."""

    cutout: int = 0
    """Cutout: side length, in pixels, of a random square to set to the mean color. 0 disables
    Cutout."""

    trivial_augment: bool = False
    """TrivialAugment: before the crop, apply one of 14 geometric and color transforms, chosen at
    random, to each image (Müller & Hutter 2021, arXiv:2103.10158). TrivialAugment improves
    robustness."""

    mix: Mixing = "none"
    """Mix the images of a batch and their targets. cutmix: paste a rectangle of another image (Yun
    et al. 2019); mixup: blend two images (Zhang et al. 2018); ricap: combine crops of four images
    (Takahashi et al. 2018) instead of the padded crop. Cutout does not apply to mixed batches. For
    mixed batches, the training accuracy is the mean target probability of the predicted class."""

    mix_alpha: float = 1.0
    """Parameter of the beta distribution of the mixing ratio. With 1, the distribution is uniform.
    Lower values (0.3 in the RICAP paper) keep mixed images closer to one of the originals."""

    mix_probability: float = 1.0
    """Probability that a batch is mixed."""

    plain_tail: int = 0
    """Number of final epochs with only crops and flips, without mixing, Cutout or TrivialAugment. A
    run with no more than this number of epochs uses only crops and flips."""

    ema_decay: tuple[float, ...] = ()
    """Decay per step of an exponential moving average (EMA) of the weights. With one decay, the run
    uses the EMA weights. With several decays, the run uses the EMA with the highest accuracy on the
    validation images (see --val-size)."""

    teacher: tuple[str, ...] = ()
    """Teachers for knowledge distillation: runs or pretrained models. Several teachers form an
    ensemble. The teachers must not have been trained on the validation images."""

    teacher_weight: float = 1.0
    """Weight of the distillation loss. The loss on the labels has weight 1 - teacher_weight."""

    teacher_temperature: float = 1.0
    """Softmax temperature of the teachers and the student in the distillation loss."""

    teacher_random: bool = False
    """Use one random teacher in each step. This is faster than using all teachers, and the expected
    gradient is the same."""

    precision: Precision = "auto"
    """Numerical precision. auto: the fastest precision that the device supports in hardware."""

    execution: ExecutionChoice = "auto"
    """Implementation of the training step. All implementations agree to within rounding
    error. eager: PyTorch operations; fused: batch norm and ReLU in one kernel (CPU); native:
    kernels in bf16, in C (CPUs with AMX or AVX-512 BF16) or Triton (CUDA); cuda-graph: PyTorch
    operations in a CUDA graph; compiled: torch.compile, which takes about a minute to compile;
    auto: the first of native, fused, cuda-graph and eager that is available."""

    val_size: int = 0
    """Number of training images to use for validation instead of for training. The split is
    stratified and always the same."""

    seed: int = 0
    """Seed for the initial weights, the order of the images and the augmentation."""

    def __post_init__(self) -> None:
        """Check all values and their combinations. Raises UsageError for an invalid value."""
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _convert(name, kind, getattr(self, name)))
        bounds = f"from 1 to {MAX_VALUE:,}"
        _require(1 <= self.epochs <= MAX_VALUE, "epochs", self.epochs, bounds)
        _require(1 <= self.batch_size <= MAX_VALUE, "batch_size", self.batch_size, bounds)
        _require(0 < self.lr <= MAX_VALUE, "lr", self.lr, f"above 0 and at most {MAX_VALUE:,}")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        bounds = f"from 0 to {MAX_VALUE:,}"
        _require(0 <= self.weight_decay <= MAX_VALUE, "weight_decay", self.weight_decay, bounds)
        _require(0 <= self.warmup_epochs <= MAX_VALUE, "warmup_epochs", self.warmup_epochs, bounds)
        _require(
            all(0 < epoch <= MAX_VALUE for epoch in self.drop_epochs)
            and list(self.drop_epochs) == sorted(set(self.drop_epochs)),
            "drop_epochs",
            self.drop_epochs,
            f"above 0, ascending and at most {MAX_VALUE:,}",
        )
        _require(0 < self.drop_factor <= 1, "drop_factor", self.drop_factor, "in (0, 1]")
        _require(
            0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)"
        )
        _require(0 <= self.padding <= 31, "padding", self.padding, "from 0 to 31")
        _require(
            all(8 <= size <= 32 and size % 4 == 0 for size in self.sizes),
            "sizes",
            self.sizes,
            "multiples of 4 from 8 to 32",
        )
        _require(
            all(size == 32 for size in self.sizes[self.epochs - 1 :]),
            "sizes",
            self.sizes,
            f"fewer than the {self.epochs} epochs, because the last epoch uses 32x32 images",
        )
        _require(0 <= self.cutout <= 32, "cutout", self.cutout, "from 0 to 32")
        bounds = f"above 0 and at most {MAX_VALUE:,}"
        _require(0 < self.mix_alpha <= MAX_VALUE, "mix_alpha", self.mix_alpha, bounds)
        _require(
            0 < self.mix_probability <= 1, "mix_probability", self.mix_probability, "in (0, 1]"
        )
        bounds = f"from 0 to {MAX_VALUE:,}"
        _require(0 <= self.plain_tail <= MAX_VALUE, "plain_tail", self.plain_tail, bounds)
        _require(
            all(0 < decay < 1 for decay in self.ema_decay)
            and list(self.ema_decay) == sorted(set(self.ema_decay)),
            "ema_decay",
            self.ema_decay,
            "in (0, 1) and ascending",
        )
        _require(0 <= self.val_size < 10**9, "val_size", self.val_size, "at least 0 and below 10^9")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        if self.nesterov and self.momentum == 0:
            raise UsageError(f"{option('nesterov', True)} requires {option('momentum')} above 0")
        for name in ("teacher", "freeze"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), name, values, "all different")
        _require(0 < self.teacher_weight <= 1, "teacher_weight", self.teacher_weight, "in (0, 1]")
        bounds = f"above 0 and at most {MAX_VALUE:,}"
        temperature = self.teacher_temperature
        _require(0 < temperature <= MAX_VALUE, "teacher_temperature", temperature, bounds)
        if len(self.ema_decay) > 1 and self.val_size == 0:
            raise UsageError(
                "choosing between several values of ema_decay requires validation images; set "
                f"{option('val_size')}"
            )
        if self.alternate_flip and not self.flip:
            raise UsageError("alternate_flip requires flip")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, from which `from_fields` creates an equal recipe."""
        fields = dataclasses.asdict(self)
        fields |= {name: list(v) for name, v in fields.items() if isinstance(v, tuple)}
        return fields


def from_fields(fields: dict[str, Any], source: str) -> Recipe:
    """Create a recipe from a mapping. Missing fields get their default values.

    Args:
        fields: names and values of the fields.
        source: file name for error messages.

    Raises:
        UsageError: a field is unknown or has an invalid value.
    """
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(known)}"
            raise UsageError(f"{source}: a recipe has no field {name!r}{hint}")
    try:
        return Recipe(**fields)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def read(path: Path) -> Recipe:
    """Read a recipe from a JSON or TOML file.

    Raises:
        UsageError: the file cannot be read or parsed, or the recipe is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise UsageError(f"{path} is not valid {kind}: {str(error).splitlines()[0]}") from None
    if not isinstance(fields, dict):
        raise UsageError(
            f"{path} is not a recipe: the top level must be a JSON object or a TOML table"
        )
    return from_fields(fields, str(path))


def find(name: str) -> Recipe:
    """Return a named recipe, or read a recipe from a JSON or TOML file.

    Raises:
        UsageError: the name is unknown or the file is not a valid recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix in (".json", ".toml"):
        return read(Path(name))
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"unknown recipe {name!r}; {hint}choose {', '.join(RECIPES)} or a .json or .toml file"
    )


def _require(condition: bool, name: str, value: object, requirement: str) -> None:
    if not condition:
        raise UsageError(f"{name} must be {requirement}, not {one_line(value)}")


def _convert(name: str, kind: Any, value: Any) -> Any:
    """Convert a value to the type of its field, for example an integer to a float."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(
                f"{name} must be one of {', '.join(get_args(kind))}, not {one_line(repr(value))}"
            )
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            items = "names" if get_args(kind)[0] is str else "numbers"
            raise UsageError(f"{name} must be a list of {items}, not {one_line(repr(value))}")
        return tuple(_convert(name, get_args(kind)[0], item) for item in value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UsageError(f"{name} must be finite, not {number}")
        return number
    if type(value) is not kind:
        raise UsageError(f"{name} must be of type {kind.__name__}, not {one_line(repr(value))}")
    return value


# The settings of the original report. The report does not state the weight decay, which is 1e-4 in
# the ResNet paper.
REPORT = Recipe(arch="resnet56-bottleneck")

# He et al. 2015, section 4.2: the batch size is 128, and the learning rate of 0.1 is divided by 10
# after 32k and 48k of 64k iterations. With 390 steps per epoch, these iterations correspond to 82,
# 123 and 164 epochs.
HE2015 = Recipe(
    epochs=164, batch_size=128, lr=0.1, schedule="step", drop_epochs=(82, 123), drop_factor=0.1
)

# This recipe combines methods from the literature: a long cosine schedule, Nesterov momentum,
# CutMix in half of the batches and Cutout in the others, alternating flips and EMA weights. It
# reached 95.34 % test accuracy, the mean over three seeds (docs/results.md).
BEST = Recipe(
    epochs=250,
    batch_size=128,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    decay_norm=False,
    schedule="cosine",
    warmup_epochs=5,
    alternate_flip=True,
    cutout=16,
    mix="cutmix",
    mix_probability=0.5,
    plain_tail=12,
    ema_decay=(0.9995,),
)

# This was the fastest recipe that reached about 90 % accuracy on two CPU cores. The recipe was
# selected based on its accuracy on 5,000 validation images (docs/results.md). The first epochs use
# small images. Epochs at 16 and 24 pixels take two fifths and two thirds of the time of a full-size
# epoch, respectively. Alternating flips help wherever random flips help (Jordan 2024). The recipe
# does not use label smoothing, which worsens calibration.
FAST = Recipe(
    epochs=13,
    batch_size=64,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    schedule="one-cycle",
    warmup_epochs=2,
    alternate_flip=True,
    sizes=(16, 16, 16, 16, 24, 24, 24, 24, 24),
)

# Training on the digits with this recipe takes less than a minute on two cores. The batches are
# small, because an epoch has only 1,437 images.
QUICK = Recipe(
    epochs=6,
    batch_size=16,
    nesterov=True,
    weight_decay=5e-4,
    schedule="one-cycle",
    warmup_epochs=1,
    padding=2,
)

RECIPES = {"report": REPORT, "he2015": HE2015, "fast": FAST, "best": BEST, "quick": QUICK}

DESCRIPTIONS = {
    "report": "original report: bottleneck blocks, batch size 32, lr 0.02 halved every 10 epochs",
    "he2015": "He et al. 2015: batch size 128, lr 0.1 divided by 10 twice, 164 epochs",
    "fast": "about 90 % in 5 minutes on two cores with AMX (19 minutes without)",
    "best": "highest accuracy: cosine schedule, CutMix, Cutout, EMA, 250 epochs",
    "quick": "handwritten digits in less than a minute",
}
