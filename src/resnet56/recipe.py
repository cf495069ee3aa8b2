"""A recipe: everything that decides how a network is trained, in one frozen record.

Standard library only, so that listing recipes costs nothing. A field is documented below its
declaration; that sentence is the flag's help text too.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from resnet56.errors import UsageError, one_line

Schedule = Literal["step", "cosine", "one-cycle"]
Mixing = Literal["none", "cutmix", "mixup", "ricap"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Execution = Literal["eager", "fused", "native", "compiled"]
ExecutionChoice = Literal["auto", Execution]

LARGEST = 1_000_000  # of numbers that have no natural bound: more is a mistake


@dataclass(frozen=True)
class Recipe:
    """How to train; a value out of range is refused (UsageError)."""

    arch: str = "resnet56"
    """Network: resnet56 (basic blocks, shortcut A), resnet56-b, resnet56-bottleneck, plain56 (no
    shortcuts), and other depths."""

    epochs: int = 40
    """Passes over the training images."""

    batch_size: int = 32
    """Images a step, over all processes together."""

    lr: float = 0.02
    """Peak learning rate."""

    momentum: float = 0.9
    """Momentum of SGD."""

    nesterov: bool = False
    """Nesterov's momentum."""

    weight_decay: float = 1e-4
    """L2 penalty, added to the gradient."""

    decay_norm: bool = True
    """Whether batch norm's weights and all biases decay too."""

    schedule: Schedule = "step"
    """After the warm-up: drop at `drop_epochs`; fall to zero as a cosine; or in a line."""

    drop_epochs: tuple[float, ...] = (10, 20, 30)
    """Epochs after which `step` multiplies the learning rate by `drop_factor`."""

    drop_factor: float = 0.5
    """What `step` multiplies the learning rate by."""

    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises from zero in a line."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""

    padding: int = 4
    """Black pixels added on each side before a random 32x32 crop; 0 for no crop."""

    flip: bool = True
    """Mirror half of the images; left out where the data has a direction (digits)."""

    alternate_flip: bool = False
    """Mirror each image in every other epoch, not by chance: it is seen both ways equally often
    (Jordan 2024, arXiv:2404.00498)."""

    sizes: tuple[int, ...] = ()
    """Side in pixels of the first epochs' images, one number an epoch; 32 from then on."""

    cutout: int = 0
    """Side in pixels of a square set to the mean at a random place; 0 for none."""

    trivial_augment: bool = False
    """Before the crop, change each image's place or colour in one of 14 ways of random strength
    (Müller & Hutter 2021, arXiv:2103.10158): makes a network harder to upset."""

    mix: Mixing = "none"
    """Mix the images of a batch and their targets. cutmix: a rectangle of another image (Yun et al.
    2019); mixup: two images blended (Zhang et al. 2018); ricap: crops of four images side by side
    (Takahashi et al. 2018), instead of the padded crop. A mixed batch has no Cutout. Training
    accuracy then counts the share of the target that the predicted class has."""

    mix_alpha: float = 1.0
    """Both parameters of the beta distribution of the shares: 1 for uniform shares; the lower, the
    closer a mixed image is to one of the originals (RICAP's authors use 0.3)."""

    mix_probability: float = 1.0
    """Share of the batches that are mixed."""

    plain_tail: int = 0
    """Last epochs with crops and flips only: no mixing, Cutout or TrivialAugment."""

    ema_decay: tuple[float, ...] = ()
    """Decay per step of an exponential moving average (EMA) of the weights, which are then the
    run's weights; nothing for none. Of several decays, the one with the highest accuracy on the
    validation images (`holdout`) is chosen after the last epoch."""

    teacher: tuple[str, ...] = ()
    """Networks to distill from: runs, or names of pretrained networks. Several form an ensemble.
    They must not have been trained on the validation images."""

    teacher_weight: float = 1.0
    """Weight of the distillation loss; the loss of the labels has the rest of 1."""

    teacher_temperature: float = 1.0
    """Temperature that softens the predictions of teacher and student in the distillation loss."""

    teacher_random: bool = False
    """Ask one random teacher per step, not all: cheaper, with the same gradient on average."""

    precision: Precision = "auto"
    """Arithmetic: auto is the fastest that the device has in hardware."""

    execution: ExecutionChoice = "auto"
    """How a step runs, to the same numbers within rounding. eager: PyTorch's operations; fused:
    batch norm and ReLU in one kernel (CPU); native: everything in C, in bf16 (CPUs with AMX);
    compiled: torch.compile, after a minute; auto: native, fused or eager, the first that can be
    had."""

    holdout: int = 0
    """Training images kept out of training, to choose by; stratified, always the same ones."""

    seed: int = 0
    """Initial weights, order of images and augmentation are functions of it."""

    def __post_init__(self) -> None:
        """Check every value on its own and those that depend on each other."""
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, kind, getattr(self, name)))
        most = f"from 1 to {LARGEST:,}"
        _require(1 <= self.epochs <= LARGEST, "epochs", self.epochs, most)
        _require(1 <= self.batch_size <= LARGEST, "batch_size", self.batch_size, most)
        _require(0 < self.lr <= LARGEST, "lr", self.lr, f"above 0 and at most {LARGEST:,}")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        most = f"from 0 to {LARGEST:,}"
        _require(0 <= self.weight_decay <= LARGEST, "weight_decay", self.weight_decay, most)
        _require(0 <= self.warmup_epochs <= LARGEST, "warmup_epochs", self.warmup_epochs, most)
        _require(
            all(0 < epoch <= LARGEST for epoch in self.drop_epochs)
            and list(self.drop_epochs) == sorted(set(self.drop_epochs)),
            "drop_epochs",
            self.drop_epochs,
            f"above 0, rising and at most {LARGEST:,}",
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
            f"fewer than the {self.epochs} epochs, so that the last ones see 32x32",
        )
        _require(0 <= self.cutout <= 32, "cutout", self.cutout, "from 0 to 32")
        most = f"above 0 and at most {LARGEST:,}"
        _require(0 < self.mix_alpha <= LARGEST, "mix_alpha", self.mix_alpha, most)
        _require(
            0 < self.mix_probability <= 1, "mix_probability", self.mix_probability, "in (0, 1]"
        )
        _require(
            0 <= self.plain_tail <= self.epochs,
            "plain_tail",
            self.plain_tail,
            f"from 0 to the {self.epochs} epochs",
        )
        _require(
            all(0 < decay < 1 for decay in self.ema_decay)
            and list(self.ema_decay) == sorted(set(self.ema_decay)),
            "ema_decay",
            self.ema_decay,
            "in (0, 1) and rising",
        )
        _require(0 <= self.holdout < 10**9, "holdout", self.holdout, "at least 0 and below 10^9")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        if self.nesterov and self.momentum == 0:
            raise UsageError("nesterov needs a momentum above 0")
        _require(0 < self.teacher_weight <= 1, "teacher_weight", self.teacher_weight, "in (0, 1]")
        _require(
            self.teacher_temperature > 0, "teacher_temperature", self.teacher_temperature, "above 0"
        )
        if len(self.ema_decay) > 1 and self.holdout == 0:
            raise UsageError("several ema_decay need a holdout above 0, to choose one of them by")
        if self.alternate_flip and not self.flip:
            raise UsageError("alternate_flip needs flip")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON knows them; `from_fields` is the inverse."""
        fields = dataclasses.asdict(self)
        fields |= {name: list(v) for name, v in fields.items() if isinstance(v, tuple)}
        return fields


def from_fields(fields: dict[str, Any], where: str) -> Recipe:
    """A recipe from a mapping; fields that are absent keep their defaults.

    Raises:
        UsageError: a field that no recipe has, or a value out of range; `where` is named.
    """
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the fields: {', '.join(known)}"
            raise UsageError(f"{where}: a recipe has no field {name!r}{hint}")
    try:
        return Recipe(**fields)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def read(path: Path) -> Recipe:
    """The recipe in a JSON or TOML file.

    Raises:
        UsageError: a file that cannot be read or parsed, or what `from_fields` refuses.
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
        raise UsageError(f"{path} holds no recipe: its top level must be a table of fields")
    return from_fields(fields, str(path))


