"""The outputs of the pretrained models match pinned values and their cards."""

from pathlib import Path

import pytest
import torch

from resnet56.data.dataset import Dataset
from resnet56.evaluation import EvaluatedModel, evaluated_model
from resnet56.model import build
from resnet56.runs import pretrained

CPU = torch.device("cpu")
NAMES = pretrained.names()


def evaluated(name: str) -> EvaluatedModel:
    return evaluated_model(pretrained.load(name), CPU)


def color_blocks(count: int) -> torch.Tensor:
    """Return images of random color blocks, which have some structure but are not photos."""
    generator = torch.Generator().manual_seed(56)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_the_pretrained_networks_are_listed() -> None:
    assert NAMES == ["resnet20", "resnet32", "resnet56", "resnet56-bottleneck", "resnet56-cifar100"]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_and_match_their_card(name: str) -> None:
    file = pretrained.DIRECTORY / f"{name}.safetensors"
    assert file.stat().st_size < 2_000_000
    card = pretrained.card(name)
    assert card["recipe"]["arch"] == card["config"]["arch"] == name.removesuffix("-cifar100")
    assert card["evaluation"]["of"] == "the half-precision weights"
    assert pretrained.load(name).config.classes == tuple(card["config"]["classes"])


# The first four logits of each model for `color_blocks(1)`. The test detects changes in loading,
# folding and inference.
LOGITS = {
    "resnet20": [2.4125, -0.4488, 0.1196, 1.2689],
    "resnet32": [4.1659, -0.2294, -1.4984, 1.7972],
    "resnet56": [4.1954, -0.3991, 1.7503, 1.7212],
    "resnet56-bottleneck": [5.0284, -0.8478, 1.2547, 3.1830],
    "resnet56-cifar100": [2.3366, -2.0585, -0.4968, -2.6101],
}


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_pinned_values(name: str) -> None:
    logits = evaluated(name).logits(color_blocks(1))[0, :4]
    assert torch.allclose(logits, torch.tensor(LOGITS[name]), atol=2e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-cifar100")])
def test_accuracy_matches_the_card(name: str, cifar10: Dataset) -> None:
    """The accuracy on 1,000 test images is within three standard errors of that in the card."""
    subset = slice(0, None, 10)
    images, labels = cifar10.test.images[subset], cifar10.test.labels[subset]
    correct = (evaluated(name).logits(images).argmax(dim=1) == labels).float()
    expected = pretrained.card(name)["evaluation"]["test"]["accuracy"]
    error = (expected * (1 - expected) / len(labels)) ** 0.5
    assert abs(correct.mean().item() - expected) < 3 * error


@pytest.mark.parametrize(("name", "classes"), [("resnet56", 10), ("resnet56_cifar100", 100)])
def test_torch_hub_builds_a_network_without_pretrained_weights(name: str, classes: int) -> None:
    repository = str(Path(__file__).parents[2])
    model = torch.hub.load(repository, name, source="local", pretrained=False)
    assert torch.equal(model.fc.weight, build("resnet56", classes=classes).fc.weight)


@pytest.mark.parametrize("name", NAMES)
def test_torch_hub_loads_the_same_network(name: str) -> None:
    repository = str(Path(__file__).parents[2])
    model = torch.hub.load(repository, name.replace("-", "_"), source="local")
    expected = evaluated(name)
    assert (model.mean, model.std) == (expected.config.mean, expected.config.std)
    mean, std = (torch.tensor(c)[:, None, None] for c in (model.mean, model.std))
    images = color_blocks(4)
    with torch.inference_mode():
        logits = model((images / 255 - mean) / std)
    assert torch.allclose(logits, expected.logits(images), atol=1e-3)
