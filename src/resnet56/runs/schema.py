"""The schema of the files in a run directory. Files are validated when read and when written.

JSON objects are represented as dictionaries with TypedDict types. `train` and `evaluate` also
return dictionaries of these types. RunError reports a field that is missing, has the wrong type or
is out of range. Its message is one line that states the file, the field, the value and the expected
type. Unknown fields are preserved.
"""

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from resnet56.errors import RunError, one_line
from resnet56.files import read_json, to_json, write_arrays, write_json

T = TypeVar("T")

MAX_INTEGER = 2**53  # Some JSON parsers do not represent larger integers exactly.
MAX_ARRAY_BYTES = 1 << 30  # maximum uncompressed size of an .npz file

Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
PositiveInt = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
# Rounding can make a mean of fractions slightly larger than 1, and a loss slightly negative.
Fraction = Annotated[float, Meta(ge=0, le=1 + 1e-9)]
Loss = Annotated[float, Meta(ge=-1e-6, le=1e300)]  # in nats
NonNegative = Annotated[float, Meta(ge=0, le=1e300)]
Interval = Annotated[list[Fraction], Meta(min_length=2, max_length=2)]
Text = Annotated[str, Meta(max_length=100_000)]


# environment.json


class Origin(TypedDict):
    """The data set of a run."""

    origin: Text  # the value of `--data` that loads the data set again
    source: Text  # a sentence that describes the data set, its source and its split
    flip: NotRequired[bool]  # whether training images are flipped horizontally


class GitState(TypedDict):
    """The git checkout of the package."""

    commit: Text  # the full hash of the commit
    changed: bool  # whether files differ from the commit


class Teacher(TypedDict):
    """A teacher for knowledge distillation."""

    teacher: Text  # run or pretrained model, as in the recipe
    arch: Text  # name of the architecture
    sha256: Text  # SHA-256 of the weights


class InitialWeights(TypedDict):
    """The weights that a run started from."""

    weights: Text  # run, file or pretrained model, as in the recipe
    arch: Text  # name of the architecture
    sha256: Text  # SHA-256 of the weights
    new_classifier: bool  # true if the classifier was newly initialized because the classes differ


class CustomPart(TypedDict):
    """A custom part of training that replaced the built-in part."""

    name: Text  # qualified name of the function or class
    sha256: Text  # SHA-256 of its source code and its settings
    parameters: NotRequired[Count]  # number of parameters, for a model


class Environment(TypedDict, total=False):
    """environment.json: the machine, software and data set of a run.

    For an imported network, the file describes the network's first evaluation.
    """

    processor: Text  # the name of the CPU
    cores: Count | None  # number of physical CPU cores, or null if unknown
    threads: Count  # number of CPU threads of PyTorch
    memory_gb: NonNegative  # main memory in GB
    system: Text  # operating system and version
    device: Text  # PyTorch device, such as cpu or cuda:0
    precision: Text  # fp32, bf16 or fp16
    gpu: Text  # the name of the GPU
    gpu_memory_gb: NonNegative  # GPU memory in GB
    cuda: Text | None  # CUDA version of PyTorch
    cudnn: Count | None  # cuDNN version, as a number
    python: Text  # Python version
    versions: dict[str, Text]  # version of each package, by name
    command: Text  # the command line that started the run
    git: GitState | None  # null outside a git checkout
    processes: PositiveInt  # number of training processes
    data: Origin  # the data set
    execution: Text  # execution mode: eager, fused, native, cuda-graph or compiled
    execution_reason: Text  # why a faster execution mode was not used
    teachers: list[Teacher]  # teachers for knowledge distillation
    initial_weights: InitialWeights  # weights that the run started from
    custom: dict[str, CustomPart]  # custom parts, by name: model, optimizer, loss and augment
    resumed: "list[Environment]"  # one environment for each time the run was resumed


# metrics.jsonl


