"""Measure the optimizations of the training step: python tools/ablation.py [ARCH] [BATCH] [ROUNDS]

The first table compares training steps on random images, from plain PyTorch to the step with all
optimizations. The tool measures the steps alternately. The second table shows how the time of the
last step is distributed, according to the PyTorch profiler.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from resnet56.benchmark.interleave import Candidate, interleave, summarize
from resnet56.errors import UsageError
from resnet56.execution import prepare_model
from resnet56.model import build
from resnet56.recipe import Recipe
from resnet56.runtime import Precision, resolve_precision
from resnet56.step import Trainer

CPU = torch.device("cpu")
USAGE = "usage: python tools/ablation.py [ARCH] [BATCH] [ROUNDS]"
PROFILED_STEPS = 10


def training_step(
    arch: str, batch: int, layout: torch.memory_format, precision: Precision, execution: str
) -> Callable[[], None]:
    """Return a function that runs one step on the same random images in every call."""
    model = build(arch)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    forward = prepare_model(model.train(), execution, precision)
    trainer = Trainer(model, forward.module, Recipe(arch=arch, batch_size=batch), precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    return lambda: trainer.step(images, labels, 0.02, 0)


def time_by_category(run_once: Callable[[], object]) -> Counter[str]:
    """Measure the time of each category of operations, without Python overhead."""
    run_once()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            run_once()
    events = profiler.key_averages()
    categories: Counter[str] = Counter()
    for event in events:
        name = event.key.lower()
        if name in ("_features", "_featuresbackward"):
            category = "native step"
        elif "convolution" in name or "conv2d" in name or "mkldnn" in name:
            category = "convolutions"
        elif "normrelu" in name:
            category = "fused kernel"
        elif "batch_norm" in name:
            category = "batch norm"
        elif "sgd" in name:
            category = "optimizer"
        elif name in ("aten::copy_", "aten::to", "aten::_to_copy"):
            category = "casts and copies"
        elif name in ("aten::add", "aten::add_"):
            category = "additions"
        else:
            category = "other"
        categories[category] += event.self_cpu_time_total
    return categories


def main(arch: str, batch: int, rounds: int) -> None:
    """Measure and print both tables."""
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    fast = resolve_precision("auto", CPU)
    changes: dict[str, tuple[torch.memory_format, Precision, str]] = {
        "fp32, NCHW, eager": (nchw, "fp32", "eager"),
        "channels_last": (nhwc, "fp32", "eager"),
        fast: (nhwc, fast, "eager"),
        "the fused kernel": (nhwc, fast, "fused"),
        "native step in C instead": (nhwc, fast, "native"),
    }
    runners = []
    for name, options in changes.items():
        with contextlib.suppress(UsageError):  # not available on this machine
            runners.append(Candidate(name, training_step(arch, batch, *options), CPU))
    interleave(runners, rounds, 1.0)
    print(f"| {arch}, batch {batch} | ms | speed-up | range |\n|---|---|---|---|")
    for row in summarize(runners, batch, baseline="fp32, NCHW"):
        print(
            f"| {'+ ' if row['name'] != runners[0].name else ''}{row['name']} | "
            f"{row['ms']:.0f} | {row['ratio']:.2f}x | "
            f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f} |"
        )
    categories = time_by_category(runners[-1].run_once)
    print(f"\n| time of a step with {runners[-1].name} | share |\n|---|---|")
    for category, time in categories.most_common():
        print(f"| {category} | {time / categories.total():.0%} |")


if __name__ == "__main__":
    if len(sys.argv) > 4:
        sys.exit(USAGE)
    arch, batch, rounds = [*sys.argv[1:], *["resnet56", "32", "8"][len(sys.argv) - 1 :]]
    main(arch, int(batch), int(rounds))
