"""Fixtures that several sweep tests share."""

import dataclasses
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from resnet56.data.dataset import Dataset
from resnet56.recipe import Recipe
from resnet56.sweep import worker


@pytest.fixture(autouse=True)
def unsynchronized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite return before the disk has written the data, which can take seconds."""
    connect = sqlite3.connect

    def connect_without_waiting(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(sqlite3.dbapi2, "connect", connect_without_waiting)


@pytest.fixture
def recipe(small: Recipe) -> Recipe:
    return dataclasses.replace(small, val_size=15)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Replace training with a function of the recipe, and return the list of trained recipes."""
    recipes: list[Recipe] = []

    def train(recipe: Recipe, dataset: Dataset, out: Path, **options: Any) -> None:
        recipes.append(recipe)
        for epoch in range(1, recipe.epochs + 1):
            # The best learning rate is 0.2. Momentum matters less.
            accuracy = 0.9 - abs(recipe.lr - 0.2) - 0.01 * abs(recipe.momentum - 0.5)
            options["callbacks"][0](
                {"epoch": epoch, "val_accuracy": accuracy * epoch / recipe.epochs}
            )

    monkeypatch.setattr(worker, "train", train)
    return recipes