class EpochMetrics(TypedDict):
    """One line of metrics.jsonl: the metrics of an epoch."""

    epoch: PositiveInt  # number of the epoch, starting at 1
    step: Count  # training steps since the start of the run
    lr: NonNegative  # learning rate of the last step
    train_loss: Loss  # mean loss over the epoch's augmented images
    train_accuracy: Fraction  # mean accuracy over the epoch's augmented images
    images_per_second: NonNegative  # training throughput
    seconds: NonNegative  # training time of the epoch
    peak_memory_mb: NotRequired[NonNegative]  # peak memory in MB (GPU memory if a GPU is used)
    val_loss: NotRequired[Loss]  # loss on the validation set
    val_accuracy: NotRequired[Fraction]  # accuracy on the validation set
    test_loss: NotRequired[Loss]  # loss on the test set (requires --test-every-epoch)
    test_accuracy: NotRequired[Fraction]  # accuracy on the test set (requires --test-every-epoch)
    threads: NotRequired[PositiveInt]  # number of CPU threads at the end of the epoch


# evaluation.json


class ClassMetrics(TypedDict):
    """Metrics of one class. They are null if the class has no images."""

    precision: Fraction | None  # fraction of predictions of this class that are correct; 0 if none
    recall: Fraction | None  # fraction of the class's images that are classified correctly
    f1: Fraction | None  # harmonic mean of precision and recall
    support: Count  # number of images of the class


class MeanMetrics(TypedDict):
    """Metrics averaged over the classes that have images."""

    precision: Fraction  # mean precision
    recall: Fraction  # mean recall
    f1: Fraction  # mean F1 score
    classes: NotRequired[PositiveInt]  # number of classes that have images


class ConfusedPair(TypedDict):
    """A confusion: images of one class that the model classifies as another class."""

    true: str  # name of the true class
    predicted: str  # name of the predicted class
    count: PositiveInt  # number of images
    fraction: Fraction  # fraction of the true class's images


CalibrationBin = TypedDict(
    "CalibrationBin",
    {
        "from": Fraction,  # lower bound of the confidence, exclusive
        "to": Fraction,  # upper bound of the confidence, inclusive
        "count": Count,  # number of images in the bin
        "confidence": Fraction | None,  # mean confidence, or null if the bin is empty
        "accuracy": Fraction | None,  # accuracy, or null if the bin is empty
    },
)


class Calibration(TypedDict):
    """The calibration of a model: how well its confidence matches its accuracy."""

    ece: Fraction  # expected calibration error (Guo et al. 2017)
    brier: Annotated[float, Meta(ge=0, le=2 + 1e-9)]  # Brier score, summed over classes (0 to 2)
    bins: Annotated[list[CalibrationBin], Meta(min_length=1)]  # equal-width confidence bins


class Metrics(TypedDict):
    """Metrics of the predictions on one set of images."""

    accuracy: Fraction  # top-1 accuracy
    accuracy_interval: Interval  # 95 % confidence interval of the accuracy (Wilson 1927)
    top2: Fraction  # top-2 accuracy
    top3: Fraction  # top-3 accuracy
    loss: Loss  # mean cross-entropy
    n: PositiveInt  # number of images
    confusion_matrix: list[list[Count]]  # numbers of images, by true class and predicted class
    per_class: dict[str, ClassMetrics]  # metrics of each class, by name
    macro: MeanMetrics  # unweighted means over classes
    weighted: MeanMetrics  # means over classes, weighted by support
    most_confused: list[ConfusedPair]  # most frequent confusions, in descending order of count
    calibration: Calibration  # calibration of the confidence


class BatchSpeed(TypedDict):
    """Inference speed at one batch size."""

    ms_per_image: NonNegative  # time per image in ms
    images_per_second: NonNegative  # throughput


class Speed(TypedDict):
    """Inference speed, from uint8 images to logits."""

    batch_1: BatchSpeed  # speed with batch size 1
    batch_256: BatchSpeed  # speed with batch size 256
    peak_memory_mb: NotRequired[NonNegative]  # peak memory in MB (GPU memory if a GPU is used)


class Robustness(TypedDict):
    """Accuracy on corrupted test images."""

    images: PositiveInt  # number of test images
    severities: list[PositiveInt]  # severities of the corruptions
    clean_accuracy: Fraction  # accuracy on the same images without corruption
    mean_accuracy: Fraction  # mean over all corruptions and severities
    corruptions: dict[str, list[Fraction]]  # accuracies under each corruption, one per severity


