"""Contestants that take turns, and how much faster one is than another.

They live side by side in one process and take turns of about a second, A B C A B C, so that
whatever else the machine does falls on all of them. A ratio is the median over the rounds of the
ratio within a round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Contestant:
    """Something that repeats: a step, or a forward pass."""

    name: str
    once: Callable[[], object]
    device: torch.device
    seconds: list[float] = field(default_factory=list)  # for one repetition, a round each

    def turn(self, repeats: int) -> float:
        """Seconds that one of `repeats` repetitions takes."""
        synchronize(self.device)
        begun = time.perf_counter()
        for _ in range(repeats):
            self.once()
        synchronize(self.device)
        return (time.perf_counter() - begun) / repeats


def take_turns(contestants: Sequence[Contestant], rounds: int, seconds: float) -> None:
    """Let each one warm up, then `rounds` times run for about `seconds`, one after another."""
    repeats = {}
    for contestant in contestants:
        contestant.turn(3)  # allocators, thread pools, compilers
        repeats[contestant.name] = max(2, round(seconds / contestant.turn(2)))
    for _ in range(rounds):
        for contestant in contestants:
            contestant.seconds.append(contestant.turn(repeats[contestant.name]))


def compared(contestants: Sequence[Contestant], images: int, *, stock: str) -> list[dict[str, Any]]:
    """A row for each: medians, and its ratio to the fastest whose name begins with `stock`."""
    plain = [c for c in contestants if c.name.startswith(stock)]
    base = min(plain, key=lambda c: statistics.median(c.seconds))
    rows = []
    for contestant in contestants:
        ratios = [b / s for b, s in zip(base.seconds, contestant.seconds, strict=True)]
        median = statistics.median(contestant.seconds)
        rows.append(
            {
                "name": contestant.name,
                "milliseconds": 1000 * median,
                "images_per_second": images / median,
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
                "baseline": contestant is base,
            }
        )
    return rows


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
