"""Measure training while the CPU is busy: python tools/noisy_neighbors.py [SECONDS] [MODE ...]

The tool runs training steps of ResNet-56 on random images while zero, one and two other programs
each keep a core busy. It compares one thread, all threads, and the number of threads that `resnet56
train` chooses. Ratios are relative to one thread with the same number of other programs. MODE is
eager, fused or native. By default, the tool measures all three modes.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from ablation import training_step

from resnet56.errors import UsageError
from resnet56.runtime import resolve_precision
from resnet56.threads import ThreadControl

BATCH = 64
BUSY = "while True: pass"
CPU = torch.device("cpu")


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    """Run `count` busy programs until the block ends."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def throughput(
    run_step: Callable[[], None], threads: int | None, seconds: float
) -> tuple[float, int]:
    """Return images/s and the final number of threads.

    If `threads` is None, `ThreadControl` chooses the number.
    """
    with ThreadControl(threads) as control:
        control.begin(0)
        run_step()
        steps, begun = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < seconds:
            run_step()
            steps += 1
            control.after_step(steps)
        return steps * BATCH / elapsed, control.threads


def main(seconds: float, modes: list[str]) -> None:
    """Print one row for each mode and number of busy programs."""
    all_threads = torch.get_num_threads()
    print(f"| mode | busy programs | 1 thread | {all_threads} threads | chosen | ratios |")
    print("|---|---|---|---|---|---|")
    for mode in modes:
        with suppress(UsageError):  # not available on this machine
            precision = resolve_precision("auto", CPU)
            run_step = training_step("resnet56", BATCH, torch.channels_last, precision, mode)
            for count in (0, 1, 2):
                with neighbors(count):
                    one, _ = throughput(run_step, 1, seconds)
                    full, _ = throughput(run_step, all_threads, seconds)
                    chosen, threads = throughput(run_step, None, seconds)
                print(
                    f"| {mode} | {count} | {one:.0f} images/s | {full:.0f} images/s | "
                    f"{chosen:.0f} images/s on {threads} | {full / one:.2f}x, "
                    f"{chosen / one:.2f}x |",
                    flush=True,
                )


if __name__ == "__main__":
    seconds, *modes = sys.argv[1:] or ["5"]
    main(float(seconds), modes or ["eager", "fused", "native"])
