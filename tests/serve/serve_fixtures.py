"""A network that answers at once and without weights, and a server around it in a process."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from resnet56.data.images import Bytes, Floats
from resnet56.serve.limits import Limits

CLASSES = ("red", "green", "blue")


class Colours:
    """Names the channel that is brightest, and shows where; remembers how it was called."""

    name = "colours"
    classes = CLASSES

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # that a run takes
        self.sizes: list[int] = []

    def run(self, images: Bytes) -> tuple[Floats, Floats]:
        self.sizes.append(len(images))
        time.sleep(self.seconds)
        parts = images.reshape(len(images), 3, 8, 4, 8, 4).astype(np.float32)
        maps = parts.mean((3, 5)) / 16
        return maps.mean((2, 3)), maps


@contextmanager
def server(**options: float | str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves `Colours`, or a `run`.

    The other options are limits, `seconds` that a run of `Colours` takes, `idle` and `end`, which
    stand for `IDLE` and `END_SECONDS`, and `files`, which it may open.

    Yields:
        The process, and its address.
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

    given = dict(text.split("=", 1) for text in arguments)
    run = given.pop("run", None)
    network = load(run, "cpu") if run else Colours(float(given.pop("seconds", 0)))
    serving.IDLE = float(given.pop("idle", serving.IDLE))
    serving.END_SECONDS = float(given.pop("end", serving.END_SECONDS))
    if "files" in given:
        import resource

        files = int(given.pop("files"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    limits = Limits(**{name: float(value) for name, value in given.items()})  # type: ignore[arg-type]
    return serving.serve(network, "127.0.0.1", 0, print, limits)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    sys.exit(main(sys.argv[1:]))
