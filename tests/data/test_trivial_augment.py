"""The fourteen transforms of TrivialAugment, compared with Pillow."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch import Tensor

from resnet56.data.augment import Augmentation, sample_params
from resnet56.data.trivial_augment import LEVELS, TRANSFORMS, trivial_augment

Picture = Image.Image


def warp(*coefficients: float) -> Callable[[Picture], Picture]:
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST
    )


def by_pillow(name: str, level: int) -> Callable[[Picture], Picture]:
    """Return a transform from the paper's wide space at `level` / 30."""
    strength, offset = level / LEVELS, math.trunc(32 * level / LEVELS)
    factor = 1 + 0.99 * strength
    return {
        "identity": lambda picture: picture,
        "shear x": warp(1, 0.99 * strength, 0, 0, 1, 0),
        "shear y": warp(1, 0, 0, 0.99 * strength, 1, 0),
        "translate x": warp(1, 0, offset, 0, 1, 0),
        "translate y": warp(1, 0, 0, 0, 1, offset),
        "rotate": lambda picture: picture.rotate(-135 * strength),
        "brightness": lambda picture: ImageEnhance.Brightness(picture).enhance(factor),
        "color": lambda picture: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(factor),
        "sharpness": lambda picture: ImageEnhance.Sharpness(picture).enhance(factor),
        "posterize": lambda picture: ImageOps.posterize(picture, 8 - round(abs(level) / 5)),
        "solarize": lambda picture: ImageOps.solarize(picture, 256 - 256 * abs(level) // 30),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }[name]


def smooth_images(count: int) -> Tensor:
    """Return smooth images of limited range with some noise, similar to natural images."""
    generator = torch.Generator().manual_seed(56)
    coarse = 40 + 150 * torch.rand(count, 3, 5, 5, generator=generator)
    soft = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    noise = 8 * torch.randn(count, 3, 32, 32, generator=generator)
    return (soft + noise).clamp(0, 255).byte()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_match_pillow(name: str) -> None:
    levels = torch.arange(-LEVELS, LEVELS + 1)
    images = smooth_images(len(levels))
    transforms = torch.full((len(levels),), list(TRANSFORMS).index(name))
    result = trivial_augment(images, transforms, levels)
    assert result.dtype == torch.uint8
    for level, image, found in zip(levels.tolist(), images, result, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(by_pillow(name, level)(picture)).transpose(2, 0, 1)
        off = np.abs(found.numpy().astype(int) - expected)
        if name in ("shear x", "shear y", "rotate"):
            # If a source position lies halfway between two pixels, rounding selects one of them. At
            # 135 degrees, this affects two diagonals. At other angles, it affects few pixels.
            assert (off > 0).any(axis=0).sum() <= (32 if abs(level) == 30 else 5), level
        else:
            assert off.max() <= 1, level  # rounding differences
            assert (off > 0).mean() <= 0.05, level


@pytest.mark.parametrize(
    "name", sorted(TRANSFORMS.keys() - {"identity", "autocontrast", "equalize"})
)
def test_the_change_increases_with_the_magnitude(name: str) -> None:
    images = smooth_images(3)
    transforms = torch.full((3,), list(TRANSFORMS).index(name))
    result = trivial_augment(images, transforms, torch.tensor([0, LEVELS // 3, LEVELS]))
    none, some, most = (result.float() - images.float()).abs().mean(dim=(1, 2, 3)).tolist()
    assert none == 0
    assert 0 < some < most


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("value", [0, 7, 255])
def test_images_of_one_color_are_unchanged(name: str, value: int) -> None:
    images = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    transforms = torch.full((2,), list(TRANSFORMS).index(name))
    result = trivial_augment(images, transforms, torch.tensor([0, 0]))
    assert torch.equal(result, images)


def test_images_are_transformed_independently_and_not_in_place() -> None:
    images = smooth_images(120)
    params = sample_params(120, Augmentation(), torch.Generator().manual_seed(1))
    before = images.clone()
    together = trivial_augment(images, params.transforms, params.levels)
    alone = [
        trivial_augment(images[i : i + 1], params.transforms[i : i + 1], params.levels[i : i + 1])
        for i in range(120)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, before)
    assert len(params.transforms.unique()) == len(TRANSFORMS)


def test_transforms_and_magnitudes_are_uniform() -> None:
    generator = torch.Generator().manual_seed(2)
    params = sample_params(14 * 31 * 100, Augmentation(), generator)
    cells = torch.bincount(params.transforms * 31 + params.levels.abs(), minlength=14 * 31).numpy()
    assert len(cells) == 14 * 31
    assert stats.chisquare(cells).pvalue > 1e-3
    signs = params.levels[params.levels != 0].sign().float().mean().item()
    assert abs(signs) < 0.02
