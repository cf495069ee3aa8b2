"""Order, augmentation and distribution of batches, with images that encode their index."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet56.data.augment import Augmentation
from resnet56.data.batches import Batches, derive_seed
from resnet56.data.dataset import Split
from resnet56.errors import UsageError

BLACK, UNIT = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # constants that keep the pixel values


def numbered(count: int) -> Split:
    """Return a split in which image `i` has pixels and label `i`. `count` is at most 256."""
    numbers = torch.arange(count)
    return Split(numbers.byte()[:, None, None, None].expand(-1, 3, 32, 32).contiguous(), numbers)


def plain(count: int, batch_size: int, **rest: Any) -> Batches:
    still = Augmentation(padding=0, flip=False)
    options: dict[str, Any] = {"seed": 0} | rest
    split = numbered(count)
    return Batches(split, BLACK, UNIT, batch_size=batch_size, augmentation=still, **options)


EVERYTHING = Augmentation(cutout=8, trivial_augment=True)


def augmented(
    count: int, batch_size: int, augmentation: Augmentation = EVERYTHING, **rest: Any
) -> Batches:
    """Return batches of noise images with all random augmentations."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    split = Split(noise, torch.arange(count))
    options: dict[str, Any] = {"batch_size": batch_size, "seed": 3, "augmentation": augmentation}
    options |= {"classes": count}
    return Batches(split, mean, std, **options | rest)


def labels(batches: Batches, epoch: int = 0) -> list[int]:
    return torch.cat([labels for _, labels in batches.epoch(epoch)]).tolist()


def same(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) and torch.equal(k, m) for (a, k), (b, m) in zip(some, others, strict=True)
    )


