"""A fast model without weights, and a server for it in a subprocess."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from resnet56.data.images import BROWSER_FORMATS, FORMATS, FloatArray, UInt8Array
from resnet56.serve.limits import Limits

CLASSES = ("red", "green", "blue")


class ColorModel:
    """Predicts the brightest channel, returns a map per channel, and records the batch sizes."""

    name = "colors"
    classes = CLASSES

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # per batch
        self.sizes: list[int] = []

    def run(self, images: UInt8Array) -> tuple[FloatArray, FloatArray]:
        self.sizes.append(len(images))
        time.sleep(self.seconds)
        cells = images.reshape(len(images), 3, 8, 4, 8, 4).astype(np.float32)
        maps = cells.mean((3, 5)) / 16
        return maps.mean((2, 3)), maps


@contextmanager
def server(**options: float | str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve `ColorModel`, or a run, in a subprocess.

    Args:
        options: numeric fields of `Limits`, and these options: `formats` ("all" for every image
            format), `run` (the run to serve), `seconds` (the time per batch of `ColorModel`),
            `idle` and `exit` (values of `IDLE_SECONDS` and `EXIT_SECONDS`), and `files` (the
            maximum number of open files).

    Yields:
        The process and its address.
    """
    command = [sys.executable, __file__, *(f"{name}={value}" for name, value in options.items())]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + process.stdout.read()
        yield process, address[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def main(arguments: list[str]) -> int:
    from resnet56.predict import load
    from resnet56.serve import server as serving

    options = dict(text.split("=", 1) for text in arguments)
    run = options.pop("run", None)
    model = load(run, "cpu") if run else ColorModel(float(options.pop("seconds", 0)))
    serving.IDLE_SECONDS = float(options.pop("idle", serving.IDLE_SECONDS))
    serving.EXIT_SECONDS = float(options.pop("exit", serving.EXIT_SECONDS))
    if "files" in options:
        import resource

        files = int(options.pop("files"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    formats = FORMATS if options.pop("formats", "") == "all" else BROWSER_FORMATS
    limits = Limits(
        formats=formats,
        **{name: float(value) for name, value in options.items()},  # type: ignore[arg-type]
    )
    return serving.serve(model, "127.0.0.1", 0, print, limits)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    sys.exit(main(sys.argv[1:]))
