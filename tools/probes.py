"""What each change to the training step gains: python tools/probes.py [ARCH] [BATCH] [ROUNDS]

One step on random images, in turns, by this machine's PyTorch: first as PyTorch does it, then
with one change after another. Then where the time of the last one goes, by PyTorch's profiler.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from resnet56.benchmark.interleave import Contestant, compared, take_turns
from resnet56.errors import UsageError
from resnet56.model import build
from resnet56.recipe import Recipe
from resnet56.runtime import Resolved, resolve_precision
from resnet56.step import Trainer, make_forward

CPU = torch.device("cpu")
USAGE = "usage: python tools/probes.py [ARCH] [BATCH] [ROUNDS]"
PROFILED = 10  # steps


def stepper(
    arch: str, batch: int, layout: torch.memory_format, precision: Resolved, execution: str
) -> Callable[[], None]:
    """A step on the same random images again and again."""
    model = build(arch)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    forward = make_forward(model.train(), execution, precision)
    trainer = Trainer(model, forward.module, Recipe(arch=arch, batch_size=batch), precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    return lambda: trainer.step(images, labels, 0.02, 0)


def shares(once: Callable[[], object]) -> Counter[str]:
    """The time that each kind of operation takes; Python's between them is not counted."""
    once()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            once()
    events = profiler.key_averages()
    kinds: Counter[str] = Counter()
    for event in events:
        name = event.key.lower()
        if name in ("_features", "_featuresbackward"):
            kind = "the native step"
        elif "convolution" in name or "conv2d" in name or "mkldnn" in name:
            kind = "convolutions"
        elif "normrelu" in name:
            kind = "the fused kernel"
        elif "batch_norm" in name:
            kind = "batch norm"
        elif "sgd" in name:
            kind = "the optimizer"
        elif name in ("aten::copy_", "aten::to", "aten::_to_copy"):
            kind = "casts and copies"
        elif name in ("aten::add", "aten::add_"):
            kind = "sums"
        else:
            kind = "the rest"
        kinds[kind] += event.self_cpu_time_total
    return kinds


def main(arch: str, batch: int, rounds: int) -> None:
    """Print both tables."""
    plain, last = torch.contiguous_format, torch.channels_last
    fast = resolve_precision("auto", CPU)
    changes: dict[str, tuple[torch.memory_format, Resolved, str]] = {
        "fp32, NCHW, eager": (plain, "fp32", "eager"),
        "channels_last": (last, "fp32", "eager"),
        fast: (last, fast, "eager"),
        "the fused kernel": (last, fast, "fused"),
        "everything in C instead": (last, fast, "native"),
    }
    runners = []
    for name, how in changes.items():
        with contextlib.suppress(UsageError):  # a way that this machine has not
            runners.append(Contestant(name, stepper(arch, batch, *how), CPU))
    take_turns(runners, rounds, 1.0)
    print(f"| {arch}, batch {batch} | ms | ratio to the first | least to most |\n|---|---|---|---|")
    for row in compared(runners, batch, stock="fp32, NCHW"):
        print(
            f"| {'+ ' if row['name'] != runners[0].name else ''}{row['name']} | "
            f"{row['milliseconds']:.0f} | {row['ratio']:.2f}x | "
            f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f} |"
        )
    kinds = shares(runners[-1].once)
    print(f"\n| what the operations of a step with {runners[-1].name} take | share |\n|---|---|")
    for kind, time in kinds.most_common():
        print(f"| {kind} | {time / kinds.total():.0%} |")


if __name__ == "__main__":
    if len(sys.argv) > 4:
        sys.exit(USAGE)
    arch, batch, rounds = [*sys.argv[1:], *["resnet56", "32", "8"][len(sys.argv) - 1 :]]
    main(arch, int(batch), int(rounds))
