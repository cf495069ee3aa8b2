"""Mixed images, compared with loops over pixels, and the distribution of their parameters."""

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from resnet56 import recipe
from resnet56.data.mixing import METHODS, MixParams, mix_images, mix_labels, sample_mix_params

BATCH = 6


def drawn(method: str, count: int = 200, alpha: float = 1.0, seed: int = 0) -> list[MixParams]:
    mixes = sample_mix_params(method, alpha, 1.0, steps=count, batch=BATCH, seed=seed)
    return [mix for mix in mixes if mix is not None]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.tensor([0, 3, 3, 1, 2, 0])
    return images.contiguous(memory_format=torch.channels_last), labels


def pixel_by_pixel(
    images: np.ndarray, labels: np.ndarray, mix: MixParams, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return image `i` mixed as in the papers, and its target from the pixels of each class."""
    sources = [i, *(int(partners[i]) for partners in mix.partners)]
    result, target = np.zeros((3, 32, 32)), np.zeros(4)
    if not mix.patches:
        for source, share in zip(sources, mix.weights, strict=True):
            result += share * images[source]
            target[labels[source]] += share
        return result, target
    for y, x in itertools.product(range(32), range(32)):
        source, from_y, from_x = i, y, x
        for patch in mix.patches:
            down, across = y - patch.top, x - patch.left
            if 0 <= down < patch.height and 0 <= across < patch.width:
                source = sources[patch.image]
                from_y, from_x = patch.from_top + down, patch.from_left + across
        result[:, y, x] = images[source][:, from_y, from_x]
        target[labels[source]] += 1 / 1024
    return result, target


@pytest.mark.parametrize("method", sorted(METHODS))
def test_mixed_batches_match_a_loop_over_images_and_pixels(method: str) -> None:
    images, labels = batch()
    for mix in drawn(method, 4):
        mixed = mix_images([images, *(images[p] for p in mix.partners)], mix)
        targets = mix_labels([labels, *(labels[p] for p in mix.partners)], mix, 4)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert mixed.dtype == targets.dtype == torch.float32
        for i in range(BATCH):
            expected, target = pixel_by_pixel(images.numpy(), labels.numpy(), mix, i)
            np.testing.assert_allclose(mixed[i].numpy(), expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(targets[i].numpy(), target, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 5.0])
def test_weights_sum_to_one_and_rectangles_are_inside_the_image(method: str, alpha: float) -> None:
    for mix in drawn(method, alpha=alpha):
        assert sum(mix.weights) == pytest.approx(1)
        assert min(mix.weights) >= 0
        assert all(sorted(partners.tolist()) == list(range(BATCH)) for partners in mix.partners)
        for patch in mix.patches:
            assert min(patch) >= 0
            assert max(patch.top, patch.from_top) + patch.height <= 32
            assert max(patch.left, patch.from_left) + patch.width <= 32


def test_mixup_weights_follow_the_beta_distribution() -> None:
    for alpha in (0.3, 1.0, 2.0):
        weights = [mix.weights[0] for mix in drawn("mixup", 2000, alpha)]
        assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_the_cutmix_rectangle_is_a_clipped_square() -> None:
    patches = [mix.patches[0] for mix in drawn("cutmix", 4000)]
    assert all((p.top, p.left) == (p.from_top, p.from_left) for p in patches)
    inside = [
        p
        for p in patches
        if p.top > 0 and p.left > 0 and p.top + p.height < 32 and p.left + p.width < 32
    ]
    assert len(inside) > 500
    assert all(p.height == p.width for p in inside)
    # Simulate the paper: lambda and the center are uniform, and the square is clipped.
    generator = np.random.default_rng(1)
    sides = (32 * np.sqrt(1 - generator.uniform(size=100_000))).astype(int) // 2
    centers = generator.integers(0, 32, (2, 100_000))
    high, wide = (np.minimum(c + sides, 32) - np.maximum(c - sides, 0) for c in centers)
    areas = [p.height * p.width for p in patches]
    assert stats.ks_2samp(areas, high * wide).pvalue > 1e-3
    covered = np.mean([p.top <= 3 < p.top + p.height for p in patches])
    simulated = np.mean((centers[0] - sides <= 3) & (centers[0] + sides > 3))
    assert covered == pytest.approx(simulated, abs=0.03)


def test_the_common_corner_of_ricap_crops_follows_the_beta_distribution() -> None:
    points = []
    for mix in drawn("ricap", 2000, 0.3):
        first, right, below, across = mix.patches
        assert [patch.image for patch in mix.patches] == [0, 1, 2, 3]
        assert (first.top, first.left, right.top, below.left) == (0, 0, 0, 0)
        assert (right.left, below.top) == (across.left, across.top) == (first.width, first.height)
        assert first.width + right.width == first.height + below.height == 32
        points.append((first.width, first.height))
    for coordinates in zip(*points, strict=True):
        edges = [*(np.arange(33) - 0.5).clip(0, 32).tolist(), 32]
        expected = np.diff(stats.beta(0.3, 0.3).cdf(np.array(edges) / 32)) * len(points)
        observed = np.bincount(coordinates, minlength=33)
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_batches_are_mixed_with_the_given_probability() -> None:
    options: dict[str, Any] = {"steps": 2000, "batch": BATCH, "seed": 3}
    half = sample_mix_params("cutmix", 1.0, 0.5, **options)
    assert stats.binomtest(sum(mix is not None for mix in half), 2000, 0.5).pvalue > 1e-3
    every = sample_mix_params("cutmix", 1.0, 1.0, **options)
    for mix, same in zip(half, every, strict=True):
        if mix is not None and same is not None:
            assert mix[1:] == same[1:]
            assert torch.equal(mix.partners, same.partners)
    assert sample_mix_params("none", 1.0, 1.0, **options) == [None] * 2000


def test_the_numbers_depend_only_on_the_seed() -> None:
    weights = [[mix.weights for mix in drawn("ricap", 20, seed=seed)] for seed in (1, 1, 2)]
    assert weights[0] == weights[1] != weights[2]


def test_recipes_accept_all_methods() -> None:
    assert set(get_args(recipe.Mixing)) == {"none", *METHODS}
