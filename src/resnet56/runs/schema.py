"""The files of a run: what each of them holds, checked whenever one is read or written.

The types are those that Python users see, for example as the result of `train` and `evaluate`:
JSON objects are dictionaries, typed as TypedDict. A field that is missing, of another type or out
of range ends in one line: the file, the field, what was found and what is expected. Fields that a
type does not name are kept.
"""

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from resnet56.errors import RunError, one_line
from resnet56.files import read_json, to_json, write_arrays, write_json

T = TypeVar("T")

LARGEST = 2**53  # whole numbers above are not exact in every JSON reader
MOST_ARRAY_BYTES = 1 << 30  # of an .npz file, unpacked

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Ordinal = Annotated[int, Meta(ge=1, le=LARGEST)]
# A mean of shares may exceed 1 in its last digit, and a loss fall below 0.
Share = Annotated[float, Meta(ge=0, le=1 + 1e-9)]
Loss = Annotated[float, Meta(ge=-1e-6, le=1e300)]  # in nats
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Text = Annotated[str, Meta(max_length=100_000)]


# environment.json


class Origin(TypedDict):
    """The images of a run."""

    origin: Text  # what `--data` takes to load them again
    source: Text  # a sentence: what was read, from where and how it was split
    mirrored: NotRequired[bool]  # whether training images were mirrored


class GitState(TypedDict):
    """The checkout that the package ran from."""

    commit: Text
    changed: bool  # whether files differ from the commit


class Teacher(TypedDict):
    """A network that a run was distilled from."""

    teacher: Text  # as the recipe names it
    arch: Text
    sha256: Text  # of its weights


class Environment(TypedDict, total=False):
    """What the numbers of a run depend on besides its recipe and images: environment.json."""

    processor: Text
    cores: Count | None
    threads: Count
    memory_gb: Amount
    system: Text
    device: Text
    precision: Text
    gpu: Text
    gpu_memory_gb: Amount
    cuda: Text | None
    cudnn: Count | None
    python: Text
    versions: dict[str, Text]
    command: Text
    git: GitState | None
    processes: Ordinal
    data: Origin
    execution: Text
    execution_reason: Text
    teachers: list[Teacher]
    resumed: "list[Environment]"  # the environment of each resumption


# metrics.jsonl


class EpochMetrics(TypedDict):
    """One epoch of a training: a line of metrics.jsonl."""

    epoch: Ordinal
    step: Count  # steps taken, over all epochs
    lr: Amount  # of the last step
    train_loss: Loss  # a running mean over augmented images
    train_accuracy: Share
    images_per_second: Amount
    seconds: Amount
    peak_memory_mb: NotRequired[Amount]
    holdout_loss: NotRequired[Loss]
    holdout_accuracy: NotRequired[Share]
    test_loss: NotRequired[Loss]
    test_accuracy: NotRequired[Share]
    threads: NotRequired[Ordinal]


# evaluation.json


class ClassMetrics(TypedDict):
    """How well one class is recognized; None where none of the images is of that class."""

    precision: Share | None  # 0 where the class is never predicted
    recall: Share | None
    f1: Share | None
    support: Count  # images of the class


class MeanMetrics(TypedDict):
    """Means over the classes that have images."""

    precision: Share
    recall: Share
    f1: Share
    classes: NotRequired[Ordinal]  # how many those are


class ConfusedPair(TypedDict):
    """Images of one class that are taken for another."""

    true: str
    predicted: str
    count: Ordinal
    share: Share  # of the true class


CalibrationBin = TypedDict(
    "CalibrationBin",
    {
        "from": Share,
        "to": Share,
        "count": Count,
        "confidence": Share | None,  # the mean; None where the bin is empty
        "accuracy": Share | None,
    },
)


class Calibration(TypedDict):
    """Whether the confidence means what it says."""

    ece: Share  # expected calibration error (Guo et al. 2017)
    brier: Annotated[float, Meta(ge=0, le=2 + 1e-9)]
    bins: Annotated[list[CalibrationBin], Meta(min_length=1)]


