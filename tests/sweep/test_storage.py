"""The directory and the database of a sweep."""

import dataclasses
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnet56.data.dataset import Dataset
from resnet56.errors import RunError, UsageError
from resnet56.recipe import Recipe
from resnet56.sweep import storage
from resnet56.sweep.search import sweep
from resnet56.sweep.space import Choices

pytest.importorskip("optuna")


def test_a_storage_that_does_not_answer_causes_a_one_line_error(
    tiny: Dataset, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=pauses.append))
    with socket.socket() as unused:  # the port is bound, but no server listens
        unused.bind(("127.0.0.1", 0))
        url = f"postgresql://user:secret@127.0.0.1:{unused.getsockname()[1]}/name"
        with pytest.raises(RunError, match="does not respond") as caught:
            sweep(recipe, {"lr": Choices((0.1,))}, tiny, tmp_path / "s", storage=url)
    assert pauses == [1, 1]  # three attempts
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_with_other_settings_is_rejected(
    tiny: Dataset, recipe: Recipe, trained: list[Recipe], tmp_path: Path
) -> None:
    space, out = {"lr": Choices((0.1, 0.2))}, tmp_path / "s"
    sweep(recipe, space, tiny, out, grid=True)
    other = dataclasses.replace(recipe, momentum=0.5)
    smaller = dataclasses.replace(tiny, train=dataclasses.replace(
        tiny.train, images=tiny.train.images[:48], labels=tiny.train.labels[:48]))  # fmt: skip
    calls: dict[str, tuple[Recipe, Any, Dataset, dict[str, Any]]] = {
        "a different recipe (momentum 0.9 -> 0.5)": (other, space, tiny, {}),
        "different values to vary": (recipe, {"lr": Choices((0.1, 0.3))}, tiny, {}),
        "a different data set": (recipe, space, smaller, {}),
        "different seeds (0)": (recipe, space, tiny, {"seeds": (0, 1)}),
    }
    for message, (changed, values, data, options) in calls.items():
        for remove in (False, True):  # the directory, and then the database
            if remove:
                (out / "sweep.json").rename(tmp_path / "sweep.json")
            with pytest.raises(UsageError) as caught:
                sweep(changed, values, data, out, grid=True, **options)
            assert message in str(caught.value)
            if remove:
                (tmp_path / "sweep.json").rename(out / "sweep.json")
    assert len(trained) == 2


def test_a_directory_with_other_files_is_rejected(
    tiny: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="contains files such as thesis.tex"):
        sweep(recipe, {"lr": Choices((0.1,))}, tiny, tmp_path)