class EmaCandidate(TypedDict):
    """One of the exponential moving averages (EMA) of the weights in a run."""

    decay: Fraction  # decay per step
    reestimated: bool  # whether the batch norm statistics were re-estimated
    val_loss: NotRequired[Loss]  # loss on the validation set
    val_accuracy: NotRequired[Fraction]  # accuracy on the validation set


class Evaluation(TypedDict):
    """evaluation.json, and the result of `train`: the metrics for the weights of a run."""

    test: Metrics  # metrics on the test set
    train: NotRequired[Metrics]  # metrics on the training images without augmentation
    validation: NotRequired[Metrics]  # metrics on the validation set
    weights: Text  # which weights were evaluated: ema, final, imported, pretrained or exported
    ema_decay: NotRequired[Fraction]  # decay of the EMA weights
    ema_candidates: NotRequired[list[EmaCandidate]]  # all EMAs of the run
    epoch: Count  # number of finished epochs
    step: Count  # training steps since the start of the run
    device: Text  # device of the evaluation
    precision: Text  # precision of the evaluation: fp32, bf16, fp16 or, in ONNX Runtime, as stored
    runtime: NotRequired[Text]  # ONNX Runtime, if PyTorch was not used
    data: Text  # a sentence that describes the data set
    speed: NotRequired[Speed]  # inference speed
    robustness: NotRequired[Robustness]  # accuracy on corrupted images


# parity.json


class Comparison(TypedDict):
    """A comparison of the same weights on two devices or in two precisions."""

    a: Text  # first device or precision
    b: Text  # second device or precision
    images: PositiveInt  # number of test images
    accuracy_a: Fraction  # test accuracy of `a`
    accuracy_b: Fraction  # test accuracy of `b`
    changed: Count  # number of images with different predicted classes
    median_difference: NonNegative  # median absolute difference between the logits
    largest_difference: NonNegative  # largest absolute difference between the logits
    verdict: Text  # a sentence that states the result
    step: NotRequired[Count]  # training steps of the compared weights


class Parity(TypedDict):
    """parity.json: comparisons of devices, precisions or runtimes."""

    comparisons: list[Comparison]  # one comparison per pair of devices or precisions


# sweep.json


class SweepTrial(TypedDict):
    """A trial of a sweep: one training run per seed, all with the same set of values."""

    number: Count  # number of the trial, as in the names of its run directories
    state: Literal["complete", "pruned", "failed", "unfinished"]  # pruned: stopped early
    settings: dict[str, Any]  # value of each field that varies
    value: NotRequired[Fraction]  # mean validation accuracy over the seeds, if complete
    accuracies: list[Fraction]  # validation accuracy of each finished seed
    epochs: list[Fraction]  # validation accuracy after each epoch, one seed after the other
    error: NotRequired[Text]  # why the trial failed, if the loss was not finite


class Sweep(TypedDict):
    """sweep.json: the settings and the trials of `resnet56 sweep`."""

    study: Text  # name of the study in the database
    recipe: dict[str, Any]  # the recipe without the values of a trial
    data: Text  # description of the data set
    origin: Text  # the value of `--data`
    fingerprint: Text  # SHA-256 of the training images
    space: dict[str, dict[str, Any]]  # the values of each field: low, high and log, or choices
    seeds: list[Count]  # seeds of each trial
    grid: bool  # whether the sweep tries all combinations
    trials: list[SweepTrial]  # trials in the order of their numbers
    best: NotRequired[Count]  # number of the best complete trial
    command: NotRequired[Text]  # command that trains the best settings on all training images


# Arrays


@dataclass(frozen=True)
class ArrayType:
    """The type of an array in an .npz file.

    Dimensions with the same name have the same size in all arrays of the file.
    """

    kinds: str  # NumPy dtype kinds: "u", "iu" or "f"
    shape: tuple[int | str, ...]
    maximum: float = math.inf  # maximum value. The minimum is 0 unless `signed` is True.
    signed: bool = False
    bytes: bool = False  # whether the dtype must be uint8


