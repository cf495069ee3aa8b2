"""Train a network from resnet56 with PyTorch Lightning, on augmented batches from resnet56.

Run: pip install 'lightning>=2.6.4' && python examples/lightning_module.py --epochs 10
"""

import argparse
from collections.abc import Iterable

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from resnet56 import Augmentation, Batches, build, channel_statistics, evaluate, load_data


class LitResNet(lightning.LightningModule):
    """A network with its optimizer and its training batches."""

    def __init__(self, arch: str, classes: int, batches: Batches, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.model = build(arch, classes=classes)
        self.batches = batches

    def train_dataloader(self) -> Iterable[tuple[Tensor, Tensor]]:
        return self.batches.epoch(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.epochs * self.batches.steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    data = load_data(options.data)
    mean, std = channel_statistics(data.train.images)
    augmentation = Augmentation(padding=2, flip=data.allow_flip)
    batches = Batches(data.train, mean, std, batch_size=64, seed=0, augmentation=augmentation)
    module = LitResNet(options.arch, len(data.classes), batches, options.epochs)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        reload_dataloaders_every_n_epochs=1,  # each epoch has its own order and augmentation
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module)
    metrics = evaluate(module.model, data.test, data.classes, mean, std)
    print(f"test accuracy: {metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
