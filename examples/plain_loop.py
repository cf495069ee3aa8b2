"""Train a network in your own PyTorch loop, on augmented batches from resnet56.

Run: python examples/plain_loop.py --epochs 10
"""

import argparse

import torch
from torch.nn import functional as F

from resnet56 import Augmentation, Batches, build, channel_statistics, evaluate, load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(options.data)
    mean, std = channel_statistics(data.train.images)
    augmentation = Augmentation(padding=2, flip=data.allow_flip)
    train = data.train.to(device)
    batches = Batches(train, mean, std, batch_size=64, seed=0, augmentation=augmentation)

    model = build(options.arch, classes=len(data.classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches.steps)
    for epoch in range(options.epochs):
        for images, labels in batches.epoch(epoch):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    metrics = evaluate(model, data.test, data.classes, mean, std)
    print(f"test accuracy: {metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
