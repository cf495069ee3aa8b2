"""InferenceModel compared with the model that it copies."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from resnet56.inference import InferenceModel, predict_logits
from resnet56.model import ResNet, build


def model_with_statistics(arch: str) -> ResNet:
    """Return a model whose batch norms differ from the identity, as after training."""
    model = build(arch)
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5),
            (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2.0),
        ):  # fmt: skip
            tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ["resnet14", "resnet14-b", "resnet20-bottleneck", "plain14"])
def test_the_folded_model_is_equal_up_to_rounding(arch: str) -> None:
    model = model_with_statistics(arch)
    form = InferenceModel(model)
    with torch.inference_mode():
        assert torch.allclose(form(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
        assert torch.allclose(form.features(IMAGES), model.features(IMAGES), rtol=1e-3, atol=1e-4)
    assert not [m for m in form.modules() if isinstance(m, nn.BatchNorm2d)]


def test_the_original_model_is_not_modified() -> None:
    model = model_with_statistics("resnet8").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    InferenceModel(model, "bf16")(IMAGES)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_bf16_logits_are_close_and_float32() -> None:
    model = model_with_statistics("resnet14")
    with torch.inference_mode():
        logits, exact = InferenceModel(model, "bf16")(IMAGES), model(IMAGES)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() / exact.norm() < 0.03
    assert not torch.equal(logits, logits.bfloat16().float())  # the last layer is not rounded


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class HalvedConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def prune_first_layer(model: ResNet) -> None:
    prune.l1_unstructured(model.conv1, "weight", amount=0.9)


def parametrize_first_layer(model: ResNet) -> None:
    parametrize.register_parametrization(model.conv1, "weight", Halved())


def replace_first_layer(model: ResNet) -> None:
    conv = HalvedConv(3, 16, 3, padding=1, bias=False)
    conv.weight = model.conv1.weight
    model.conv1 = conv


def hook_first_layer(model: ResNet) -> None:
    model.conv1.register_forward_hook(lambda module, inputs, output: output / 2)


@pytest.mark.parametrize(
    "change", [prune_first_layer, parametrize_first_layer, replace_first_layer, hook_first_layer]
)
def test_changed_models_are_evaluated_as_they_are(change: Callable[[ResNet], None]) -> None:
    model = model_with_statistics("resnet8")
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    inputs = (pixels / 255 - 0.5) / 0.25
    before = model(inputs)
    change(model)
    expected = model(inputs)  # makes the weight a non-leaf tensor, which cannot be copied
    assert not torch.allclose(before, expected, atol=1e-3)
    logits = predict_logits(model, pixels.byte(), (0.5,) * 3, (0.25,) * 3)
    assert torch.allclose(logits, expected, atol=1e-5)
