"""Splits, statistics and fingerprints, compared with NumPy and naive loops."""

import hashlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, random_split

from resnet56.data.dataset import Dataset, Split, channel_statistics, stratified_split
from resnet56.errors import DataError, UsageError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def numbered(sizes: list[int], *, seed: int = 0) -> Split:
    """Return a shuffled split of `sizes` images per class. Each image starts with its index."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.RandomState(seed).shuffle(labels)
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels)) % 256
    images[:, 0, 0, 1] = torch.arange(len(labels)) // 256
    return Split(images, torch.from_numpy(labels))


def indices(split: Split) -> list[int]:
    first = split.images[:, 0, 0, :2].long()
    return (first[:, 0] + 256 * first[:, 1]).tolist()


def test_a_split_is_a_map_style_data_set() -> None:
    split = numbered([3, 4])
    image, label = split[2]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 32, 32))
    assert torch.equal(image, split.images[2])
    assert type(label) is int
    assert label == split.labels[2]
    assert split[-1][1] == split.labels[6]
    assert [label for _, label in split] == split.labels.tolist()
    for index in (7, -8):
        with pytest.raises(IndexError):
            split[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loaders_read_splits_and_their_parts(workers: int) -> None:
    split = numbered([6, 5])
    first, second = random_split(split, [8, 3], torch.Generator().manual_seed(0))
    assert sorted([*first.indices, *second.indices]) == list(range(11))
    for part, positions in ((split, range(11)), (first, first.indices), (Subset(split, [4]), [4])):
        chosen = split.select(list(positions))
        loader = DataLoader(part, batch_size=4, num_workers=workers)
        images, labels = (torch.cat(batches) for batches in zip(*loader, strict=True))
        assert images.dtype == torch.uint8
        assert torch.equal(images, chosen.images)
        assert torch.equal(labels, chosen.labels)


def test_images_are_selected_by_slice_positions_or_mask() -> None:
    split = numbered([5])
    assert indices(split.select(slice(1, 3))) == [1, 2]
    assert indices(split.select([4, 0])) == [4, 0]
    assert indices(split.select(torch.tensor([False, True, False, False, True]))) == [1, 4]
    assert len(split.to("meta")) == 5
    assert split.to("meta").images.is_meta


def test_stratified_split_keeps_proportions_and_all_images() -> None:
    split = numbered([400, 300, 200, 100])
    rest, selected = stratified_split(split, 100)
    assert selected.labels.bincount().tolist() == [40, 30, 20, 10]
    assert sorted(indices(rest) + indices(selected)) == list(range(1000))
    for part in (rest, selected):
        assert indices(part) == sorted(indices(part))
        assert torch.equal(part.labels, split.labels[indices(part)])


def test_stratified_split_depends_only_on_its_arguments() -> None:
    split = numbered([50, 50])
    first = indices(stratified_split(split, 20)[1])
    np.random.seed(5)
    torch.manual_seed(5)
    assert indices(stratified_split(split, 20)[1]) == first
    assert indices(stratified_split(split, 20, seed=1)[1]) != first
    # Fixed values: a different random stream would change the validation sets of users.
    assert indices(stratified_split(numbered([40, 40]), 5)[1]) == [27, 30, 45, 48, 50]


@pytest.mark.parametrize("count", [3, 4, 10, 100, 505, 900, 1000, 1006, 1007])
def test_stratified_split_has_every_class_in_both_parts(count: int) -> None:
    rest, selected = stratified_split(SKEWED, count)
    assert len(selected) == count
    assert rest.labels.bincount(minlength=4).min() >= 1
    assert selected.labels.bincount(minlength=4)[:3].min() >= 1
    assert 3 not in selected.labels.tolist()  # a class of one image stays in the first part


SKEWED = numbered([1000, 7, 3, 1])


@pytest.mark.parametrize("count", [-1, 0, 1, 2, 1008, 1011, 5000])
def test_stratified_split_rejects_a_count_that_empties_a_class(count: int) -> None:
    with pytest.raises(UsageError, match=r"choose 3 to 1,007 \(each part needs"):
        stratified_split(SKEWED, count)


def test_stratified_split_rejects_classes_that_are_too_small() -> None:
    with pytest.raises(UsageError, match="no class has two"):
        stratified_split(numbered([1, 1]), 1)
    with pytest.raises(UsageError, match="no class has two"):
        stratified_split(numbered([]), 1)
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="seed"):
            stratified_split(numbered([5, 5]), 2, seed=seed)


@pytest.mark.parametrize("count", [1, 999, 1000, 2345])
def test_channel_statistics_match_numpy(count: int) -> None:
    pixels = noise(count, 3, 32, 32)
    pixels[:, 1] //= 3
    mean, std = channel_statistics(torch.from_numpy(pixels))
    exact = pixels.astype(np.float64) / 255
    assert mean == pytest.approx(exact.mean(axis=(0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(exact.std(axis=(0, 2, 3)), rel=1e-12)


def test_a_constant_channel_has_standard_deviation_one() -> None:
    images = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, 1] = 0
    images[0, 2, 0, 0] = 0
    mean, std = channel_statistics(images)
    assert mean[:2] == (1.0, 0.0)
    assert std[:2] == (1.0, 1.0)
    assert 0 < std[2] < 0.1


def test_channel_statistics_do_not_copy_the_images() -> None:
    images = torch.zeros(20_000, 3, 32, 32, dtype=torch.uint8)
    tracemalloc.start()
    channel_statistics(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # the images are 61 MB


def test_channel_statistics_require_images() -> None:
    with pytest.raises(DataError, match="no images"):
        channel_statistics(torch.zeros(0, 3, 32, 32, dtype=torch.uint8))


def test_the_fingerprint_covers_classes_shapes_images_and_labels() -> None:
    def dataset(train: Split, test: Split, classes: tuple[str, ...] = ("a", "b")) -> Dataset:
        return Dataset(
            "any", classes, train, test, allow_flip=True, source="anywhere", origin="nowhere"
        )

    train, test = numbered([3, 3]), numbered([1, 1])
    train = Split(torch.from_numpy(noise(6, 3, 32, 32)), train.labels)
    original = dataset(train, test).fingerprint()
    shapes = [[6, 3, 32, 32], [2, 3, 32, 32]]
    expected = json.dumps([["a", "b"], shapes]).encode()
    for part in (train, test):
        expected += part.images.numpy().tobytes()
        expected += struct.pack(f"<{len(part)}q", *part.labels.tolist())
    assert original == hashlib.sha256(expected).hexdigest()
    transposed = Split(train.images.mT, train.labels)
    assert not transposed.images.is_contiguous()
    copied = Split(train.images.mT.contiguous(), train.labels)
    assert dataset(transposed, test).fingerprint() == dataset(copied, test).fingerprint()
    swapped = Split(train.images, 1 - train.labels)
    fingerprints = {
        dataset(transposed, test).fingerprint(),
        dataset(swapped, test).fingerprint(),
        dataset(test, train).fingerprint(),
        dataset(train, test, ("a", "c")).fingerprint(),
        original,
    }
    assert len(fingerprints) == 5
