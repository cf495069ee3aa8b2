"""TrivialAugment's fourteen changes against Pillow, whose they are."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch import Tensor

from resnet56.data.augment import Augmentation, draw
from resnet56.data.trivial_augment import CHANGES, LEVELS, trivial_augment

Picture = Image.Image


def warp(*coefficients: float) -> Callable[[Picture], Picture]:
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST
    )


def by_pillow(kind: str, level: int) -> Callable[[Picture], Picture]:
    """The change in the paper's wide space; `level` in thirtieths."""
    strength, places = level / LEVELS, math.trunc(32 * level / LEVELS)
    factor = 1 + 0.99 * strength
    return {
        "identity": lambda picture: picture,
        "shear x": warp(1, 0.99 * strength, 0, 0, 1, 0),
        "shear y": warp(1, 0, 0, 0.99 * strength, 1, 0),
        "translate x": warp(1, 0, places, 0, 1, 0),
        "translate y": warp(1, 0, 0, 0, 1, places),
        "rotate": lambda picture: picture.rotate(-135 * strength),
        "brightness": lambda picture: ImageEnhance.Brightness(picture).enhance(factor),
        "color": lambda picture: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(factor),
        "sharpness": lambda picture: ImageEnhance.Sharpness(picture).enhance(factor),
        "posterize": lambda picture: ImageOps.posterize(picture, 8 - round(abs(level) / 5)),
        "solarize": lambda picture: ImageOps.solarize(picture, 256 - 256 * abs(level) // 30),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }[kind]


def scenes(count: int) -> Tensor:
    """Soft blobs of limited range with some noise: something between a picture and noise."""
    generator = torch.Generator().manual_seed(56)
    coarse = 40 + 150 * torch.rand(count, 3, 5, 5, generator=generator)
    soft = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    noise = 8 * torch.randn(count, 3, 32, 32, generator=generator)
    return (soft + noise).clamp(0, 255).byte()


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_what_pillow_does(kind: str) -> None:
    levels = torch.arange(-LEVELS, LEVELS + 1)
    images = scenes(len(levels))
    kinds = torch.full((len(levels),), list(CHANGES).index(kind))
    result = trivial_augment(images, kinds, levels)
    assert result.dtype == torch.uint8
    for level, image, found in zip(levels.tolist(), images, result, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(by_pillow(kind, level)(picture)).transpose(2, 0, 1)
        off = np.abs(found.numpy().astype(int) - expected)
        if kind in ("shear x", "shear y", "rotate"):
            # Whose middle falls on the edge between two, rounding decides: at 135 degrees two
            # diagonals do, else hardly any.
            assert (off > 0).any(axis=0).sum() <= (32 if abs(level) == 30 else 5), level
        else:
            assert off.max() <= 1, level  # where rounding decides
            assert (off > 0).mean() <= 0.05, level


@pytest.mark.parametrize("kind", sorted(CHANGES.keys() - {"identity", "autocontrast", "equalize"}))
def test_strength_zero_changes_nothing_and_more_changes_more(kind: str) -> None:
    images = scenes(3)
    kinds = torch.full((3,), list(CHANGES).index(kind))
    result = trivial_augment(images, kinds, torch.tensor([0, LEVELS // 3, LEVELS]))
    none, some, most = (result.float() - images.float()).abs().mean(dim=(1, 2, 3)).tolist()
    assert none == 0
    assert 0 < some < most


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_picture_of_one_colour_is_no_trouble(kind: str, value: int) -> None:
    images = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    kinds = torch.full((2,), list(CHANGES).index(kind))
    result = trivial_augment(images, kinds, torch.tensor([0, 0]))
    assert torch.equal(result, images)


def test_each_image_is_changed_in_its_own_way_and_the_given_ones_stay() -> None:
    images = scenes(120)
    draws = draw(120, Augmentation(), torch.Generator().manual_seed(1))
    before = images.clone()
    together = trivial_augment(images, draws.changes, draws.levels)
    alone = [
        trivial_augment(images[i : i + 1], draws.changes[i : i + 1], draws.levels[i : i + 1])
        for i in range(120)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, before)
    assert len(draws.changes.unique()) == len(CHANGES)


def test_kinds_and_strengths_are_equally_likely() -> None:
    generator = torch.Generator().manual_seed(2)
    draws = draw(14 * 31 * 100, Augmentation(), generator)
    cells = torch.bincount(draws.changes * 31 + draws.levels.abs(), minlength=14 * 31).numpy()
    assert len(cells) == 14 * 31
    assert stats.chisquare(cells).pvalue > 1e-3
    signs = draws.levels[draws.levels != 0].sign().float().mean().item()
    assert abs(signs) < 0.02
