"""Corruptions compared with SciPy, colorsys, Pillow and expected statistics."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from resnet56.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, evenly_spaced

GENERATOR = torch.Generator()


def smooth_images(count: int = 4) -> torch.Tensor:
    """Return random colors, slightly smoothed to resemble natural images."""
    rng = np.random.default_rng(3)
    raw = rng.uniform(0, 255, (count, 3, 32, 32))
    return torch.from_numpy(ndimage.gaussian_filter(raw, (0, 0, 1, 1)).astype(np.uint8))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_deterministic_and_change_the_images(name: str) -> None:
    images = smooth_images()
    before = images.clone()
    for severity in SEVERITIES:
        changed = corrupt(images, name, severity)
        assert changed.shape == images.shape
        assert changed.dtype == torch.uint8
        assert (changed != images).any()
        assert torch.equal(changed, corrupt(images, name, severity))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"saturate"}))
def test_severity_five_changes_more_than_severity_one(name: str) -> None:
    images = smooth_images()
    distances = [(corrupt(images, name, s).int() - images.int()).abs().sum() for s in (1, 5)]
    assert distances[0] < distances[1]


@pytest.mark.parametrize(("severity", "scale"), [(1, 0.04), (5, 0.10)])
def test_gaussian_noise_has_the_published_standard_deviation(severity: int, scale: float) -> None:
    gray = torch.full((8, 3, 32, 32), 0.5)
    noise = CORRUPTIONS["gaussian noise"](gray, severity, GENERATOR.manual_seed(0)) - gray
    assert noise.std().item() == pytest.approx(scale, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.002)


def test_shot_noise_has_poisson_variance() -> None:
    gray = torch.full((16, 3, 32, 32), 0.5)
    noisy = CORRUPTIONS["shot noise"](gray, 5, GENERATOR.manual_seed(0))
    assert noisy.mean().item() == pytest.approx(0.5, rel=0.01)
    assert noisy.var().item() == pytest.approx(0.5 / 50, rel=0.03)


def test_impulse_noise_affects_the_published_fraction() -> None:
    gray = torch.full((16, 3, 32, 32), 0.5)
    noisy = CORRUPTIONS["impulse noise"](gray, 5, GENERATOR.manual_seed(0))
    assert (noisy != gray).double().mean().item() == pytest.approx(0.07, rel=0.05)
    assert (noisy == 1).double().mean().item() == pytest.approx(0.035, rel=0.1)
    assert set(noisy.unique().tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.4), (3, 0.7), (5, 1.0)])
def test_gaussian_blur_matches_scipy(severity: int, sigma: float) -> None:
    images = smooth_images().double() / 255
    actual = CORRUPTIONS["gaussian blur"](images.float(), severity, GENERATOR)
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest")
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_brightness_and_saturation_match_colorsys(name: str, severity: int) -> None:
    colors = [(0.2, 0.4, 0.6), (0.9, 0.1, 0.1), (0.3, 0.3, 0.3), (0.0, 0.0, 0.0), (1.0, 1.0, 0.8)]
    images = torch.tensor(colors).T[None, :, None, :]
    actual = CORRUPTIONS[name](images, severity, GENERATOR)[0, :, 0].T
    for color, result in zip(colors, actual.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        if name == "brightness":
            value = min(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1)
        else:
            factor, increase = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
            saturation = min(saturation * factor + increase, 1)
        assert result == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, value), abs=1e-6)


def test_contrast_scales_around_the_channel_mean() -> None:
    images = smooth_images().double().numpy() / 255
    actual = CORRUPTIONS["contrast"](torch.from_numpy(images), 5, GENERATOR).numpy()
    for image, changed in zip(images, actual, strict=True):
        for channel in range(3):
            mean = image[channel].mean()
            np.testing.assert_allclose(changed[channel], mean + 0.15 * (image[channel] - mean))


def test_jpeg_matches_pillow() -> None:
    images = smooth_images()
    for image, changed in zip(images, corrupt(images, "jpeg", 4), strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=50)
        assert (np.asarray(Image.open(file)) == changed.permute(1, 2, 0).numpy()).all()


def test_pixelate_produces_blocks() -> None:
    """At a scale of 0.65, 32 pixels become 20, so at most 20 rows differ."""
    changed = corrupt(smooth_images(), "pixelate", 5)
    assert max(len(np.unique(image.numpy().reshape(-1, 32), axis=1)[0]) for image in changed) <= 20


def test_indices_are_evenly_spaced() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 5).tolist() == [0, 1, 2]