_PIXELS = (3, 32, 32)
_INDEX = ArrayType("iu", ("mistakes",))
SAMPLES = {
    "originals": ArrayType("u", ("originals", *_PIXELS), bytes=True),
    "original_labels": ArrayType("iu", ("originals",)),
    "augmented": ArrayType("u", ("originals", "versions", *_PIXELS), bytes=True),
    # Mistakes are in descending order of confidence.
    "mistakes": ArrayType("u", ("mistakes", *_PIXELS), bytes=True),
    "mistake_index": _INDEX,  # indices into the test set
    "mistake_true": _INDEX,
    "mistake_predicted": _INDEX,
    "mistake_confidence": ArrayType("f", ("mistakes",), maximum=1 + 1e-9),
}
PREDICTIONS = {
    "logits": ArrayType("f", ("images", "classes"), signed=True),
    "labels": ArrayType("iu", ("images",)),
    "indices": ArrayType("iu", ("images",)),  # indices into the test set
}


# Reading and writing


def read(file: Path, expected: type[T]) -> T:
    """Read a JSON file of a run. Raises RunError if the file is damaged."""
    return check(read_json(file), expected, str(file))


def write(file: Path, content: T, expected: type[T]) -> None:
    """Write a JSON file of a run atomically. Raises RunError if writing fails."""
    write_json(file, check(content, expected, str(file)))


def check(content: object, expected: type[T], file: str) -> T:
    """Validate parsed JSON against a type and return it as that type.

    Args:
        content: parsed JSON.
        expected: a TypedDict type or a dataclass. For a TypedDict, `content` is returned unchanged.
        file: file name for the error message, optionally with a line number.

    Raises:
        RunError: a field is missing, has the wrong type or is out of range.
    """
    encodable = content
    try:
        try:
            converted = msgspec.convert(encodable, expected)
        except UnicodeEncodeError:  # msgspec rejects some file names that are not UTF-8.
            encodable = _encodable(content)
            converted = msgspec.convert(encodable, expected)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {_explanation(error, encodable, expected)}") from None
    return cast(T, content) if isinstance(converted, dict) else converted


def check_metrics(metrics: Metrics, source: str, classes: tuple[str, ...] | None = None) -> None:
    """Check that metrics are consistent.

    Args:
        metrics: the metrics to check.
        source: file name for the error message.
        classes: class names of the model, which `per_class` must match.

    Raises:
        RunError: two metrics contradict each other.
    """
    names, matrix = list(metrics["per_class"]), metrics["confusion_matrix"]
    if classes is not None and set(names) != set(classes):
        raise RunError(
            f"{source} is damaged: the {len(names)} classes in per_class differ from the classes "
            "of the model"
        )
    if [len(row) for row in matrix] != [len(names)] * len(names):
        raise RunError(
            f"{source} is damaged: confusion_matrix does not have {len(names)} rows and columns, "
            "one per class"
        )
    if sum(map(sum, matrix)) != metrics["n"]:
        raise RunError(f"{source} is damaged: the sum of confusion_matrix is not n={metrics['n']}")
    for name, scores in metrics["per_class"].items():
        if scores["support"] and None in (scores["precision"], scores["recall"], scores["f1"]):
            raise RunError(
                f"{source} is damaged: per_class.{one_line(name)} has images but no scores"
            )
    bins = metrics["calibration"]["bins"]
    for row in bins:
        if row["count"] and (row["confidence"] is None or row["accuracy"] is None):
            raise RunError(
                f"{source} is damaged: a calibration bin has images but no confidence or accuracy"
            )
    if not any(row["count"] for row in bins):
        raise RunError(f"{source} is damaged: all calibration bins are empty")


def check_evaluation(
    evaluation: Evaluation, file: Path, classes: tuple[str, ...] | None = None
) -> None:
    """Check that the metrics in evaluation.json are consistent. Raises RunError if they are not."""
    for part in ("test", "train", "validation"):
        if part in evaluation:
            check_metrics(evaluation[part], f"{file}, {part},", classes)
    robustness = evaluation.get("robustness")
    if robustness:
        for name, values in robustness["corruptions"].items():
            if len(values) != len(robustness["severities"]):
                raise RunError(
                    f"{file} is damaged: robustness.corruptions.{one_line(name)} does not have "
                    f"{len(robustness['severities'])} values, one per severity"
                )


