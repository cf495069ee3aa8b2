"""Time several functions alternately in one process.

Each function runs for about a second in turn (A B C A B C ...), so that other programs on the
machine slow down all functions alike. A reported ratio is the median of the ratios of the rounds.
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
    seconds: list[float] = field(default_factory=list)  # per call, one value per round

    def time(self, repeats: int) -> float:
        """Return the mean time per call over `repeats` calls, in seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            self.run_once()
        synchronize(self.device)
        return (time.perf_counter() - start) / repeats


def interleave(candidates: Sequence[Candidate], rounds: int, seconds: float) -> None:
    """Warm up all candidates, then run each for about `seconds` in every round."""
    repeats = {}
    for candidate in candidates:
        candidate.time(3)  # warm up allocators, thread pools and compilers
        repeats[candidate.name] = max(2, round(seconds / candidate.time(2)))
    for _ in range(rounds):
        for candidate in candidates:
            candidate.seconds.append(candidate.time(repeats[candidate.name]))


def summarize(
    candidates: Sequence[Candidate], images: int, *, baseline: str
) -> list[dict[str, Any]]:
    """Return one row per candidate, with its median time and its speed-up.

    Ratios are relative to the fastest baseline. A ratio of 2 means twice the speed.

    Args:
        candidates: candidates with measurements.
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
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
