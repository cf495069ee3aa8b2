"""Recipes: published values, files and error messages."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resnet56 import recipe as recipes
from resnet56.errors import UsageError
from resnet56.files import write_json
from resnet56.recipe import DESCRIPTIONS, RECIPES, Recipe, find, from_fields, read
from resnet56.runs.directory import RunDirectory


def error_message(call: Any, *arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Published values


def test_the_recipe_report_matches_the_original_report() -> None:
    report = RECIPES["report"]
    assert (report.arch, report.epochs, report.batch_size) == ("resnet56-bottleneck", 40, 32)
    assert (report.lr, report.momentum, report.nesterov) == (0.02, 0.9, False)
    assert (report.schedule, report.drop_epochs, report.drop_factor) == ("step", (10, 20, 30), 0.5)
    assert (report.warmup_epochs, report.label_smoothing, report.ema_decay) == (0, 0, ())


def test_the_recipe_he2015_matches_section_4_2_of_the_paper() -> None:
    he2015 = RECIPES["he2015"]
    assert (he2015.arch, he2015.batch_size, he2015.lr, he2015.momentum) == (
        "resnet56",
        128,
        0.1,
        0.9,
    )
    assert (he2015.weight_decay, he2015.decay_norm, he2015.nesterov) == (1e-4, True, False)
    assert (he2015.padding, he2015.flip, he2015.cutout, he2015.drop_factor) == (4, True, 0, 0.1)
    steps = 50_000 // 128
    for epochs, iterations in zip(
        (*he2015.drop_epochs, he2015.epochs), (32e3, 48e3, 64e3), strict=True
    ):
        assert abs(epochs * steps - iterations) < steps  # the recipe rounds to whole epochs


def test_every_recipe_has_a_description() -> None:
    assert set(DESCRIPTIONS) == set(RECIPES) == {"report", "he2015", "fast", "best", "quick"}
    assert all(text and "\n" not in text for text in DESCRIPTIONS.values())


def test_recipes_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["report"].lr = 1.0  # type: ignore[misc]


# Files


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_round_trip_through_json(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(RECIPES[name].to_json()))
    assert read(file) == find(str(file)) == RECIPES[name]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_round_trip_through_toml(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    # Strings, numbers, booleans and lists of numbers have the same syntax in JSON and TOML.
    fields = RECIPES[name].to_json().items()
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in fields))
    assert read(file) == find(str(file)) == RECIPES[name]


def test_recipe_json_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    write_json(run.recipe_file, RECIPES["best"].to_json())
    assert find(str(tmp_path / "run" / "recipe.json")) == RECIPES["best"]


def test_a_file_can_omit_fields_and_write_floats_as_integers(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text("lr = 1\ndrop_epochs = [1, 2.5]\nepochs = 3\n")
    recipe = read(file)
    assert recipe == dataclasses.replace(Recipe(), lr=1.0, drop_epochs=(1.0, 2.5), epochs=3)
    assert type(recipe.lr) is float
    assert type(recipe.epochs) is int


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.json", None, "cannot read"),
        ("absent.toml", None, "cannot read"),
        ("empty.json", b"", "not valid JSON"),
        ("half.json", b'{"lr": 0.1,\n "epochs"', "not valid JSON"),
        ("half.toml", b"lr = \n", "not valid TOML"),
        ("latin.json", b'{"arch": "\xe9"}', "not valid JSON"),
        ("latin.toml", b'arch = "\xe9"', "not valid TOML"),
        ("deep.json", b"[" * 200_000, "not valid JSON"),
        ("list.json", b'[{"lr": 0.1}]', "is not a recipe"),
        ("number.json", b"3", "is not a recipe"),
        ("value.json", b'{"lr": "fast"}', "lr must be"),
        ("nan.json", b'{"lr": NaN}', "lr must be finite"),
        ("date.toml", b"lr = 2015-12-10", "lr must be"),
    ],
)
def test_the_error_about_an_invalid_file_contains_its_name(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    message = error_message(find, str(file))
    assert expected in message
    assert name in message


def test_a_directory_is_not_a_recipe(tmp_path: Path) -> None:
    directory = tmp_path / "recipe.json"
    directory.mkdir()
    assert "cannot read" in error_message(find, str(directory))


def test_the_error_about_an_unknown_recipe_lists_all_recipes() -> None:
    message = error_message(find, "fastest")
    assert "'fastest'" in message
    assert all(name in message for name in RECIPES)


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [("learning_rate", None), ("batchsize", "batch_size"), ("epoch", "epochs"), ("LR", None)],
)
def test_the_error_about_an_unknown_field_suggests_fields(
    wrong: str, suggestion: str | None
) -> None:
    message = error_message(from_fields, {wrong: 1}, "my.toml")
    assert message.startswith(f"my.toml: a recipe has no field {wrong!r}")
    if suggestion is not None:
        assert message.endswith(f"did you mean {suggestion!r}?")
    else:
        assert all(field.name in message for field in dataclasses.fields(Recipe))


# Values


def test_several_emas_require_validation_images() -> None:
    assert "set val_size" in error_message(lambda: Recipe(ema_decay=(0.9, 0.99)))
    assert Recipe(ema_decay=(0.9, 0.99), val_size=10).ema_decay == (0.9, 0.99)


INVALID_VALUES: list[tuple[str, Any]] = [
    ("arch", 56),
    ("arch", None),
    ("epochs", 0),
    ("epochs", -1),
    ("epochs", 2.0),
    ("epochs", True),
    ("epochs", "3"),
    ("batch_size", 0),
    ("batch_size", 32.5),
    ("lr", 0),
    ("lr", -1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", float("-inf")),
    ("lr", "0.1"),
    ("lr", True),
    ("lr", None),
    ("lr", [0.1]),
    ("lr", 10**400),
    ("momentum", 1),
    ("momentum", -0.1),
    ("nesterov", 1),
    ("nesterov", "yes"),
    ("weight_decay", -1e-4),
    ("decay_norm", 0),
    ("schedule", "foo"),
    ("schedule", None),
    ("schedule", ["step"]),
    ("drop_epochs", (20, 10)),
    ("drop_epochs", (10, 10)),
    ("drop_epochs", (0, 10)),
    ("drop_epochs", (10, float("nan"))),
    ("drop_epochs", (10, float("inf"))),
    ("drop_epochs", (10, True)),
    ("drop_epochs", 10),
    ("drop_epochs", "10"),
    ("drop_epochs", {"10": 20}),
    ("sizes", (16, 10)),
    ("sizes", (36,)),
    ("sizes", (4,)),
    ("sizes", (16.0,)),
    ("sizes", 16),
    ("drop_factor", 0),
    ("drop_factor", 1.5),
    ("warmup_epochs", -1),
    ("label_smoothing", 1),
    ("label_smoothing", -0.1),
    ("padding", -1),
    ("padding", 32),
    ("flip", "left"),
    ("alternate_flip", 1),
    ("cutout", -1),
    ("cutout", 33),
    ("mix", "cutout"),
    ("mix", None),
    ("mix_alpha", 0),
    ("mix_probability", 0),
    ("mix_probability", 1.1),
    ("plain_tail", -1),
    ("plain_tail", 1_000_001),
    ("optimizer", "adam"),
    ("weights", 1),
    ("freeze", "body"),
    ("freeze", ("fc", "fc")),
    ("teacher", "resnet56"),
    ("teacher", (1,)),
    ("teacher", ("a", "a")),
    ("teacher_weight", 0),
    ("teacher_weight", 1.5),
    ("teacher_temperature", 0),
    ("ema_decay", 0.999),
    ("ema_decay", (1,)),
    ("ema_decay", (0,)),
    ("ema_decay", (0.999, 0.99)),
    ("ema_decay", (0.9, 0.9)),
    ("precision", "fp8"),
    ("val_size", -1),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 1.0),
]


@pytest.mark.parametrize(("field", "value"), INVALID_VALUES, ids=lambda part: str(part)[:20])
def test_the_error_about_an_invalid_value_contains_its_field(field: str, value: Any) -> None:
    message = error_message(lambda: Recipe(**{field: value}))
    assert message.startswith(f"{field} must be ")
    assert len(message) < 200
    assert error_message(from_fields, {field: value}, "my.json") == f"my.json: {message}"


def test_the_last_epoch_uses_the_full_size() -> None:
    message = error_message(lambda: dataclasses.replace(RECIPES["fast"], epochs=5))
    assert "sizes must be fewer than the 5 epochs" in message
    assert Recipe(epochs=2, sizes=(8, 32)).sizes == (8, 32)


def test_alternating_flips_require_flips() -> None:
    assert (
        error_message(lambda: Recipe(alternate_flip=True, flip=False))
        == "alternate_flip requires flip"
    )


def test_nesterov_requires_momentum() -> None:
    message = error_message(lambda: Recipe(nesterov=True, momentum=0))
    assert "nesterov" in message
    assert "momentum" in message


def test_values_at_the_limits_of_their_range_are_valid() -> None:
    edges: dict[str, Any] = {
        "epochs": 1, "batch_size": 1, "momentum": 0.0, "weight_decay": 0.0, "drop_epochs": (),
        "drop_factor": 1.0, "padding": 31, "cutout": 32, "sizes": (32,), "seed": 2**32 - 1,
    }  # fmt: skip
    recipe = Recipe(**edges)
    assert {name: getattr(recipe, name) for name in edges} == edges


@pytest.mark.parametrize("module", ["resnet56", "resnet56.recipe"])
def test_importing_recipes_imports_no_heavy_package(module: str) -> None:
    heavy = ("torch", "numpy", "sklearn", "PIL", "rich")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip() == "[]"


def test_the_package_exports_the_recipes() -> None:
    import resnet56

    assert resnet56.RECIPES is recipes.RECIPES
    assert resnet56.Recipe is recipes.Recipe
