"""The training loop that people write, to measure ours against; nothing else uses it.

It does what the best-known ResNet-56 repositories do: a `Dataset` of PIL images, a random crop,
a flip, a conversion and a normalisation image by image, a `DataLoader`, fp32, NCHW, one
operation at a time, `loss.item()` and the accuracy on every step.
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


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as arrays; each access makes a PIL image and augments it.

    Args:
        split: images and labels.
        mean, std: of the images, in units of [0, 1].
    """

    def __init__(self, split: Split, mean: Triple, std: Triple) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = ImageOps.expand(Image.fromarray(self.images[index]), PADDING)
        left, top = random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)
        picture = picture.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return (tensor.float().div(255) - self.mean) / self.std, self.labels[index]


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), as those repositories write it: only the addition in place."""
    out: Tensor = norm(x)
    if residual is not None:
        out += residual
    return F.relu(out)


class StockLoop:
    """Endless training by the plain loop.

    Args:
        arch: a name that `build` knows.
        pictures: what to train on.
        batch: images a step.
        device: where to train.
        workers: processes that load; they start with the first step and end with `close`.
        classes: of the images.
    """

    def __init__(
        self,
        arch: str,
        pictures: Pictures,
        batch: int,
        device: torch.device,
        workers: int,
        classes: int = 10,
    ) -> None:
        self.device = device
        self.model = build(arch, classes=classes).to(device).train()
        self.model.use(norm_relu)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4
        )
        self.loader = DataLoader(
            pictures,
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
        """One step, and the numbers that such loops print."""
        images, labels = next(self.batches)
        images, labels = images.to(self.device), labels.to(self.device)
        # TF32, PyTorch's default on CUDA, is ours to switch off but not its.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            logits = self.model(images)
            loss = self.criterion(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.item() * len(labels)
        self.correct += (logits.argmax(dim=1) == labels).sum().item()

    def close(self) -> None:
        """End the workers."""
        self.batches.close()  # type: ignore[attr-defined]
        self.loader._iterator = None