class Metrics(TypedDict):
    """What N predictions over C classes are worth."""

    accuracy: Share
    accuracy_interval: Annotated[list[Share], Meta(min_length=2, max_length=2)]  # Wilson, 95 %
    top2: Share
    top3: Share
    loss: Loss  # mean cross-entropy
    n: Ordinal
    confusion_matrix: list[list[Count]]  # [true class][predicted class]
    per_class: dict[str, ClassMetrics]
    macro: MeanMetrics  # plain means over the classes that have images
    weighted: MeanMetrics  # means weighted by support
    most_confused: list[ConfusedPair]
    calibration: Calibration


class BatchSpeed(TypedDict):
    """The speed of prediction with one batch size."""

    milliseconds_an_image: Amount
    images_per_second: Amount


class Speed(TypedDict):
    """The time from bytes to logits."""

    batch_1: BatchSpeed
    batch_256: BatchSpeed
    peak_memory_mb: NotRequired[Amount]


class Robustness(TypedDict):
    """Accuracy on corrupted images."""

    images: Ordinal
    severities: list[Ordinal]
    clean_accuracy: Share
    mean_accuracy: Share
    corruptions: dict[str, list[Share]]  # a value for each severity


class EmaCandidate(TypedDict):
    """One of the EMAs of a training."""

    decay: Share
    reestimated: bool  # whether batch norm's statistics were re-estimated for it
    holdout_loss: NotRequired[Loss]
    holdout_accuracy: NotRequired[Share]


class Evaluation(TypedDict):
    """How good a run's weights are: evaluation.json, and the result of `train`."""

    test: Metrics
    train: NotRequired[Metrics]  # without augmentation
    holdout: NotRequired[Metrics]
    weights: Text
    ema_decay: NotRequired[Share]  # of the weights, which are an EMA
    ema_candidates: NotRequired[list[EmaCandidate]]  # what it was chosen from
    epoch: Count
    step: Count
    device: Text
    precision: Text
    data: Text
    speed: NotRequired[Speed]
    robustness: NotRequired[Robustness]


# parity.json


class Comparison(TypedDict):
    """One network on two devices, or in two precisions."""

    a: Text
    b: Text
    images: Ordinal
    accuracy_a: Share
    accuracy_b: Share
    changed: Count  # images whose class differs
    median_difference: Amount  # of the logits
    largest_difference: Amount
    verdict: Text
    step: NotRequired[Count]


class Parity(TypedDict):
    """Whether device or precision matter: parity.json."""

    comparisons: list[Comparison]


# Arrays


@dataclass(frozen=True)
class ArrayType:
    """What an array of an .npz file must be; a size with a name is the same in all arrays."""

    kinds: str  # numpy's kinds of numbers: "u" with `bytes` for pixels, "iu" or "f"
    shape: tuple[int | str, ...]
    most: float = math.inf  # the largest value; the smallest is 0 unless `signed`
    signed: bool = False
    bytes: bool = False


_PIXELS = (3, 32, 32)
_INDEX = ArrayType("iu", ("mistakes",))
SAMPLES = {
    "originals": ArrayType("u", ("originals", *_PIXELS), bytes=True),
    "original_labels": ArrayType("iu", ("originals",)),
    "augmented": ArrayType("u", ("originals", "versions", *_PIXELS), bytes=True),
    "mistakes": ArrayType("u", ("mistakes", *_PIXELS), bytes=True),  # the most confident first
    "mistake_index": _INDEX,  # within the test set
    "mistake_true": _INDEX,
    "mistake_predicted": _INDEX,
    "mistake_confidence": ArrayType("f", ("mistakes",), most=1 + 1e-9),
}
PREDICTIONS = {
    "logits": ArrayType("f", ("images", "classes"), signed=True),
    "labels": ArrayType("iu", ("images",)),
    "indices": ArrayType("iu", ("images",)),  # within the test set
}


