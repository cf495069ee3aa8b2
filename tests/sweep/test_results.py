"""The results of a sweep."""

import dataclasses

from resnet56.recipe import RECIPES
from resnet56.sweep.results import train_command


def test_the_command_of_the_best_trial_trains_without_validation_images() -> None:
    winner = dataclasses.replace(
        RECIPES["fast"], val_size=5000, lr=0.25, sizes=(16, 16), nesterov=False, seed=3
    )
    command = train_command(("fast", RECIPES["fast"]), winner, "my data")
    assert command == (
        "resnet56 train fast --data 'my data' --lr 0.25 --no-nesterov --sizes 16 16 --seed 3"
    )
