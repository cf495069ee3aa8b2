"""The `resnet56 evaluate` command."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Data, Threads, say, show_progress
from resnet56.cli.networks import ROBUSTNESS, data_for, evaluate_and_save, require_images
from resnet56.errors import UsageError

if TYPE_CHECKING:
    from resnet56.classifiers import Network
    from resnet56.data.dataset import Dataset, Split
    from resnet56.evaluation import Classifier


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a network. Results on the data set of the run are saved in the run directory.

    For an imported network, the data set of its first evaluation becomes the data set of the run.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|NAME|FILE")]
    """Run directory, model hub directory, exported file, or name of a pretrained model."""

    data: Data = None
    """Data set: a name, an image directory, or a directory with the .npy files of CIFAR-10-C or
    CIFAR-10.1. By default, the data set of the run."""

    split: Literal["test", "train", "validation"] | None = None
    """Split whose results are printed. By default, test. On the
    data set of the run, the command evaluates all splits. On
    another data set, it evaluates only this split."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per idle core."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """Precision of the forward pass. By default, fp32."""

    robustness: int | None = None
    """Number of test images for the robustness test (ten corruptions, five severities). By default,
    500. Use 0 to skip the test."""

    parity: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Compare two devices (cpu,cuda), precisions (fp32,bf16) or runtimes (torch,onnx) on the test
    images."""

    json: bool = False
    """Print all results as JSON."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 evaluate`."""
    options = parse(EvaluateOptions, arguments, "resnet56 evaluate")
    _check_flags(options)
    from resnet56.classifiers import open_network

    network = open_network(
        options.run,
        device=options.device,
        precision=options.precision or "fp32",
        threads=options.threads,
    )
    if _is_benchmark(options.data):
        _evaluate_benchmark(network.classifier, options)
        return 0
    dataset = data_for(network, options.data, skip_broken=options.skip_broken)
    own = network.has_own_data(dataset)
    if network.run is not None and not own:
        remedy = "; to save them, import the network again" if network.run.is_imported() else ""
        say(f"this is not the data set of the run, so the results are not saved{remedy}")
    if options.parity is not None:
        if own and network.data is None:
            own = False
            say(
                "the network has not been evaluated yet, so the comparison is not saved; to save "
                "it, run resnet56 evaluate without --parity first"
            )
        _compare(network, require_images(dataset.test, "test"), options, own=own)
        return 0
    from resnet56.cli import tables
    from resnet56.files import to_json

    split = options.split or "test"
    if own:
        robustness = ROBUSTNESS if options.robustness is None else options.robustness
        result: Any = evaluate_and_save(network, dataset, robustness=robustness, split=split)
    else:
        result = _evaluate(network, dataset, options, split)
    if options.json:
        print(to_json(result))
    else:
        runtime = f" in {result['runtime']}" if "runtime" in result else ""
        title = f"{network.config.arch}{runtime} on the {split} images; {dataset.source}"
        tables.show_metrics(result[split], title)
        tables.show_extras(result)
    return 0


def _check_flags(options: EvaluateOptions) -> None:
    """Raise UsageError if a flag is invalid or conflicts with another flag."""
    if options.robustness is not None and options.robustness < 0:
        raise UsageError(f"--robustness must be at least 0, not {options.robustness}")
    not_test = options.split not in (None, "test")
    if _is_benchmark(options.data):
        if options.parity is not None:
            raise UsageError(
                "--parity does not support CIFAR-10-C or CIFAR-10.1; choose another data set"
            )
        if options.robustness:
            raise UsageError("--robustness does not support CIFAR-10-C or CIFAR-10.1; omit it")
        if not_test:
            raise UsageError("CIFAR-10-C and CIFAR-10.1 contain only test images; omit --split")
    if options.parity is None:
        return
    sides = options.parity.split(",")
    if len(sides) != 2:
        raise UsageError(
            "--parity requires a pair, such as cpu,cuda or fp32,bf16 or torch,onnx, not "
            f"{options.parity!r}"
        )
    if not_test:
        raise UsageError("--parity compares predictions on the test images; omit --split")
    if options.robustness:
        raise UsageError("--parity and --robustness cannot be combined; run evaluate twice")
    if options.precision is not None:
        raise UsageError("--parity specifies the precisions; omit --precision")
    from resnet56.runtime import DTYPES

    if options.device != "auto" and not any(side == "torch" or side in DTYPES for side in sides):
        raise UsageError("--parity specifies the devices; omit --device")


