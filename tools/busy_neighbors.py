"""What a training yields beside busy programs: python tools/busy_neighbors.py [SECONDS] [MODE ...]

Training steps of ResNet-56 on random images beside none, one and two programs that keep a core
busy, in turns: on one thread, on all threads, and as `resnet56 train` chooses them. Every ratio is
to one thread beside the same programs. For each MODE of eager, fused and native; by default all.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from probes import stepper

from resnet56.errors import UsageError
from resnet56.runtime import resolve_precision
from resnet56.threads import ThreadControl

BATCH = 64
BUSY = "while True: pass"
CPU = torch.device("cpu")


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """So many busy programs, for the duration of the block."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def throughput(once: Callable[[], None], threads: int | None, seconds: float) -> tuple[float, int]:
    """Images per second, and the threads at the end; `threads` None lets the control choose."""
    with ThreadControl(threads) as control:
        control.begin(0)
        once()
        steps, begun = 0, time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            once()
            steps += 1
            control.after_step(steps)
        return steps * BATCH / passed, control.threads


def main(seconds: float, modes: list[str]) -> None:
    """Print a row for each mode and number of neighbors."""
    every = torch.get_num_threads()
    print(f"| mode | busy programs | 1 thread | {every} threads | chosen | ratios |")
    print("|---|---|---|---|---|---|")
    for mode in modes:
        with suppress(UsageError):  # a mode that this machine does not have
            precision = resolve_precision("auto", CPU)
            once = stepper("resnet56", BATCH, torch.channels_last, precision, mode)
            for count in (0, 1, 2):
                with neighbors(count):
                    one, _ = throughput(once, 1, seconds)
                    full, _ = throughput(once, every, seconds)
                    chosen, threads = throughput(once, None, seconds)
                print(
                    f"| {mode} | {count} | {one:.0f} images/s | {full:.0f} images/s | "
                    f"{chosen:.0f} images/s on {threads} | {full / one:.2f}x, "
                    f"{chosen / one:.2f}x |",
                    flush=True,
                )


if __name__ == "__main__":
    seconds, *modes = sys.argv[1:] or ["5"]
    main(float(seconds), modes or ["eager", "fused", "native"])
