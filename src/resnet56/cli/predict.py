"""`resnet56 predict`."""

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from resnet56.cli.arguments import parse
from resnet56.cli.common import Threads, say
from resnet56.errors import Error, ImageError, UsageError, shown

if TYPE_CHECKING:
    from resnet56.data.images import Floats
    from resnet56.predict import Prediction

MAP = ".cam.png"  # how the name of a picture under its map ends
LONG = 64  # pictures from which on a bar is worth its while


@dataclass(frozen=True)
class PredictOptions:
    """Say what is in pictures of any size: each one's most probable classes."""

    images: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE|FOLDER|- [...]")
    ]
    """Files, folders of them, or - for one picture on stdin."""

    run: Annotated[str, tyro.conf.arg(metavar="RUN|NAME|FILE")] = "resnet56"
    """Network: a run's directory, one that comes with the package, or a file that export wrote."""

    top: int = 3
    """Classes to name."""

    json: bool = False
    """Print a JSON object a line."""

    csv: bool = False
    """Print comma-separated values under a header."""

    cam: Path | None = None
    """Folder for class activation maps over the pictures, NAME.cam.png: where the class is seen."""

    max_pixels: int | None = None
    """Largest image to read; by default 89 million pixels, for a JPEG four times as many."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:N, mps."""

    threads: Threads = None
    """CPU threads; by default one per core."""


@dataclass(frozen=True)
class Source:
    """A picture to look at."""

    name: str
    picture: Path | bytes
    map_name: str  # of its map's file, in --cam


def run(arguments: list[str]) -> int:
    """resnet56 predict IMAGE ...; 1 if a picture could not be read, after all the others."""
    options = parse(PredictOptions, arguments, "resnet56 predict")
    if not options.images:
        raise UsageError("which pictures? resnet56 predict IMAGE|FOLDER|- ...; see --help")
    if options.json and options.csv:
        raise UsageError("--json or --csv, not both")
    if options.top < 1:
        raise UsageError(f"--top must be at least 1, not {options.top}")
    if options.max_pixels is not None:
        if options.max_pixels < 1:
            raise UsageError(f"--max-pixels must be at least 1, not {options.max_pixels}")
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = options.max_pixels  # for this process
    from resnet56.predict import load

    predictor = load(options.run, options.device, threads=options.threads)
    sources, failed = _sources(options.images)
    top = min(options.top, len(predictor.classes))
    show = _writer("json" if options.json else "csv" if options.csv else "text", top)
    taken: set[str] = set()
    answers = predictor.stream(
        (source.picture for source in sources), top=top, maps=options.cam is not None
    )
    with _bar(len(sources)) as tick:
        for source, answer in zip(sources, answers, strict=True):
            try:
                if isinstance(answer, ImageError):
                    raise answer
                if options.cam is not None and answer.map is not None:
                    _write_map(source, answer.map, options.cam, taken)
                show(source.name, answer)
            except ImageError as error:
                _complain(error)
                failed += 1
            tick(1)
    if failed:
        say(f"resnet56: {failed:,} could not be read")
    return 1 if failed else 0


def _sources(arguments: tuple[str, ...]) -> tuple[list[Source], int]:
    """The pictures that the arguments name, and how many of them name none."""
    from resnet56.data.image_files import describe_skipped, find_images

    sources, failed = [], 0
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            sources.append(Source("-", sys.stdin.buffer.read(), "stdin"))
        elif path.is_dir():
            # Not what --cam wrote beside the pictures the last time.
            found = find_images(path)
            files = [file for file in found.files if not file.name.endswith(MAP)]
            if remark := describe_skipped(found.skipped):
                say(f"{shown(str(path))}: {remark}")
            if not files:
                _complain(ImageError(f"{shown(str(path))} holds no pictures"))
                failed += 1
            for file in files:
                inside = file.relative_to(path).with_suffix("").as_posix()
                sources.append(Source(str(file), file, inside))
        elif path.is_fifo():  # as <(curl ...), which can be read once only
            sources.append(Source(argument, path.read_bytes(), path.stem))
        else:
            sources.append(Source(argument, path, path.stem))
    return sources, failed


def _complain(error: Error) -> None:
    say(f"resnet56: {error}")


def _writer(form: str, top: int) -> Callable[[str, "Prediction"], None]:
    """A function that prints a picture's answer."""
    if form == "json":
        from resnet56.files import to_json

        return lambda name, answer: print(
            to_json(
                {
                    "image": name,
                    "label": answer.label,
                    "probability": answer.probability,
                    "probabilities": dict(answer.probabilities),
                }
            )
        )
    if form == "csv":
        table = csv.writer(sys.stdout, lineterminator="\n")
        numbers = range(1, top + 1)
        table.writerow(["image", *(f"{x}_{n}" for n in numbers for x in ("label", "probability"))])

        def write(name: str, answer: "Prediction") -> None:
            pairs = answer.probabilities.items()
            table.writerow([name, *(x for label, share in pairs for x in (label, f"{share:.6f}"))])

        return write

    def tell(name: str, answer: "Prediction") -> None:
        shares = (
            f"{shown(label)} {100 * share:.1f} %" for label, share in answer.probabilities.items()
        )
        print(f"{shown(name)}: {', '.join(shares)}")

    return tell


def _write_map(source: Source, evidence: "Floats", folder: Path, taken: set[str]) -> None:
    """The picture under its class activation map; it is read again, as large ones are not kept."""
    from resnet56.data.images import overlay, read_image
    from resnet56.files import write_bytes

    name, number = source.map_name, 1
    while name in taken:  # pictures of one name from several folders
        number += 1
        name = f"{source.map_name}-{number}"
    taken.add(name)
    content = io.BytesIO()
    overlay(read_image(source.picture), evidence).save(content, "PNG")
    write_bytes(folder / f"{name}{MAP}", content.getvalue())


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, when it takes long enough to look at; nothing elsewhere."""
    if total <= LONG or not sys.stderr.isatty():
        yield lambda count: None
        return
    from resnet56.progress import looking

    with looking(total) as tick:
        yield tick
