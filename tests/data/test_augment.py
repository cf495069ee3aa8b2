"""Augmentation compared with NumPy and loops over pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from resnet56.data.augment import (
    Augmentation,
    AugmentationParams,
    augment,
    crop_and_flip,
    cutout,
    normalize,
    sample_params,
    shrink,
)
from resnet56.data.trivial_augment import trivial_augment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator())


def cropped(image: np.ndarray, padding: int, row: int, col: int, flip: bool) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    crop = padded[:, row : row + 32, col : col + 32]
    return crop[:, :, ::-1] if flip else crop


def erased(image: np.ndarray, row: int, col: int, side: int) -> np.ndarray:
    image = image.copy()
    for down in range(row - side // 2, row - side // 2 + side):
        for across in range(col - side // 2, col - side // 2 + side):
            if 0 <= down < 32 and 0 <= across < 32:
                image[:, down, across] = 0
    return image


def every_crop(padding: int) -> AugmentationParams:
    """Return parameters for all crop offsets, with and without flips."""
    offsets = range(2 * padding + 1)
    grid = torch.tensor([(r, c, f) for r in offsets for c in offsets for f in (0, 1)])
    params = sample_params(len(grid), Augmentation(padding=padding, flip=True), generator())
    return params._replace(rows=grid[:, 0], cols=grid[:, 1], flips=grid[:, 2].bool())


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_every_crop_is_a_slice_of_the_padded_image(padding: int) -> None:
    params = every_crop(padding)
    images = random_images(len(params.rows))
    result = crop_and_flip(images, params, padding)
    assert result.dtype == torch.uint8
    assert len(result) == 2 * (2 * padding + 1) ** 2
    for index, (row, col, flip) in enumerate(zip(*params[:3], strict=True)):
        expected = cropped(images[index].numpy(), padding, int(row), int(col), bool(flip))
        np.testing.assert_array_equal(result[index].numpy(), expected)


def test_images_are_unchanged_without_padding_and_flips() -> None:
    images = random_images(20)
    params = sample_params(20, Augmentation(padding=0, flip=False), generator())
    assert torch.equal(crop_and_flip(images, params, 0), images)


def test_crops_and_flips_are_uniform() -> None:
    count = 81 * 2 * 100
    params = sample_params(count, Augmentation(padding=4, flip=True), generator(1))
    cells = (params.rows * 9 + params.cols) * 2 + params.flips
    observed = torch.bincount(cells, minlength=162).numpy()
    assert len(observed) == 162  # no value is out of range
    assert stats.chisquare(observed).pvalue > 1e-3
    centers = torch.bincount(
        params.centers[:, 0] * 32 + params.centers[:, 1], minlength=1024
    ).numpy()
    assert len(centers) == 1024
    assert stats.chisquare(centers).pvalue > 1e-3


def test_disabling_flips_does_not_change_the_crops() -> None:
    mirrored = sample_params(500, Augmentation(padding=4, flip=True), generator(2))
    plain = sample_params(500, Augmentation(padding=4, flip=False), generator(2))
    assert not plain.flips.any()
    assert torch.equal(plain.rows, mirrored.rows)
    assert torch.equal(plain.cols, mirrored.cols)


def test_draws_depend_only_on_the_generator() -> None:
    before = torch.get_rng_state()
    first = sample_params(50, Augmentation(padding=4, flip=True), generator(3))
    again = sample_params(50, Augmentation(padding=4, flip=True), generator(3))
    other = sample_params(50, Augmentation(padding=4, flip=True), generator(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_crops_are_channels_last() -> None:
    params = sample_params(5, Augmentation(padding=4, flip=True), generator())
    batch = crop_and_flip(random_images(5), params, 4)
    assert batch.shape == (5, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [0, 8])
def test_augmented_images_are_channels_last(side: int) -> None:
    params = sample_params(5, Augmentation(padding=4, flip=True), generator())
    scale = (torch.tensor(MEAN), torch.tensor(STD))
    batch = augment(random_images(5), params, *scale, Augmentation(cutout=side))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_normalization_matches_numpy_in_double_precision() -> None:
    images = random_images(4)
    result = normalize(images, torch.tensor(MEAN), torch.tensor(STD))
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 5, 16, 32])
def test_cutout_erases_only_the_square(side: int) -> None:
    centers = [(r, c) for r in (0, 1, 7, 16, 24, 31) for c in (0, 2, 8, 16, 30, 31)]
    images = torch.rand(len(centers), 3, 32, 32, generator=generator()) + 1
    before = images.clone()
    result = cutout(images, torch.tensor(centers), side).numpy()
    for index, (row, col) in enumerate(centers):
        expected = erased(before[index].numpy(), row, col, side)
        np.testing.assert_array_equal(result[index], expected)
        if (row, col) == (16, 16):
            assert (result[index] == 0).sum() == 3 * side**2
    assert torch.equal(images, before)


@pytest.mark.parametrize("side", [0, 7, 16])
def test_augment_crops_flips_normalizes_and_erases(side: int) -> None:
    images = random_images(30)
    params = sample_params(30, Augmentation(padding=4, flip=True), generator(5))
    scale = (torch.tensor(MEAN), torch.tensor(STD))
    result = augment(images, params, *scale, Augmentation(cutout=side)).numpy()
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    for index, (row, col, flip, (down, across)) in enumerate(zip(*params[:4], strict=True)):
        crop = cropped(images[index].numpy(), 4, int(row), int(col), bool(flip))
        expected = erased((crop / 255 - mean) / std, int(down), int(across), side)
        np.testing.assert_allclose(result[index], expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_a_batch_is_augmented_like_the_whole_batch() -> None:
    images, part = random_images(12), slice(4, 9)
    params = sample_params(12, Augmentation(padding=4, flip=True), generator(6)).to(
        torch.device("cpu")
    )
    scale = (torch.tensor(MEAN), torch.tensor(STD))
    whole = augment(images, params, *scale, Augmentation(cutout=8))
    alone = augment(images[part], params.select(part), *scale, Augmentation(cutout=8))
    assert torch.equal(whole[part], alone)


def test_trivial_augment_precedes_the_crop() -> None:
    images = random_images(30)
    params = sample_params(30, Augmentation(padding=4, flip=True), generator(7))
    scale = (torch.tensor(MEAN), torch.tensor(STD))
    result = augment(images, params, *scale, Augmentation(cutout=8, trivial_augment=True))
    changed = trivial_augment(images, params.transforms, params.levels)
    assert not torch.equal(changed, images)
    assert torch.equal(result, augment(changed, params, *scale, Augmentation(cutout=8)))


@pytest.mark.parametrize("side", [16, 24, 28])
def test_shrink_matches_pillow(side: int) -> None:
    images = random_images(2).float().contiguous(memory_format=torch.channels_last)
    small = shrink(images, side)
    assert small.is_contiguous(memory_format=torch.channels_last)
    for image, found in zip(images, small, strict=True):
        for plane, channel in zip(image, found, strict=True):
            picture = Image.fromarray(plane.numpy())
            expected = np.array(picture.resize((side, side), Image.Resampling.BILINEAR))
            np.testing.assert_allclose(channel.numpy(), expected, atol=1e-3)


def test_shrink_does_not_copy_images_of_the_right_size() -> None:
    images = random_images(2).float()
    assert shrink(images, 32) is images