def test_an_epoch_contains_each_image_at_most_once_with_its_label() -> None:
    batches = plain(70, 16)
    seen = []
    for images, numbers in batches.epoch(0):
        assert images.shape == (16, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert numbers.dtype == torch.int64
        assert torch.equal(images.round(), numbers[:, None, None, None].expand_as(images).float())
        seen += numbers.tolist()
    assert batches.steps == 4
    assert len(seen) == 64
    assert len(set(seen)) == 64
    assert set(seen) <= set(range(70))


@pytest.mark.parametrize("cutout", [0, 8])
def test_augmented_batches_are_channels_last(cutout: int) -> None:
    for images, _ in augmented(40, 8, replace(EVERYTHING, cutout=cutout)).epoch(0):
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_dropped_images_differ_between_epochs() -> None:
    batches = plain(70, 16)
    left_out = [frozenset(range(70)) - frozenset(labels(batches, epoch)) for epoch in range(8)]
    assert all(len(few) == 6 for few in left_out)
    assert len(set(left_out)) == 8
    assert not frozenset.intersection(*left_out)


def test_full_batches_contain_all_images() -> None:
    assert sorted(labels(plain(64, 16), 5)) == list(range(64))


def test_the_order_depends_on_epoch_and_seed() -> None:
    orders = [labels(plain(64, 16, seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert sorted(orders[0]) not in orders


def test_batches_depend_only_on_seed_and_epoch() -> None:
    torch.manual_seed(1)
    first = list(augmented(40, 8).epoch(2))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(list(augmented(40, 8).epoch(2)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_between_epochs() -> None:
    batches = augmented(8, 8, replace(EVERYTHING, cutout=0))
    per_epoch = []
    for epoch in range(6):
        ((images, numbers),) = batches.epoch(epoch)
        per_epoch.append(images[numbers.argsort()])
    changed = [(a != b).flatten(1).any(dim=1) for a, b in pairwise(per_epoch)]
    # By chance, some images have the same crop and flip (of 162) in both epochs.
    assert torch.stack(changed).float().mean() > 0.9


def mirrored(batches: Batches, epoch: int) -> dict[int, bool]:
    """Return whether each image is mirrored in `epoch`. Images are brighter on the right."""
    return {
        int(number): bool(image[0, 0, 0] > image[0, 0, -1])
        for images, numbers in batches.epoch(epoch)
        for image, number in zip(images, numbers, strict=True)
    }


def test_alternating_flips_show_both_orientations_in_two_epochs() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(200, 3, 32, 32).contiguous()
    split = Split(ramp, torch.arange(200))
    turns = Augmentation(padding=0, alternate_flip=True)
    make = partial(Batches, split, BLACK, UNIT, batch_size=8)
    seen = [mirrored(make(seed=3, augmentation=turns), epoch) for epoch in range(4)]
    assert 70 < sum(seen[0].values()) < 130
    for one, next_one in pairwise(seen):
        assert all(one[image] != next_one[image] for image in range(200))
    assert mirrored(make(seed=4, augmentation=turns), 0) != seen[0]
    never = make(seed=3, augmentation=replace(turns, flip=False))
    assert not any(mirrored(never, 1).values())


MIXED = replace(EVERYTHING, mix="cutmix", mix_probability=0.5)


@pytest.mark.parametrize("augmentation", [EVERYTHING, MIXED])
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_starting_at_a_step_skips_the_earlier_steps(start: int, augmentation: Augmentation) -> None:
    batches = augmented(44, 8, augmentation)
    assert same(list(batches.epoch(1, start=start)), list(batches.epoch(1))[start:])


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup", "ricap"])
def test_the_parts_of_all_processes_form_the_batch_of_one_process(
    world_size: int, start: int, mix: str
) -> None:
    augmentation = replace(EVERYTHING, mix=mix, mix_probability=0.7)
    alone = list(augmented(44, 8, augmentation).epoch(1, start))
    ranks = [
        augmented(44, 8, augmentation, rank=rank, world_size=world_size).epoch(1, start)
        for rank in range(world_size)
    ]
    together = [
        (torch.cat([images for images, _ in parts]), torch.cat([numbers for _, numbers in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert same(together, alone)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "ricap"])
def test_targets_match_the_fractions_of_mixed_images(mix: str) -> None:
    """Each image has the color of its label, so its mean is the mean label of its target."""
    augmentation = Augmentation(padding=0, flip=False, cutout=16, mix=mix)
    batches = Batches(
        numbered(30), BLACK, UNIT, batch_size=8, seed=1, augmentation=augmentation, classes=30
    )
    for images, targets in batches.epoch(2):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert targets.shape == (8, 30)
        assert torch.allclose(targets.sum(dim=1), torch.ones(8))
        brightness = targets @ torch.arange(30.0)
        assert torch.allclose(images.mean(dim=(1, 2, 3)), brightness, atol=1e-2)
        assert not (images == 0).flatten(1).all(dim=1).any()
        if mix != "mixup":
            values = [len(image.round(decimals=3).unique()) for image in images]
            assert max(values) > 1
            assert all(len(row.nonzero()) >= n for row, n in zip(targets, values, strict=True))


def test_ricap_is_not_cropped_from_padded_images() -> None:
    white = Split(torch.full((16, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(16) % 4)
    for mix, black in (("ricap", False), ("cutmix", True)):
        augmentation = Augmentation(mix=mix)
        batches = Batches(
            white, BLACK, UNIT, batch_size=16, seed=0, augmentation=augmentation, classes=4
        )
        ((images, _),) = batches.epoch(0)
        assert bool((images == 0).any()) == black


def test_the_last_epochs_use_crops_and_flips_only() -> None:
    augmentation = Augmentation(cutout=8, trivial_augment=True, mix="mixup", plain_tail_from=2)
    tail, crops = augmented(24, 8, augmentation), augmented(24, 8, Augmentation())
    assert same(list(tail.epoch(2)), list(crops.epoch(2)))
    before = replace(augmentation, plain_tail_from=None)
    assert same(list(tail.epoch(1)), list(augmented(24, 8, before).epoch(1)))


def test_unmixed_batches_do_not_depend_on_mixing() -> None:
    plain_ones = list(augmented(44, 8).epoch(0))
    mixed = list(augmented(44, 8, MIXED).epoch(0))
    hard = [not targets.is_floating_point() for _, targets in mixed]
    assert 0 < sum(hard) < len(hard)
    for one, other, is_hard in zip(mixed, plain_ones, hard, strict=True):
        assert same([one], [other]) == is_hard


def test_a_split_smaller_than_a_batch_is_one_batch() -> None:
    batches = plain(10, 32)
    assert (batches.steps, batches.global_batch) == (1, 10)
    assert sorted(labels(batches)) == list(range(10))
    halves = [labels(plain(10, 32, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(half) for half in halves] == [5, 5]
    assert halves[0] + halves[1] == labels(batches)


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(64, 30, 4), (10, 32, 4)])
def test_a_batch_that_is_not_divisible_by_the_processes_raises_an_error(
    count: int, batch_size: int, world_size: int
) -> None:
    with pytest.raises(UsageError, match=f"{world_size} processes") as caught:
        plain(count, batch_size, world_size=world_size)
    assert f"batch size {min(count, batch_size)} " in str(caught.value)


def test_flip_and_padding_are_applied() -> None:
    row = torch.arange(32).byte().expand(64, 3, 32, 32).contiguous()
    one_batch = partial(Batches, Split(row, torch.arange(64)), BLACK, UNIT, batch_size=64, seed=0)
    ((straight, _),) = one_batch(augmentation=Augmentation(padding=0, flip=False)).epoch(0)
    ((mirrored, _),) = one_batch(augmentation=Augmentation(padding=0, flip=True)).epoch(0)
    ((moved, _),) = one_batch(augmentation=Augmentation(padding=2, flip=False)).epoch(0)
    falling = (mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, -1]).sum()
    assert 16 < falling < 48
    assert torch.equal(straight.round().byte(), row)
    assert set(moved[:, 0, 16, 16].round().int().tolist()) == {14, 15, 16, 17, 18}


def test_derived_seeds_have_63_bits_and_are_distinct() -> None:
    seeds = {derive_seed(seed, epoch) for seed in range(40) for epoch in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_the_first_epochs_can_use_smaller_images() -> None:
    batches = augmented(24, 8, replace(EVERYTHING, sizes=(16, 24)))
    assert [next(batches.epoch(epoch))[0].shape[-1] for epoch in range(3)] == [16, 24, 32]
    full = list(augmented(24, 8).epoch(0))
    for (small, numbers), (images, same_numbers) in zip(batches.epoch(0), full, strict=True):
        assert torch.equal(numbers, same_numbers)  # same images and crops
        assert torch.allclose(small.mean(), images.mean(), atol=0.01)


def test_batches_require_images() -> None:
    for count, batch_size in ((0, 8), (8, 0)):
        with pytest.raises(UsageError, match="both numbers must be at least 1"):
            plain(count, batch_size)


def test_batches_leave_the_global_random_state_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    list(augmented(44, 8, MIXED).epoch(0))
    assert torch.equal(torch.rand(3), expected)
