"""Prune the smallest weights of a trained network, and fine-tune the others.

Run: python examples/pruning.py --amount 0.8 --epochs 5
"""

import argparse
import tempfile
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from resnet56 import RECIPES, Augmentation, Batches, evaluate, load, load_data, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--amount", type=float, default=0.8, help="fraction of weights to prune")
    parser.add_argument("--epochs", type=int, default=5, help="number of epochs for each phase")
    options = parser.parse_args()

    data = load_data(options.data)
    recipe = replace(RECIPES["quick"], arch=options.arch, epochs=options.epochs)
    with tempfile.TemporaryDirectory() as run:
        train(recipe, data, run)
        predictor = load(run)
    mean, std = predictor.mean, predictor.std
    print(f"accuracy before pruning: {predictor.evaluate(data.test)['accuracy']:.4f}")

    model = predictor.model
    layers = [(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=options.amount)
    pruned = evaluate(model, data.test, data.classes, mean, std)
    print(f"accuracy before fine-tuning: {pruned['accuracy']:.4f}")

    images = data.train.to(next(model.parameters()).device)
    augmentation = Augmentation(padding=2, flip=data.allow_flip)
    batches = Batches(images, mean, std, batch_size=64, seed=1, augmentation=augmentation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for epoch in range(options.epochs):
        for inputs, labels in batches.epoch(epoch):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()  # the gradients of pruned weights are zero
            optimizer.step()

    for layer in layers:
        prune.remove(*layer)  # makes the zeros permanent
    zeros = sum(int((layer.weight == 0).sum()) for layer, _ in layers)
    metrics = evaluate(model, data.test, data.classes, mean, std)
    print(f"pruned weights: {zeros:,}")
    print(f"test accuracy: {metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