def save_arrays(
    file: Path, types: Mapping[str, ArrayType], arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write an .npz file of a run atomically. Raises RunError if writing fails."""
    _check_arrays(arrays, types, file)
    write_arrays(file, **arrays)


def load_arrays(file: Path, types: Mapping[str, ArrayType]) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays from an .npz file of a run. Raises RunError if the file is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_ARRAY_BYTES:
                raise ValueError("its uncompressed size is more than 1 GiB")
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in types if name in content}
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or one_line(error)}") from None
    except Exception as error:  # Parsers can raise any exception for a damaged file.
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
        prefix, shape = f"{file} is damaged: {name}", tuple(array.shape)
        if array.dtype.kind not in expected.kinds or (expected.bytes and array.dtype != np.uint8):
            dtype = "uint8" if expected.bytes else "float" if expected.kinds == "f" else "integer"
            raise RunError(f"{prefix} has dtype {array.dtype}; expected {dtype}")
        expected_shape = tuple(
            sizes.setdefault(size, shape[i]) if isinstance(size, str) and i < len(shape) else size
            for i, size in enumerate(expected.shape)
        )
        if shape != expected_shape:
            raise RunError(f"{prefix} has shape {shape}; expected {expected_shape}")
        if not array.size:
            continue
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RunError(f"{prefix} has values that are not finite")
        if high > expected.maximum or (low < 0 and not expected.signed):
            raise RunError(f"{prefix} is out of range, with values from {low:g} to {high:g}")


def _encodable(content: Any) -> Any:
    """Return a copy of `content` in which characters that UTF-8 cannot encode are escaped."""
    if isinstance(content, Mapping):
        return {_encodable(key): _encodable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_encodable(value) for value in content]
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace").decode()
    return content


# Messages

_JSON_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _explanation(error: Exception, content: object, expected: Any) -> str:
    """Rewrite an error from msgspec to include the full name of the field and its value."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text, _, path = str(error).partition(" - at `$")
    keys = _keys_of(path.rstrip("`"), content, expected)
    if match := re.fullmatch(r"Object missing required field `(.*)`", text):
        return f"{_joined([*keys, match[1]])} is missing"
    field = _joined(keys) or "it"
    if match := re.fullmatch(r"Expected `([\w |]+)`(.*?)(?:, got .*)?", text):
        words = " or ".join(_JSON_TYPES.get(word, word) for word in match[1].split(" | "))
        bounds = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):g}", match[2])
        return f"{field} is {_summary(content, keys)}; expected {words}{bounds}"
    if text == "Number out of range":
        return f"{field} is {_summary(content, keys)}, out of range"
    return f"{field}: {one_line(text)}" if keys else one_line(text)


def _keys_of(path: str, content: Any, expected: Any) -> list[str | int]:
    """Split the path in an error from msgspec, such as `.a[2].b`, into keys and indices.

    msgspec writes `[...]` for the key of a mapping. This function checks each value of the mapping
    separately to find the key.
    """
    before, wildcard, after = path.partition("[...]")
    keys = _split(before)
    if not wildcard:
        return keys
    for key, value in _value_at(content, keys).items():
        try:
            msgspec.convert(_replace_at(content, keys, {key: value}), expected)
        except msgspec.ValidationError as error:
            if f"`${path}`" in str(error):
                return [*keys, key, *_split(after)]
    return keys


def _split(path: str) -> list[str | int]:
    return [int(i) if i else name for i, name in re.findall(r"\[(\d+)\]|\.(\w+)", path)]


def _joined(keys: list[str | int]) -> str:
    names = (f"[{key}]" if isinstance(key, int) else f".{one_line(key)}" for key in keys)
    return "".join(names).removeprefix(".")


def _value_at(content: Any, keys: list[str | int]) -> Any:
    for key in keys:
        content = content[key]
    return content


def _summary(content: Any, keys: list[str | int]) -> str:
    """Return a short description of the value at `keys`."""
    value = _value_at(content, keys)
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of length {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    try:
        return one_line(to_json(value))[:60]
    except TypeError:
        return f"of type {type(value).__name__}"


def _replace_at(content: Any, keys: list[str | int], value: object) -> Any:
    """Return a copy of `content` with the value at `keys` replaced by `value`."""
    if not keys:
        return value
    first, rest = keys[0], keys[1:]
    if isinstance(first, int):
        return [_replace_at(v, rest, value) if i == first else v for i, v in enumerate(content)]
    return {**content, first: _replace_at(content[first], rest, value)}
