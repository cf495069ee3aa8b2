"""Which images make which batch: a pure function of (seed, epoch, rank, world size).

Nothing has to be saved to resume, and several processes see the same global batches as one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from resnet56.data.augment import Augmentation, augment, draw, shrink
from resnet56.data.dataset import Split
from resnet56.errors import UsageError


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, as unrelated for (0, 1) and (1, 0) as can be.

    Zeros at the end do not count: (0,) is (0, 0).
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Batches:
    """Augmented training batches, cut from images that live on the training device.

    Every step sees exactly `batch_size` images over all processes, so that shapes never change;
    the few images that do not fill a last batch are others in each epoch. A set smaller than
    one batch is one batch.
    """

    split: Split  # on the device
    mean: Tensor  # (3,) on the device, in units of [0, 1]
    std: Tensor
    batch_size: int  # global
    seed: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """The global batch must divide evenly, or gradients would not be the batch's mean."""
        if self.global_batch % self.world_size:
            raise UsageError(
                f"a batch of {self.global_batch} does not divide among {self.world_size} "
                "processes; choose a multiple"
            )

    @property
    def global_batch(self) -> int:
        """Images a step over all processes."""
        return min(self.batch_size, len(self.split))

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.split) // self.global_batch

    def _first_flips(self) -> Tensor:
        """Which images are mirrored in the first epoch, where flips alternate: (N,) bool.

        Drawn from the same stream as epoch 0's order, of which a fixed half of the images is
        independent enough.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed))
        return torch.randint(0, 2, (len(self.split),), generator=generator).bool()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches of `epoch` (from 0), from step `start` on.

        Yields:
            images (B, 3, S, S) float32, normalized, channels_last, S = 32 unless `sizes` says
            less; labels (B,) int64.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order = torch.randperm(len(self.split), generator=generator)
        how = self.augmentation
        draws = draw(len(order), how, generator)
        if how.flip and how.alternate_flip:
            draws = draws._replace(flips=self._first_flips()[order] ^ bool(epoch % 2))
        device = self.split.images.device
        order, draws = order.to(device), draws.to(device)
        local = self.global_batch // self.world_size
        for step in range(start, self.steps):
            first = step * self.global_batch + self.rank * local
            part = slice(first, first + local)
            index = order[part]
            images = augment(self.split.images[index], draws.part(part), self.mean, self.std, how)
            if epoch < len(how.sizes):
                images = shrink(images, how.sizes[epoch])
            yield images, self.split.labels[index]
