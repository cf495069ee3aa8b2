"""Distill a network into a smaller one (Hinton et al. 2015, arXiv:1503.02531).

The student learns from the probabilities of the teacher on the same augmented images, and from the
labels. For comparison, the student is also trained on the labels only.

Run: python examples/distillation.py --arch resnet8 --teacher resnet56 --epochs 10
"""

import argparse
from dataclasses import replace

from resnet56 import RECIPES, load_data, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet8", help="architecture of the student")
    parser.add_argument("--teacher", default="resnet20", help="architecture of the teacher")
    parser.add_argument("--data", default="digits", help="name or directory of a data set")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--weight", type=float, default=0.9, help="weight of the teacher loss")
    options = parser.parse_args()

    data = load_data(options.data)
    labels_only = replace(RECIPES["quick"], arch=options.arch, epochs=options.epochs)
    distilled = replace(
        labels_only,
        teacher=("runs/teacher",),
        teacher_weight=options.weight,
        teacher_temperature=options.temperature,
    )
    recipes = {
        "teacher": replace(labels_only, arch=options.teacher),
        "student-labels": labels_only,
        "student-distilled": distilled,
    }
    for name, recipe in recipes.items():
        result = train(recipe, data, f"runs/{name}")
        print(f"{name}: test accuracy: {result['test']['accuracy']:.4f}")


if __name__ == "__main__":
    main()
