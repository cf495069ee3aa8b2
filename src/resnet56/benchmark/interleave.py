"""Time several functions alternately in one process.

The functions take turns of about a second (A B C A B C ...). Other programs on the machine
therefore slow down all functions equally. Each round yields the ratio of the times of two
functions, and `summarize` returns the median of these ratios.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Candidate:
    """A function to time, such as a training step or a forward pass."""

    name: str
    run_once: Callable[[], object]
    device: torch.device
    seconds: list[float] = field(default_factory=list)  # mean time per call, for each round

    def time(self, repeats: int) -> float:
        """Return the mean time per call over `repeats` calls, in seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            self.run_once()
        synchronize(self.device)
        return (time.perf_counter() - start) / repeats


def interleave(candidates: Sequence[Candidate], rounds: int, seconds: float) -> None:
    """Warm up all candidates, then run each candidate for about `seconds` in every round."""
    repeats = {}
    for candidate in candidates:
        # Warm up allocators, thread pools and compilers. The fourth call records a CUDA graph.
        candidate.time(4)
        repeats[candidate.name] = max(2, round(seconds / candidate.time(2)))
    for _ in range(rounds):
        for candidate in candidates:
            candidate.seconds.append(candidate.time(repeats[candidate.name]))


def summarize(
    candidates: Sequence[Candidate], images: int, *, baseline: str
) -> list[dict[str, Any]]:
    """Return one row per candidate, with its median time and its speed-up.

    The speed-up (`ratio`) is relative to the fastest baseline. A ratio of 2 means twice the speed.

    Args:
        candidates: the candidates that `interleave` measured.
        images: number of images per call.
        baseline: prefix of the names of the baselines.
    """
    baselines = [c for c in candidates if c.name.startswith(baseline)]
    fastest = min(baselines, key=lambda c: statistics.median(c.seconds))
    rows = []
    for candidate in candidates:
        ratios = [b / s for b, s in zip(fastest.seconds, candidate.seconds, strict=True)]
        median = statistics.median(candidate.seconds)
        rows.append(
            {
                "name": candidate.name,
                "ms": 1000 * median,
                "images_per_second": images / median,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "baseline": candidate is fastest,
            }
        )
    return rows


def synchronize(device: torch.device) -> None:
    """Wait until the device finishes all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
