"""The networks that come with the package: what they answer, and that their cards are true."""

from pathlib import Path

import pytest
import torch

from resnet56.data.dataset import Dataset
from resnet56.evaluation import Subject, subject_of
from resnet56.runs import pretrained

CPU = torch.device("cpu")
NAMES = pretrained.names()


def subject(name: str) -> Subject:
    return subject_of(pretrained.load(name), CPU)


def seeded(count: int) -> torch.Tensor:
    """Blocks of colour: something between noise and a picture."""
    generator = torch.Generator().manual_seed(56)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_there_are_some() -> None:
    assert NAMES == ["resnet56", "resnet56-bottleneck"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_small_and_its_card_is_about_it(name: str) -> None:
    file = pretrained.FOLDER / f"{name}.safetensors"
    assert file.stat().st_size < 2_000_000
    card = pretrained.card(name)
    assert card["recipe"]["arch"] == card["network"]["arch"] == name
    assert card["evaluation"]["of"] == "the half-precision weights"
    assert pretrained.load(name).network.classes == tuple(card["network"]["classes"])


# Made by `subject(name).logits(seeded(1))`, first four classes: a change in reading, folding or
# computing would move them.
LOGITS = {
    "resnet56": [4.0024, -0.1410, -2.1779, 3.7853],
    "resnet56-bottleneck": [5.0284, -0.8478, 1.2547, 3.1830],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_on_seeded_images_are_pinned(name: str) -> None:
    logits = subject(name).logits(seeded(1))[0, :4]
    assert torch.allclose(logits, torch.tensor(LOGITS[name]), atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_accuracy_is_the_card_s(name: str, cifar10: Dataset) -> None:
    """On every fifth test image, whose share the card's whole figure bounds."""
    part = slice(0, None, 5)
    images, labels = cifar10.test.images[part], cifar10.test.labels[part]
    hits = (subject(name).logits(images).argmax(dim=1) == labels).float()
    stated = pretrained.card(name)["evaluation"]["test"]["accuracy"]
    error = (stated * (1 - stated) / len(labels)) ** 0.5
    assert abs(hits.mean().item() - stated) < 3 * error


@pytest.mark.parametrize("name", NAMES)
def test_torch_hub_gives_the_same_network(name: str) -> None:
    here = str(Path(__file__).parents[2])
    model = torch.hub.load(here, name.replace("-", "_"), source="local")
    ours = subject(name)
    assert (model.mean, model.std) == (ours.network.mean, ours.network.std)
    mean, std = (torch.tensor(c)[:, None, None] for c in (model.mean, model.std))
    images = seeded(4)
    with torch.inference_mode():
        logits = model((images / 255 - mean) / std)
    assert torch.allclose(logits, ours.logits(images), atol=1e-3)
