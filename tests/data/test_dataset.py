"""Splits, statistics and fingerprints, against numpy and naive loops."""

import hashlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from resnet56.data.dataset import Dataset, Split, channel_statistics, hold_out
from resnet56.errors import DataError, UsageError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def numbered(sizes: list[int], *, seed: int = 0) -> Split:
    """A shuffled split of so many images per class; each image's first bytes are its index."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.RandomState(seed).shuffle(labels)
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels)) % 256
    images[:, 0, 0, 1] = torch.arange(len(labels)) // 256
    return Split(images, torch.from_numpy(labels))


def indices(split: Split) -> list[int]:
    first = split.images[:, 0, 0, :2].long()
    return (first[:, 0] + 256 * first[:, 1]).tolist()


def test_hold_out_keeps_proportions_and_loses_nothing() -> None:
    split = numbered([400, 300, 200, 100])
    kept, held = hold_out(split, 100)
    assert held.labels.bincount().tolist() == [40, 30, 20, 10]
    assert sorted(indices(kept) + indices(held)) == list(range(1000))
    for part in (kept, held):
        assert indices(part) == sorted(indices(part))
        assert torch.equal(part.labels, split.labels[indices(part)])


def test_hold_out_depends_on_its_arguments_alone() -> None:
    split = numbered([50, 50])
    first = indices(hold_out(split, 20)[1])
    np.random.seed(5)
    torch.manual_seed(5)
    assert indices(hold_out(split, 20)[1]) == first
    assert indices(hold_out(split, 20, seed=1)[1]) != first
    # Written down on purpose: a stream that changes would change what people validate on.
    assert indices(hold_out(numbered([40, 40]), 5)[1]) == [27, 30, 45, 48, 50]


@pytest.mark.parametrize("count", [3, 4, 10, 100, 505, 900, 1000, 1006, 1007])
def test_hold_out_leaves_every_class_on_both_sides(count: int) -> None:
    kept, held = hold_out(SKEWED, count)
    assert len(held) == count
    assert kept.labels.bincount(minlength=4).min() >= 1
    assert held.labels.bincount(minlength=4)[:3].min() >= 1
    assert 3 not in held.labels.tolist()  # a class of one image stays in the kept part


SKEWED = numbered([1000, 7, 3, 1])


@pytest.mark.parametrize("count", [-1, 0, 1, 2, 1008, 1011, 5000])
def test_hold_out_refuses_a_count_that_empties_a_class(count: int) -> None:
    with pytest.raises(UsageError, match=r"choose 3 to 1,007 \(every class"):
        hold_out(SKEWED, count)


def test_hold_out_refuses_what_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="no class has two"):
        hold_out(numbered([1, 1]), 1)
    with pytest.raises(UsageError, match="no class has two"):
        hold_out(numbered([]), 1)
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="seed"):
            hold_out(numbered([5, 5]), 2, seed=seed)


@pytest.mark.parametrize("count", [1, 999, 1000, 2345])
def test_channel_statistics_are_those_of_numpy(count: int) -> None:
    pixels = noise(count, 3, 32, 32)
    pixels[:, 1] //= 3
    mean, std = channel_statistics(torch.from_numpy(pixels))
    exact = pixels.astype(np.float64) / 255
    assert mean == pytest.approx(exact.mean(axis=(0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(exact.std(axis=(0, 2, 3)), rel=1e-12)


def test_a_constant_channel_has_deviation_one() -> None:
    images = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, 1] = 0
    images[0, 2, 0, 0] = 0
    mean, std = channel_statistics(images)
    assert mean[:2] == (1.0, 0.0)
    assert std[:2] == (1.0, 1.0)
    assert 0 < std[2] < 0.1


def test_channel_statistics_make_no_wide_copy() -> None:
    images = torch.zeros(20_000, 3, 32, 32, dtype=torch.uint8)
    tracemalloc.start()
    channel_statistics(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # the images are 61 MB


def test_channel_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        channel_statistics(torch.zeros(0, 3, 32, 32, dtype=torch.uint8))


def test_the_fingerprint_is_a_digest_of_all_that_matters() -> None:
    def dataset(train: Split, test: Split, classes: tuple[str, ...] = ("a", "b")) -> Dataset:
        return Dataset(
            "any", classes, train, test, mirror=True, source="anywhere", origin="nowhere"
        )

    train, test = numbered([3, 3]), numbered([1, 1])
    train = Split(torch.from_numpy(noise(6, 3, 32, 32)), train.labels)
    original = dataset(train, test).fingerprint()
    shapes = [[6, 3, 32, 32], [2, 3, 32, 32]]
    by_hand = json.dumps([["a", "b"], shapes]).encode()
    for part in (train, test):
        by_hand += part.images.numpy().tobytes()
        by_hand += struct.pack(f"<{len(part)}q", *part.labels.tolist())
    assert original == hashlib.sha256(by_hand).hexdigest()
    turned = Split(train.images.mT, train.labels)
    assert not turned.images.is_contiguous()
    copied = Split(train.images.mT.contiguous(), train.labels)
    assert dataset(turned, test).fingerprint() == dataset(copied, test).fingerprint()
    swapped = Split(train.images, 1 - train.labels)
    others = {
        dataset(turned, test).fingerprint(),
        dataset(swapped, test).fingerprint(),
        dataset(test, train).fingerprint(),
        dataset(train, test, ("a", "c")).fingerprint(),
        original,
    }
    assert len(others) == 5
