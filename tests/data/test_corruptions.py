"""Corruptions against SciPy, colorsys, Pillow and plain statistics."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from resnet56.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, spread

GENERATOR = torch.Generator()


def pictures(count: int = 4) -> torch.Tensor:
    """Random colours, smoothed a little so that they are picture-like."""
    chance = np.random.default_rng(3)
    raw = chance.uniform(0, 255, (count, 3, 32, 32))
    return torch.from_numpy(ndimage.gaussian_filter(raw, (0, 0, 1, 1)).astype(np.uint8))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_repeats_keeps_the_shape_and_does_something(name: str) -> None:
    images = pictures()
    before = images.clone()
    for severity in SEVERITIES:
        changed = corrupt(images, name, severity)
        assert changed.shape == images.shape
        assert changed.dtype == torch.uint8
        assert (changed != images).any()
        assert torch.equal(changed, corrupt(images, name, severity))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"saturate"}))
def test_severity_five_is_further_from_the_original_than_one(name: str) -> None:
    images = pictures()
    distances = [(corrupt(images, name, s).int() - images.int()).abs().sum() for s in (1, 5)]
    assert distances[0] < distances[1]


@pytest.mark.parametrize(("severity", "scale"), [(1, 0.04), (5, 0.10)])
def test_gaussian_noise_has_the_published_deviation(severity: int, scale: float) -> None:
    grey = torch.full((8, 3, 32, 32), 0.5)
    noise = CORRUPTIONS["gaussian noise"](grey, severity, GENERATOR.manual_seed(0)) - grey
    assert noise.std().item() == pytest.approx(scale, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.002)


def test_shot_noise_has_a_poissons_variance() -> None:
    grey = torch.full((16, 3, 32, 32), 0.5)
    noisy = CORRUPTIONS["shot noise"](grey, 5, GENERATOR.manual_seed(0))
    assert noisy.mean().item() == pytest.approx(0.5, rel=0.01)
    assert noisy.var().item() == pytest.approx(0.5 / 50, rel=0.03)


def test_impulse_noise_hits_the_published_share() -> None:
    grey = torch.full((16, 3, 32, 32), 0.5)
    noisy = CORRUPTIONS["impulse noise"](grey, 5, GENERATOR.manual_seed(0))
    assert (noisy != grey).double().mean().item() == pytest.approx(0.07, rel=0.05)
    assert (noisy == 1).double().mean().item() == pytest.approx(0.035, rel=0.1)
    assert set(noisy.unique().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.4), (3, 0.7), (5, 1.0)])
def test_gaussian_blur_is_scipys(severity: int, sigma: float) -> None:
    images = pictures().double() / 255
    mine = CORRUPTIONS["gaussian blur"](images.float(), severity, GENERATOR)
    theirs = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest")
    np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_colours_change_as_colorsys_has_them(name: str, severity: int) -> None:
    colours = [(0.2, 0.4, 0.6), (0.9, 0.1, 0.1), (0.3, 0.3, 0.3), (0.0, 0.0, 0.0), (1.0, 1.0, 0.8)]
    images = torch.tensor(colours).T[None, :, None, :]
    mine = CORRUPTIONS[name](images, severity, GENERATOR)[0, :, 0].T
    for colour, result in zip(colours, mine.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        if name == "brightness":
            value = min(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1)
        else:
            factor, more = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
            saturation = min(saturation * factor + more, 1)
        assert result == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, value), abs=1e-6)


def test_contrast_moves_values_towards_each_channels_mean() -> None:
    images = pictures().double().numpy() / 255
    mine = CORRUPTIONS["contrast"](torch.from_numpy(images), 5, GENERATOR).numpy()
    for image, changed in zip(images, mine, strict=True):
        for channel in range(3):
            mean = image[channel].mean()
            np.testing.assert_allclose(changed[channel], mean + 0.15 * (image[channel] - mean))


def test_jpeg_is_pillows() -> None:
    images = pictures()
    for image, changed in zip(images, corrupt(images, "jpeg", 4), strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=50)
        assert (np.asarray(Image.open(file)) == changed.permute(1, 2, 0).numpy()).all()


def test_pixelate_makes_blocks() -> None:
    """At 0.65, 32 pixels go through 20: no more than 20 different rows are left."""
    changed = corrupt(pictures(), "pixelate", 5)
    assert max(len(np.unique(image.numpy().reshape(-1, 32), axis=1)[0]) for image in changed) <= 20


def test_spread_is_even_and_whole() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 5).tolist() == [0, 1, 2]
