"""Time several functions alternately in one process.

The functions run alternately for about a second each, A B C A B C, so that other load on the
machine affects all of them. A reported ratio is the median of the ratios within each round.
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
    """Return a row per candidate: median times, and ratios to the fastest baseline.

    Args:
        candidates: candidates with measurements.
        images: images per call.
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
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
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
