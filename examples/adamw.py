"""Train with your own optimizer: AdamW with other betas, and without weight decay for biases and
batch norm.

Run: python examples/adamw.py --epochs 10
"""

import argparse
from dataclasses import replace

import torch

from resnet56 import RECIPES, load_data, train


def adamw(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Create the optimizer. The schedule of the recipe scales `lr` before each step."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--out", default="runs/adamw", help="run directory")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    options = parser.parse_args()

    recipe = replace(RECIPES["quick"], arch=options.arch, epochs=options.epochs, lr=options.lr)
    data = load_data(options.data)
    result = train(recipe, data, options.out, optimizer=adamw, resume=options.resume)
    print(f"test accuracy: {result['test']['accuracy']:.4f}")


if __name__ == "__main__":
    main()