# Reading and writing


def read(file: Path, expected: type[T]) -> T:
    """The content of a JSON file of a run. Raises RunError."""
    return check(read_json(file), expected, str(file))


def write(file: Path, content: T, expected: type[T]) -> None:
    """Write a JSON file of a run, whole or not at all. Raises RunError."""
    write_json(file, check(content, expected, str(file)))


def check(content: object, expected: type[T], file: str) -> T:
    """`content` as `expected`, or RunError with the field that is not as it must be.

    Args:
        content: from JSON.
        expected: a TypedDict, for which `content` itself is returned, or a dataclass.
        file: for the message; may include a line number.
    """
    plain = content
    try:
        try:
            made = msgspec.convert(plain, expected)
        except UnicodeEncodeError:  # msgspec takes names of files that are not UTF-8 only in places
            plain = _encodable(content)
            made = msgspec.convert(plain, expected)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {_explained(error, plain, expected)}") from None
    return cast(T, content) if isinstance(made, dict) else made


def check_metrics(metrics: Metrics, place: str, classes: tuple[str, ...] | None = None) -> None:
    """RunError unless the parts of `metrics` fit together, and `classes` where they are given."""
    names, matrix = list(metrics["per_class"]), metrics["confusion_matrix"]
    if classes is not None and set(names) != set(classes):
        raise RunError(
            f"{place} is damaged: per_class has {len(names)} classes that are not the network's"
        )
    if [len(row) for row in matrix] != [len(names)] * len(names):
        raise RunError(f"{place} is damaged: its confusion matrix is not of {len(names)} classes")
    if sum(map(sum, matrix)) != metrics["n"]:
        raise RunError(
            f"{place} is damaged: its confusion matrix is not of n={metrics['n']} images"
        )
    for name, row in metrics["per_class"].items():
        if row["support"] and None in (row["precision"], row["recall"], row["f1"]):
            raise RunError(f"{place} is damaged: per_class.{one_line(name)} has images, no scores")
    bins = metrics["calibration"]["bins"]
    for one in bins:
        if one["count"] and (one["confidence"] is None or one["accuracy"] is None):
            raise RunError(f"{place} is damaged: a calibration bin has images, but no numbers")
    if not any(one["count"] for one in bins):
        raise RunError(f"{place} is damaged: its calibration bins are empty")


def check_evaluation(
    evaluation: Evaluation, file: Path, classes: tuple[str, ...] | None = None
) -> None:
    """RunError unless the parts of evaluation.json fit together."""
    for part in ("test", "train", "holdout"):
        if part in evaluation:
            check_metrics(evaluation[part], f"{file}, {part},", classes)
    robustness = evaluation.get("robustness")
    if robustness:
        for name, values in robustness["corruptions"].items():
            if len(values) != len(robustness["severities"]):
                raise RunError(
                    f"{file} is damaged: robustness.corruptions.{one_line(name)} is not of "
                    f"{len(robustness['severities'])} severities"
                )


def save_arrays(
    file: Path, types: Mapping[str, ArrayType], arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write an .npz file of a run, whole or not at all. Raises RunError."""
    _check_arrays(arrays, types, file)
    write_arrays(file, **arrays)


def load_arrays(file: Path, types: Mapping[str, ArrayType]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file of a run. Raises RunError."""
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_ARRAY_BYTES:
                raise ValueError("it would unpack to more than a gigabyte")
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in types if name in content}
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or one_line(error)}") from None
    except Exception as error:  # the readers of zip and npy raise anything for a damaged file
        raise RunError(f"{file} is damaged: {one_line(error)}") from None
    _check_arrays(arrays, types, file)
    return arrays


