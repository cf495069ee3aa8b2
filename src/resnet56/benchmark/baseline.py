"""The baseline of the benchmark: a standard training loop.

The loop follows the most widely used ResNet-56 repositories. A `Dataset` crops, flips, converts and
normalizes one PIL image at a time, and a `DataLoader` forms the batches. The model runs in eager
mode, in fp32 and NCHW. Every step calls `loss.item()` and computes the accuracy.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from resnet56.data.dataset import Split, Triple
from resnet56.model import build

PADDING = 4


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """A data set that creates and augments a PIL image on each access.

    Args:
        split: images and labels.
        mean, std: normalization constants, for pixels in [0, 1].
    """

    def __init__(self, split: Split, mean: Triple, std: Triple) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), PADDING)
        left, top = random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)
        image = image.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (tensor.float().div(255) - self.mean) / self.std, self.labels[index]


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute relu(norm(x) + residual).

    As in the most widely used repositories, only the addition runs in place.
    """
    out: Tensor = norm(x)
    if residual is not None:
        out += residual
    return F.relu(out)


class BaselineLoop:
    """A standard training loop that runs one step per call.

    Args:
        arch: name of an architecture; see `build`.
        dataset: training images.
        batch: batch size.
        device: device to train on.
        workers: number of `DataLoader` workers. The first step starts the workers, and `close`
            stops them.
        classes: number of classes.
    """

    def __init__(
        self,
        arch: str,
        dataset: AugmentedImages,
        batch: int,
        device: torch.device,
        workers: int,
        classes: int = 10,
    ) -> None:
        self.device = device
        self.model = build(arch, classes=classes).to(device).train()
        self.model.set_norm_relu(norm_relu)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4
        )
        self.loader = DataLoader(
            dataset,
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            drop_last=True,
            persistent_workers=workers > 0,
        )
        self.batches = self._endless()
        self.loss_sum = self.correct = 0.0

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        """Run one step and update the running loss and accuracy."""
        images, labels = next(self.batches)
        images, labels = images.to(self.device), labels.to(self.device)
        # By default, PyTorch uses TF32 for convolutions on CUDA, but this package disables it.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            logits = self.model(images)
            loss = self.criterion(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.item() * len(labels)
        self.correct += (logits.argmax(dim=1) == labels).sum().item()

    def close(self) -> None:
        """Stop the workers."""
        self.batches.close()  # type: ignore[attr-defined]
        self.loader._iterator = None
