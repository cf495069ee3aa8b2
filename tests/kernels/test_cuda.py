"""Training steps on a CUDA GPU: Triton kernels and CUDA graphs, compared with PyTorch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet56.data.readers import load_data
from resnet56.execution import prepare_model
from resnet56.kernels import cuda_graph
from resnet56.model import build
from resnet56.recipe import RECIPES, Recipe
from resnet56.runtime import resolve_device
from resnet56.step import Trainer
from resnet56.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA GPU")

BATCH = 64


def batch(seed: int, size: int = BATCH, side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images.cuda().contiguous(memory_format=torch.channels_last), labels.cuda()


def results(arch: str, mode: str, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the logits, the running statistics and the gradients of a step."""
    device = resolve_device("cuda")
    model = build(arch).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    if mode == "fp64":
        model.double()
        logits = model(images.double())
    else:
        prepared = prepare_model(model, mode, "bf16")
        assert prepared.execution == mode
        with torch.autocast("cuda", torch.bfloat16):
            logits = prepared.module(images)
    F.cross_entropy(logits.float(), labels).backward()
    gradients = [p.grad for p in model.parameters()]
    return [t.detach().double() for t in (logits, *model.buffers(), *gradients) if t is not None]


@pytest.mark.parametrize("arch", ["resnet20", "resnet20-b", "plain20"])
@pytest.mark.parametrize(("size", "side"), [(BATCH, 32), (5, 16)])
def test_native_step_is_as_accurate_as_pytorch(arch: str, size: int, side: int) -> None:
    images, labels = batch(0, size, side)
    expected = results(arch, "fp64", images, labels)

    def errors(mode: str) -> list[float]:
        actual = results(arch, mode, images, labels)
        return [
            float((a - b).norm() / b.norm().clamp(min=1e-6))
            for a, b in zip(actual, expected, strict=True)
        ]

    native, pytorch = errors("native"), errors("eager")
    assert native[0] < 2 * pytorch[0]
    assert sum(native) < 1.3 * sum(pytorch)


def test_native_step_is_repeatable() -> None:
    first, second = (results("resnet20", "native", *batch(0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("execution", ["native", "cuda-graph"])
def test_graph_matches_steps_without_a_graph(
    execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(arch="resnet20", nesterov=True, ema_decay=(0.9, 0.99), val_size=1)

    def weights(warmup: int) -> dict[str, Tensor]:
        monkeypatch.setattr(cuda_graph, "WARMUP_CALLS", warmup)
        device = resolve_device("cuda")
        model = build("resnet20").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        prepared = prepare_model(model.train(), execution, "bf16")
        trainer = Trainer(model, prepared.module, recipe, "bf16", cuda_graphs=prepared.cuda_graphs)
        for step in range(8):
            size = 32 if step % 3 else 16  # two shapes
            trainer.step(*batch(step, side=size), lr=0.1 / (step + 1), step=step)
        assert int(trainer.sums[1]) >= 0
        return {**trainer.weights(), **trainer.state()}

    with_graph, without = weights(2), weights(100)
    for name, tensor in without.items():
        torch.testing.assert_close(with_graph[name], tensor, rtol=0, atol=0)


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"arch": "resnet8", "epochs": 2, "execution": "native"}
    recipe = Recipe(**{**RECIPES["quick"].to_json(), **fields})
    dataset = load_data("digits")

    def stop(row: object) -> None:
        raise RuntimeError("stop")

    train(recipe, dataset, tmp_path / "whole", device="cuda")
    with pytest.raises(Exception, match="stop"):
        train(recipe, dataset, tmp_path / "parts", device="cuda", callbacks=[stop])
    train(recipe, dataset, tmp_path / "parts", device="cuda", resume=True)
    names = [sorted((tmp_path / run / "checkpoint").glob("model-*")) for run in ("whole", "parts")]
    assert names[0][-1].read_bytes() == names[1][-1].read_bytes()
