"""Training batches as a pure function of the seed, epoch, rank and world size.

Resuming therefore requires no iterator state. The global batches do not depend on the number of
processes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, augment, sample_params, shrink
from resnet56.data.dataset import Split, Triple
from resnet56.data.mixing import mix_images, mix_labels, sample_mix_params
from resnet56.errors import UsageError

AUGMENT_STREAM = 3  # a number in the seeds for a custom augmentation function
MIXING_STREAM = 1  # a number in the seeds for mixing


def derive_seed(*parts: int) -> int:
    """Derive a 63-bit seed from integers.

    The order of the integers matters. Trailing zeros have no effect: (0,) and (0, 0) result in the
    same seed.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's random number generators for the CPU and `device`.

    When the block ends, the previous states of the generators are restored.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Batches:
    """The augmented training batches that `train` uses. `epoch` iterates over them.

    The batches of an epoch depend only on the arguments and the epoch. Each epoch uses a different
    order of the images and different augmentation parameters. Iterating over the batches does not
    change PyTorch's global random state. A custom augmentation function runs with a separate random
    state in each step.

    Images are augmented in batches on the device of `split`, without worker processes. To augment
    them on a GPU, pass `split.to("cuda")`.

    Every global batch contains exactly `batch_size` images, so all batches have the same shape.
    Each epoch skips the last images if they do not fill a batch. A data set with fewer than
    `batch_size` images forms a single batch.

    Attributes:
        split: training images and labels.
        mean, std: channel statistics for normalization, for pixels in [0, 1]. See
            `channel_statistics`.
        batch_size: number of images per step, over all processes.
        seed: seed for the order and the augmentation of the images.
        augmentation: augmentation settings. The default is random crops with padding 4 and
            horizontal flips.
        classes: number of classes, for the targets of mixed images.
        rank, world_size: index of this process and number of processes, for training on several
            GPUs. Each process receives its part of every global batch.

    Raises:
        UsageError: there are no images, or the global batch size is not divisible by `world_size`.
    """

    split: Split
    mean: Triple
    std: Triple
    batch_size: int
    seed: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    classes: int = 10
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check that all processes receive equal batch sizes, because they average gradients."""
        if not len(self.split) or self.batch_size < 1:
            raise UsageError(
                f"cannot form batches of {self.batch_size:,} from {len(self.split):,} images; "
                "both numbers must be at least 1"
            )
        if self.global_batch % self.world_size:
            raise UsageError(
                f"batch size {self.global_batch} is not divisible by the {self.world_size} "
                f"processes; choose a multiple of {self.world_size}"
            )

    @property
    def global_batch(self) -> int:
        """Number of images per step, over all processes."""
        return min(self.batch_size, len(self.split))

    @property
    def steps(self) -> int:
        """Number of steps per epoch."""
        return len(self.split) // self.global_batch

    def _first_flips(self) -> Tensor:
        """For alternating flips, return a Boolean mask (N,) of the images to flip in even epochs.

        The mask is generated with the same seed as the order of the images in epoch 0. Sharing the
        seed is harmless.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed))
        return torch.randint(0, 2, (len(self.split),), generator=generator).bool()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of this process in one epoch.

        Args:
            epoch: zero-based index of the epoch.
            start: zero-based index of the first step.

        Yields:
            images: normalized float32 images (B, 3, S, S), in channels-last memory format. S is the
                entry for the epoch in `sizes`, or 32 if there is none.
            targets: int64 labels (B,), or float32 probabilities (B, C) if the batch is mixed.
        """
        augmentation = self.augmentation.in_epoch(epoch)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(len(self.split), generator=generator)
        params = sample_params(len(order), self.augmentation, generator)
        if augmentation.flip and augmentation.alternate_flip:
            params = params._replace(flips=self._first_flips()[order] ^ bool(epoch % 2))
        mixes = sample_mix_params(
            augmentation.mix,
            augmentation.mix_alpha,
            augmentation.mix_probability,
            steps=self.steps,
            batch=self.global_batch,
            seed=derive_seed(self.seed, epoch, MIXING_STREAM),
        )
        device = self.split.images.device
        mean, std = (torch.tensor(values, device=device) for values in (self.mean, self.std))
        order, params = order.to(device), params.to(device)
        local = self.global_batch // self.world_size

        def load(index: slice | Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
            """Return the augmented images and labels at `index` in the order of the epoch."""
            selected = order[index]
            images = self.split.images[selected]
            state: AbstractContextManager[None] = nullcontext()
            if augmentation.function is not None:
                state = seeded(
                    derive_seed(self.seed, epoch, AUGMENT_STREAM, step, self.rank), device
                )
            with state:
                images = augment(images, params.select(index), mean, std, augmentation)
            return images, self.split.labels[selected]

        for step in range(start, self.steps):
            first = step * self.global_batch
            # The images of this process in the global batch.
            part = slice(self.rank * local, (self.rank + 1) * local)
            rank_slice = slice(first + part.start, first + part.stop)
            mix = mixes[step]
            if mix is None:
                images, targets = load(rank_slice, augmentation)
            else:
                before = augmentation.before_mixing()
                mixed = [load(rank_slice, before)]
                for partners in mix.partners[:, part]:
                    if self.world_size == 1:  # this process has already loaded the partners
                        mixed.append((mixed[0][0][partners], mixed[0][1][partners]))
                    else:
                        mixed.append(load(first + partners, before))
                images = mix_images([images for images, _ in mixed], mix)
                targets = mix_labels([labels for _, labels in mixed], mix, self.classes)
            if epoch < len(augmentation.sizes):
                images = shrink(images, augmentation.sizes[epoch])
            yield images, targets
