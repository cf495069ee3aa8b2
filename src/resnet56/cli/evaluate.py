"""The `resnet56 evaluate` command."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from resnet56 import recipe as recipes
from resnet56.cli.arguments import parse
from resnet56.cli.common import Data, Threads, for_classes, load_data, say, show_progress
from resnet56.errors import UsageError

if TYPE_CHECKING:
    import torch

    from resnet56.data.dataset import Dataset, Split
    from resnet56.evaluation import EvaluatedModel
    from resnet56.export import OnnxModel
    from resnet56.runs.checkpoint import Checkpoint
    from resnet56.runs.directory import RunDirectory
    from resnet56.runtime import Precision


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a model. For a run on its own data, save the results in the run directory."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|NAME|FILE")]
    """Run directory, model hub directory, exported file, or name of a pretrained model."""

    data: Data = None
    """Data set: a name, an image directory, or a directory with the .npy files of CIFAR-10-C or
    CIFAR-10.1. By default, the data of the run."""

    split: Literal["test", "train", "validation"] = "test"
    """Split to print. A run on its own data is evaluated on all splits."""

    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per core that is not in use."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward pass."""

    robustness: int = 500
    """Number of test images for the robustness test (ten corruptions, five severities). 0 skips the
    test."""

    parity: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Compare two devices (cpu,cuda), precisions (fp32,bf16) or runtimes (torch,onnx) on the test
    images."""

    json: bool = False
    """Print all results as JSON."""


def run(arguments: list[str]) -> int:
    """Run `resnet56 evaluate`."""
    options = parse(EvaluateOptions, arguments, "resnet56 evaluate")
    from resnet56 import runtime
    from resnet56.cli.tables import show_metrics
    from resnet56.evaluation import evaluated_model
    from resnet56.files import to_json
    from resnet56.runs.pretrained import is_onnx
    from resnet56.runs.sources import open_model
    from resnet56.threads import set_threads

    if options.robustness < 0:
        raise UsageError(f"--robustness must be at least 0, not {options.robustness}")
    if is_onnx(Path(options.run)):
        return _evaluate_onnx(options)
    device = runtime.resolve_device(options.device)
    if options.threads is not None or device.type == "cpu":
        set_threads(options.threads)
    precision = runtime.resolve_precision(options.precision, device)
    source = open_model(options.run)
    checkpoint, run = source.checkpoint, source.run
    if _is_benchmark(options.data):
        if options.parity is not None:
            raise UsageError("--parity does not support CIFAR-10-C and CIFAR-10.1; omit --data")
        _evaluate_benchmark(evaluated_model(checkpoint, device, precision), options)
        return 0

    if run is None and options.data is None:
        raise UsageError(f"{options.run} is not a run, so --data is required")
    net = checkpoint.config
    dataset = load_data(
        options.data,
        own=run.data_origin() if run else None,
        evaluation=True,
        skip_broken=options.skip_broken,
    )
    own = run is not None and dataset.fingerprint() == checkpoint.metadata.get("data")
    if not own:
        dataset = for_classes(dataset, net.classes)
        if run is not None:
            say("these are not the data of the run, so the results are not saved")
    title = f"{net.arch} on the {options.split} images; {dataset.source}"
    if options.parity is not None:
        _compare(checkpoint, dataset.test, options, device, save_to=run if own else None)
    elif own and run is not None:
        _evaluate_run(run, dataset, options, device, precision, title)
    else:
        split = _other_split(dataset, options)
        with show_progress(f"{len(split):,} images", len(split)) as advance:
            metrics = evaluated_model(checkpoint, device, precision).metrics(split, advance)
        print(to_json(metrics)) if options.json else show_metrics(metrics, title)
    return 0


def _is_benchmark(data: str | None) -> bool:
    from resnet56.data.arrays import is_benchmark

    return data is not None and data.strip() != "" and is_benchmark(Path(data))


def _other_split(dataset: "Dataset", options: EvaluateOptions) -> "Split":
    """Return the split to evaluate if the data are not those of the run."""
    if options.split == "validation":
        raise UsageError("only a run on its own data has validation images; choose another --split")
    split = dataset.test if options.split == "test" else dataset.train
    if not len(split):
        raise UsageError(
            f"the data contain no {options.split} images of the model's classes; choose another "
            "--split"
        )
    return split


def _evaluate_onnx(options: EvaluateOptions) -> int:
    """Evaluate an ONNX file in ONNX Runtime on the images of `--data`."""
    from resnet56.cli.tables import show_metrics
    from resnet56.export import OnnxModel
    from resnet56.files import to_json
    from resnet56.predict import OnnxBackend

    if options.parity is not None:
        raise UsageError("--parity requires a PyTorch model, not an ONNX file")
    if options.device not in ("auto", "cpu") or options.precision not in ("auto", "fp32"):
        raise UsageError("an ONNX file runs on the CPU in fp32; omit --device and --precision")
    if options.data is None:
        raise UsageError(f"{options.run} is not a run, so --data is required")
    model = OnnxModel(OnnxBackend.from_file(Path(options.run), options.threads))
    if _is_benchmark(options.data):
        _evaluate_benchmark(model, options)
        return 0
    dataset = load_data(options.data, evaluation=True, skip_broken=options.skip_broken)
    dataset = for_classes(dataset, model.config.classes)
    split = _other_split(dataset, options)
    with show_progress(f"{len(split):,} images", len(split)) as advance:
        metrics = model.metrics(split, advance)
    title = f"{model.config.arch} in ONNX Runtime on the {options.split} images; {dataset.source}"
    print(to_json(metrics)) if options.json else show_metrics(metrics, title)
    return 0


def _evaluate_benchmark(evaluated: "EvaluatedModel | OnnxModel", options: EvaluateOptions) -> None:
    """Evaluate on the arrays of CIFAR-10-C or CIFAR-10.1."""
    from resnet56.cli.tables import show_accuracies
    from resnet56.data.arrays import load_benchmark
    from resnet56.files import to_json

    metrics = {}
    for name, images in load_benchmark(Path(options.data or ""), len(evaluated.config.classes)):
        with show_progress(f"{len(images):,} images ({name})", len(images)) as advance:
            metrics[name] = evaluated.metrics(images, advance)
    print(to_json(metrics)) if options.json else show_accuracies(metrics)


def _evaluate_run(
    run: "RunDirectory",
    dataset: "Dataset",
    options: EvaluateOptions,
    device: "torch.device",
    precision: "Precision",
    title: str,
) -> None:
    """Evaluate a run on its own data and save the results in the run directory."""
    from resnet56.cli import tables
    from resnet56.evaluation import evaluate_run, measure_extras
    from resnet56.files import read_json, to_json
    from resnet56.training import augmentation_of

    recipe = recipes.from_fields(read_json(run.recipe_file), str(run.recipe_file))
    if options.split == "validation" and recipe.val_size == 0:
        raise UsageError(f"{run.path} has no validation images; train with --val-size N")
    evaluate_run(
        run,
        dataset,
        device=device,
        precision=precision,
        val_size=recipe.val_size,
        augmentation=augmentation_of(recipe, allow_flip=dataset.allow_flip),
        progress=show_progress,
    )
    robustness = min(options.robustness, len(dataset.test))
    result = measure_extras(
        run,
        dataset,
        device=device,
        precision=precision,
        robustness=robustness,
        progress=show_progress,
    )
    if options.json:
        print(to_json(result))
    else:
        tables.show_metrics(result[options.split], title)
        tables.show_extras(result)


def _compare(
    checkpoint: "Checkpoint",
    split: "Split",
    options: EvaluateOptions,
    device: "torch.device",
    save_to: "RunDirectory | None",
) -> None:
    """Compare the model in the two configurations of `--parity`."""
    from resnet56 import runtime
    from resnet56.cli.tables import show_comparison
    from resnet56.evaluation import Classifier, compare, evaluated_model
    from resnet56.files import to_json

    sides = options.parity or ""
    names: list[str] = []
    evaluated_models: list[Classifier] = []
    for side in sides.split(","):
        if side == "onnx":
            from resnet56.export import OnnxModel

            names.append("ONNX Runtime")
            evaluated_models.append(OnnxModel.from_checkpoint(checkpoint, options.threads))
            continue
        is_device = side != "torch" and side not in runtime.DTYPES
        side_device = runtime.resolve_device(side) if is_device else device
        precision = runtime.resolve_precision(
            side if side in runtime.DTYPES else "fp32", side_device
        )
        names.append(f"{side_device} {precision}")
        evaluated_models.append(evaluated_model(checkpoint, side_device, precision))
    if len(names) != 2:
        raise UsageError(
            f"--parity requires a pair, such as cpu,cuda or fp32,bf16 or torch,onnx, not {sides!r}"
        )
    comparison = compare(
        evaluated_models[0], evaluated_models[1], (names[0], names[1]), split, show_progress
    )
    if save_to is not None:
        save_to.add_comparison(comparison, checkpoint.progress.step)
    print(to_json(comparison)) if options.json else show_comparison(comparison)
