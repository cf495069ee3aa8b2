"""The `resnet56 predict` command."""

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Threads, say
from resnet56.errors import Error, ImageError, UsageError, escape

if TYPE_CHECKING:
    import numpy.typing as npt

    from resnet56.data.images import FloatArray
    from resnet56.predict import Prediction

MAP_SUFFIX = ".cam.png"
PROGRESS_THRESHOLD = 64  # number of images above which a progress bar is shown


@dataclass(frozen=True)
class PredictOptions:
    """Classify images of any size, and print the most probable classes."""

    images: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE|DIR|- [...]")
    ]
    """Image files, image directories, or - for one image on stdin."""

    run: Annotated[str, tyro.conf.arg(metavar="RUN|NAME|FILE")] = "resnet56"
    """Run directory, model hub directory, exported file, or name of a pretrained model."""

    top: int = 3
    """Number of classes to print."""

    json: bool = False
    """Print one line of JSON per image."""

    csv: bool = False
    """Print comma-separated values with a header line."""

    cam: Path | None = None
    """Directory for class activation maps. NAME.cam.png shows an image with its map."""

    logits: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npz")] = None
    """File for the logits. It contains the arrays logits
    (N, classes), images (the N file names) and classes
    (the class names). Unreadable images are omitted."""

    features: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npz")] = None
    """File for the features after global average pooling. It
    contains the arrays features (N, channels), images and
    classes. --logits can write to the same file."""

    max_pixels: int | None = None
    """Maximum number of pixels per image. By default, 89 million, or 358 million for JPEG."""

    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:N or mps."""

    threads: Threads = None
    """Number of CPU threads. By default, one per core."""


@dataclass(frozen=True)
class Source:
    """An image to classify."""

    name: str
    image: Path | bytes
    map_name: str  # path relative to the --cam directory, without a suffix


def run(arguments: list[str]) -> int:
    """Run `resnet56 predict`. Return 1 if an image could not be read."""
    options = parse(PredictOptions, arguments, "resnet56 predict")
    if not options.images:
        raise UsageError("no images given; use resnet56 predict IMAGE|DIR|- ...")
    if options.json and options.csv:
        raise UsageError("--json and --csv cannot be combined")
    if options.top < 1:
        raise UsageError(f"--top must be at least 1, not {options.top}")
    if options.max_pixels is not None:
        if options.max_pixels < 1:
            raise UsageError(f"--max-pixels must be at least 1, not {options.max_pixels}")
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = options.max_pixels  # the limit applies to the entire process
    from resnet56.files import check_target
    from resnet56.predict import load

    given = {"logits": options.logits, "features": options.features}
    outputs = {name: file for name, file in given.items() if file is not None}
    for file in outputs.values():
        check_target(file)  # Check the file before classifying the images.
    predictor = load(options.run, options.device, threads=options.threads)
    sources, failed = _sources(options.images)
    top = min(options.top, len(predictor.classes))
    write = _writer("json" if options.json else "csv" if options.csv else "text", top)
    used_names: set[str] = set()
    names: list[str] = []
    rows: dict[str, list[FloatArray]] = {name: [] for name in outputs}
    results = predictor.stream(
        (source.image for source in sources), top=top, maps=options.cam is not None
    )
    with _progress_bar(len(sources)) as advance:
        for source, result in zip(sources, results, strict=True):
            try:
                if isinstance(result, ImageError):
                    raise result
                if options.cam is not None and result.map is not None:
                    _write_map(source, result.map, options.cam, used_names)
                write(source.name, result)
                names.append(source.name)
                for name, arrays in rows.items():
                    arrays.append(getattr(result, name))
            except ImageError as error:
                _print_error(error)
                failed += 1
            advance(1)
    if names:
        _write_outputs(outputs, names, predictor.classes, rows)
    if failed:
        inputs = "input" if failed == 1 else "inputs"
        say(f"resnet56: {failed:,} {inputs} could not be read")
    return 1 if failed else 0


def _write_outputs(
    files: Mapping[str, Path],
    images: Sequence[str],
    classes: Sequence[str],
    rows: "Mapping[str, Sequence[FloatArray]]",
) -> None:
    """Write the logits and the features of N images to their files, or to one file for both."""
    import numpy as np

    from resnet56.files import write_arrays

    contents: dict[Path, dict[str, npt.NDArray[Any]]] = {}
    for name, file in files.items():
        arrays = contents.setdefault(
            file.resolve(), {"images": np.array(images), "classes": np.array(classes)}
        )
        arrays[name] = np.stack(rows[name])
    for file, arrays in contents.items():
        write_arrays(file, **arrays)


def _sources(arguments: tuple[str, ...]) -> tuple[list[Source], int]:
    """Return the images that `arguments` specify, and the number of directories without images."""
    from resnet56.data.image_files import describe_skipped, find_images

    sources, failed = [], 0
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            sources.append(Source("-", sys.stdin.buffer.read(), "stdin"))
        elif path.is_dir():
            # An earlier call with --cam may have written maps to the same directory.
            found = find_images(path)
            files = [file for file in found.files if not file.name.endswith(MAP_SUFFIX)]
            if remark := describe_skipped(found.skipped):
                say(f"{escape(str(path))}: {remark}")
            if not files:
                _print_error(ImageError(f"{escape(str(path))} contains no images"))
                failed += 1
            for file in files:
                map_name = file.relative_to(path).with_suffix("").as_posix()
                sources.append(Source(str(file), file, map_name))
        elif path.is_fifo():  # for example, <(curl ...), which can be read only once
            sources.append(Source(argument, path.read_bytes(), path.stem))
        else:
            sources.append(Source(argument, path, path.stem))
    return sources, failed


def _print_error(error: Error) -> None:
    say(f"resnet56: {error}")


def _writer(output_format: str, top: int) -> Callable[[str, "Prediction"], None]:
    """Return a function that prints the prediction for an image."""
    if output_format == "json":
        from resnet56.files import to_json

        return lambda name, prediction: print(
            to_json(
                {
                    "image": name,
                    "label": prediction.label,
                    "probability": prediction.probability,
                    "probabilities": dict(prediction.probabilities),
                }
            )
        )
    if output_format == "csv":
        table = csv.writer(sys.stdout, lineterminator="\n")
        header = ["image"]
        for rank in range(1, top + 1):
            header += [f"label_{rank}", f"probability_{rank}"]
        table.writerow(header)

        def write_row(name: str, prediction: "Prediction") -> None:
            row = [name]
            for label, probability in prediction.probabilities.items():
                row += [label, f"{probability:.6f}"]
            table.writerow(row)

        return write_row

    def write_line(name: str, prediction: "Prediction") -> None:
        classes = (
            f"{escape(label)} {100 * probability:.1f} %"
            for label, probability in prediction.probabilities.items()
        )
        print(f"{escape(name)}: {', '.join(classes)}")

    return write_line


def _write_map(
    source: Source, class_map: "FloatArray", directory: Path, used_names: set[str]
) -> None:
    """Write an image, overlaid with its class activation map, to `directory`.

    This function reads the image again because the originals of a batch may not fit in memory.
    """
    from resnet56.data.images import overlay, read_image
    from resnet56.files import write_bytes

    name, number = source.map_name, 1
    while name in used_names:  # Several directories can contain images with the same name.
        number += 1
        name = f"{source.map_name}-{number}"
    used_names.add(name)
    content = io.BytesIO()
    overlay(read_image(source.image), class_map).save(content, "PNG")
    write_bytes(directory / f"{name}{MAP_SUFFIX}", content.getvalue())


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if there are many images and stderr is a terminal."""
    if total <= PROGRESS_THRESHOLD or not sys.stderr.isatty():
        yield lambda count: None
        return
    from resnet56.progress import image_progress, stream_output

    with image_progress(stream_output(sys.stderr), "classifying", total) as advance:
        yield advance