def find(name: str) -> Recipe:
    """The recipe of that name, or in that JSON or TOML file.

    Raises:
        UsageError: neither a known name nor a file.
    """
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix in (".json", ".toml"):
        return read(Path(name))
    close = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"unknown recipe {name!r}; {hint}choose {', '.join(RECIPES)}, or a .json or .toml file"
    )


def _require(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise UsageError(f"{name} must be {what}, not {one_line(value)}")


def _checked(name: str, kind: Any, value: Any) -> Any:
    """`value` as the field's type; a file may give 1 for 1.0 and a list for a tuple."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(
                f"{name} must be one of {', '.join(get_args(kind))}, not {one_line(repr(value))}"
            )
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name} must be a list of numbers, not {one_line(repr(value))}")
        return tuple(_checked(name, get_args(kind)[0], item) for item in value)
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


# The report that this project starts from, as it was written; it names no weight decay, and
# 1e-4 is what ResNet's authors and most who follow them use.
REPORT = Recipe(arch="resnet56-bottleneck")

# He et al. 2015, section 4.2: batch 128, learning rate 0.1 divided by 10 at 32k and 48k of 64k
# iterations; at 390 steps an epoch these are 82, 123 and 164 epochs.
HE2015 = Recipe(
    epochs=164, batch_size=128, lr=0.1, schedule="step", drop_epochs=(82, 123), drop_factor=0.1
)

# From the literature: long cosine, Nesterov, Cutout, flips in turn, averaged weights. 120 of the
# 200 epochs reached 94.83 % (docs/results.md).
BEST = Recipe(
    epochs=200,
    batch_size=128,
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    decay_norm=False,
    schedule="cosine",
    warmup_epochs=5,
    alternate_flip=True,
    cutout=16,
    ema_decay=(0.999,),
)

# The shortest way to about 90 % on two processor cores that was found: small images first, which
# cost two fifths and two thirds of the time, and a learning rate that rises and falls in lines;
# from trials with 5,000 training images held out (docs/results.md). Flips in turn helped Jordan
# 2024 wherever flips did. Smoothed labels are left out: they would cost the probabilities their
# meaning.
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

# The digits in about a minute on two cores: many small steps, since an epoch is 1,437 images.
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

ABOUT = {
    "report": "the original report: bottlenecks, batch 32, 0.02 halved every 10",
    "he2015": "the paper's: batch 128, 0.1 divided by 10 twice, 164 epochs",
    "fast": "about 90 % on two cores, in 5 minutes with AMX, 22 without: small images first",
    "best": "strong: cosine, Nesterov, Cutout, averaged weights, 200 epochs",
    "quick": "the handwritten digits in about a minute",
}
