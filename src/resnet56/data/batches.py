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
from resnet56.data.mixing import draw_mixes, mix_images, mix_labels
from resnet56.errors import UsageError

MIXES = 1  # tells the random numbers of mixing from an epoch's others


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
    classes: int = 10  # of the targets, where images are mixed
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
            less; targets, labels (B,) int64 or, where the batch is mixed, probabilities (B, C)
            float32.
        """
        how = self.augmentation.in_epoch(epoch)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order = torch.randperm(len(self.split), generator=generator)
        draws = draw(len(order), self.augmentation, generator)
        if how.flip and how.alternate_flip:
            draws = draws._replace(flips=self._first_flips()[order] ^ bool(epoch % 2))
        mixes = draw_mixes(
            how.mix,
            how.mix_alpha,
            how.mix_probability,
            steps=self.steps,
            batch=self.global_batch,
            seed=derived_seed(self.seed, epoch, MIXES),
        )
        device = self.split.images.device
        order, draws = order.to(device), draws.to(device)
        local = self.global_batch // self.world_size

        def views(index: slice | Tensor, how: Augmentation) -> tuple[Tensor, Tensor]:
            """The augmented images at `index` in the epoch's order, and their labels."""
            chosen = order[index]
            images = self.split.images[chosen]
            images = augment(images, draws.part(index), self.mean, self.std, how)
            return images, self.split.labels[chosen]

        for step in range(start, self.steps):
            first = step * self.global_batch
            part = slice(self.rank * local, (self.rank + 1) * local)  # of the global batch
            mine = slice(first + part.start, first + part.stop)
            mix = mixes[step]
            if mix is None:
                images, targets = views(mine, how)
            else:
                before = how.before_mixing()
                mixed = [views(mine, before)]
                for partners in mix.partners[:, part]:
                    if self.world_size == 1:  # they are all here, augmented already
                        mixed.append((mixed[0][0][partners], mixed[0][1][partners]))
                    else:
                        mixed.append(views(first + partners, before))
                images = mix_images([images for images, _ in mixed], mix)
                targets = mix_labels([labels for _, labels in mixed], mix, self.classes)
            if epoch < len(how.sizes):
                images = shrink(images, how.sizes[epoch])
            yield images, targets
