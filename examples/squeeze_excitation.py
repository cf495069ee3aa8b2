"""Train your own model: ResNet with squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507).

Each block scales its channels before it adds the shortcut. You can train any other module in the
same way.

Run: python examples/squeeze_excitation.py --arch resnet56 --data cifar10 --epochs 10
"""

import argparse
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from resnet56 import RECIPES, ResNet, build, load, load_data, train
from resnet56.model import BasicBlock


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a factor from 0 to 1 that depends on the means of all channels."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.weights = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.weights(x.mean(dim=(2, 3)))
        return x * weights[:, :, None, None]


def se_resnet(classes: int, arch: str) -> ResNet:
    """Build a network of basic blocks with squeeze-and-excitation after the last batch norm."""
    model = build(arch, classes=classes)
    for block in [module for module in model.modules() if isinstance(module, BasicBlock)]:
        excitation = SqueezeExcitation(block.bn2.num_features)
        block.register_module("bn2", nn.Sequential(block.bn2, excitation))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", default="runs/squeeze-excitation", help="run directory")
    options = parser.parse_args()

    data = load_data(options.data)
    model = partial(se_resnet, arch=options.arch)
    train(replace(RECIPES["quick"], epochs=options.epochs), data, options.out, model=model)

    predictor = load(options.out, model=model)  # a checkpoint does not contain the model's code
    print(f"parameters: {sum(p.numel() for p in predictor.model.parameters()):,}")
    print(f"test accuracy: {predictor.evaluate(data.test)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