def _is_benchmark(data: str | None) -> bool:
    from resnet56.data.arrays import is_benchmark

    return data is not None and data.strip() != "" and is_benchmark(Path(data))


def _evaluate(
    network: "Network", dataset: "Dataset", options: EvaluateOptions, name: str
) -> dict[str, Any]:
    """Evaluate a network on one split, without saving the results.

    Returns:
        The fields of evaluation.json, for the given split.
    """
    from resnet56.evaluation import conditions, inference_speed, measure_robustness

    if name == "validation":
        raise UsageError(
            "validation images exist only for the data set that a run was trained on; choose "
            "another --split"
        )
    split = require_images(dataset.test if name == "test" else dataset.train, name)
    if options.robustness:
        require_images(dataset.test, "test")
    robustness = ROBUSTNESS if options.robustness is None else options.robustness
    robustness = min(robustness, len(dataset.test))
    classifier = network.classifier
    with show_progress(f"{len(split):,} images", len(split)) as advance:
        result: dict[str, Any] = {name: classifier.metrics(split, advance)}
    result |= {**network.weights, **conditions(classifier, dataset)}
    result["speed"] = inference_speed(classifier, split.images)
    if robustness:
        result["robustness"] = measure_robustness(
            classifier, dataset.test, robustness, show_progress
        )
    return result


def _evaluate_benchmark(classifier: "Classifier", options: EvaluateOptions) -> None:
    """Evaluate a network on the arrays of CIFAR-10-C or CIFAR-10.1, and print the results."""
    from resnet56.cli.tables import show_accuracies
    from resnet56.data.arrays import load_benchmark
    from resnet56.files import to_json

    metrics = {}
    for name, images in load_benchmark(Path(options.data or ""), len(classifier.config.classes)):
        with show_progress(f"{len(images):,} images ({name})", len(images)) as advance:
            metrics[name] = classifier.metrics(images, advance)
    print(to_json(metrics)) if options.json else show_accuracies(metrics)


def _compare(network: "Network", split: "Split", options: EvaluateOptions, *, own: bool) -> None:
    """Compare the predictions of a network in the two configurations that `--parity` specifies.

    The result is saved in the run directory if `own` is True.
    """
    from resnet56 import runtime
    from resnet56.cli.tables import show_comparison
    from resnet56.evaluation import EvaluatedModel, compare, evaluated_model
    from resnet56.export import OnnxModel
    from resnet56.files import to_json

    opened = network.classifier
    names: list[str] = []
    classifiers: list[Classifier] = []
    for side in (options.parity or "").split(","):
        if side == "onnx":
            names.append("ONNX Runtime")
            if isinstance(opened, OnnxModel):
                classifiers.append(opened)
            else:
                classifiers.append(OnnxModel.from_checkpoint(network.checkpoint, options.threads))
            continue
        is_device = side != "torch" and side not in runtime.DTYPES
        device = runtime.resolve_device(side) if is_device else opened.device
        precision = runtime.resolve_precision(side if side in runtime.DTYPES else "fp32", device)
        names.append(f"{device} {precision}")
        if isinstance(opened, EvaluatedModel) and opened.device == device:
            classifiers.append(replace(opened, precision=precision))
        else:
            classifiers.append(evaluated_model(network.checkpoint, device, precision))
    first, second = classifiers
    comparison = compare(first, second, (names[0], names[1]), split, show_progress)
    if own and network.run is not None:
        network.run.add_comparison(comparison, network.weights["step"])
    print(to_json(comparison)) if options.json else show_comparison(comparison)