def _check_arrays(
    arrays: Mapping[str, npt.NDArray[Any]], types: Mapping[str, ArrayType], file: Path
) -> None:
    sizes: dict[str, int] = {}
    for name, expected in types.items():
        if name not in arrays:
            raise RunError(f"{file} is damaged: {name} is missing")
        array = arrays[name]
        where, shape = f"{file} is damaged: {name}", tuple(array.shape)
        if array.dtype.kind not in expected.kinds or (expected.bytes and array.dtype != np.uint8):
            what = "bytes" if expected.bytes else "floats" if expected.kinds == "f" else "integers"
            raise RunError(f"{where} is of {array.dtype}, expected {what}")
        wanted = tuple(
            sizes.setdefault(size, shape[i]) if isinstance(size, str) and i < len(shape) else size
            for i, size in enumerate(expected.shape)
        )
        if shape != wanted:
            raise RunError(f"{where} is of shape {shape}, expected {wanted}")
        if not array.size:
            continue
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RunError(f"{where} has values that are not finite")
        if high > expected.most or (low < 0 and not expected.signed):
            raise RunError(f"{where} has values from {low:g} to {high:g}, out of range")


def _encodable(content: Any) -> Any:
    """A copy with escapes in place of what no encoding knows."""
    if isinstance(content, Mapping):
        return {_encodable(key): _encodable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_encodable(value) for value in content]
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace").decode()
    return content


# Messages

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _explained(error: Exception, content: object, expected: Any) -> str:
    """What msgspec says, with the field's full name and what was found there."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    text, _, path = str(error).partition(" - at `$")
    steps = _located(path.rstrip("`"), content, expected)
    if match := re.fullmatch(r"Object missing required field `(.*)`", text):
        return f"{_joined([*steps, match[1]])} is missing"
    place = _joined(steps) or "it"
    if match := re.fullmatch(r"Expected `([\w |]+)`(.*?)(?:, got .*)?", text):
        words = " or ".join(_WORDS.get(word, word) for word in match[1].split(" | "))
        bounds = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):g}", match[2])
        return f"{place} is {_found(content, steps)}, expected {words}{bounds}"
    if text == "Number out of range":
        return f"{place} is {_found(content, steps)}, out of range"
    return f"{place}: {one_line(text)}" if steps else one_line(text)


def _located(path: str, content: Any, expected: Any) -> list[str | int]:
    """msgspec's path, as `.a[2].b`, as keys and indices.

    msgspec writes `[...]` for every key of a mapping: which one it means is found by leaving the
    others out.
    """
    before, wildcard, after = path.partition("[...]")
    steps = _steps(before)
    if not wildcard:
        return steps
    for key, value in _at(content, steps).items():
        try:
            msgspec.convert(_replaced(content, steps, {key: value}), expected)
        except msgspec.ValidationError as error:
            if f"`${path}`" in str(error):
                return [*steps, key, *_steps(after)]
    return steps


def _steps(path: str) -> list[str | int]:
    return [int(i) if i else name for i, name in re.findall(r"\[(\d+)\]|\.(\w+)", path)]


def _joined(steps: list[str | int]) -> str:
    names = (f"[{step}]" if isinstance(step, int) else f".{one_line(step)}" for step in steps)
    return "".join(names).removeprefix(".")


def _at(content: Any, steps: list[str | int]) -> Any:
    for step in steps:
        content = content[step]
    return content


def _found(content: Any, steps: list[str | int]) -> str:
    """The value at the end of `steps`, in short."""
    value = _at(content, steps)
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    try:
        return one_line(to_json(value))[:60]
    except TypeError:
        return f"of type {type(value).__name__}"


def _replaced(content: Any, steps: list[str | int], value: object) -> Any:
    """A copy of `content` with `value` at the end of `steps`."""
    if not steps:
        return value
    first, rest = steps[0], steps[1:]
    if isinstance(first, int):
        return [_replaced(v, rest, value) if i == first else v for i, v in enumerate(content)]
    return {**content, first: _replaced(content[first], rest, value)}
