"""Recipes: the published numbers, files, and what is said about wrong values."""

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
from resnet56.recipe import ABOUT, RECIPES, Recipe, find, from_fields, read
from resnet56.runs.directory import RunDirectory


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What the recipes hold


def test_report_is_the_reports_training() -> None:
    report = RECIPES["report"]
    assert (report.arch, report.epochs, report.batch_size) == ("resnet56-bottleneck", 40, 32)
    assert (report.lr, report.momentum, report.nesterov) == (0.02, 0.9, False)
    assert (report.schedule, report.drop_epochs, report.drop_factor) == ("step", (10, 20, 30), 0.5)
    assert (report.warmup_epochs, report.label_smoothing, report.ema_decay) == (0, 0, ())


def test_he2015_is_section_4_2_of_the_paper() -> None:
    he = RECIPES["he2015"]
    assert (he.arch, he.batch_size, he.lr, he.momentum) == ("resnet56", 128, 0.1, 0.9)
    assert (he.weight_decay, he.decay_norm, he.nesterov) == (1e-4, True, False)
    assert (he.padding, he.flip, he.cutout, he.drop_factor) == (4, True, 0, 0.1)
    steps = 50_000 // 128
    for epochs, iterations in zip((*he.drop_epochs, he.epochs), (32e3, 48e3, 64e3), strict=True):
        assert abs(epochs * steps - iterations) < steps  # the nearest whole epoch


def test_every_recipe_is_described() -> None:
    assert set(ABOUT) == set(RECIPES) == {"report", "he2015", "fast", "best", "quick"}
    assert all(text and "\n" not in text for text in ABOUT.values())


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["report"].lr = 1.0  # type: ignore[misc]


# Files


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_json_file_gives_the_recipe_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(RECIPES[name].to_json()))
    assert read(file) == find(str(file)) == RECIPES[name]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_toml_file_gives_the_recipe_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    # JSON's strings, numbers, truth values and lists of numbers are TOML's too.
    fields = RECIPES[name].to_json().items()
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in fields))
    assert read(file) == find(str(file)) == RECIPES[name]


def test_a_runs_recipe_json_is_a_recipe(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    write_json(run.recipe_file, RECIPES["best"].to_json())
    assert find(str(tmp_path / "run" / "recipe.json")) == RECIPES["best"]


def test_a_file_may_name_some_fields_and_write_whole_numbers_for_floats(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text("lr = 1\ndrop_epochs = [1, 2.5]\nepochs = 3\n")
    recipe = read(file)
    assert recipe == dataclasses.replace(Recipe(), lr=1.0, drop_epochs=(1.0, 2.5), epochs=3)
    assert type(recipe.lr) is float
    assert type(recipe.epochs) is int


@pytest.mark.parametrize(
    ("name", "content", "said"),
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
def test_a_file_that_holds_no_recipe_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    message = refusal(find, str(file))
    assert said in message
    assert name in message


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    directory = tmp_path / "recipe.json"
    directory.mkdir()
    assert "cannot read" in refusal(find, str(directory))


def test_an_unknown_recipe_is_told_the_names() -> None:
    message = refusal(find, "fastest")
    assert "'fastest'" in message
    assert all(name in message for name in RECIPES)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("learning_rate", None), ("batchsize", "batch_size"), ("epoch", "epochs"), ("LR", None)],
)
def test_an_unknown_field_is_told_the_nearest_or_all(wrong: str, meant: str | None) -> None:
    message = refusal(from_fields, {wrong: 1}, "my.toml")
    assert message.startswith(f"my.toml: a recipe has no field {wrong!r}")
    if meant is not None:
        assert message.endswith(f"did you mean {meant!r}?")
    else:
        assert all(field.name in message for field in dataclasses.fields(Recipe))


# Values


def test_several_emas_need_validation_images() -> None:
    assert "--val-size" in refusal(lambda: Recipe(ema_decay=(0.9, 0.99)))
    assert Recipe(ema_decay=(0.9, 0.99), val_size=10).ema_decay == (0.9, 0.99)


BAD: list[tuple[str, Any]] = [
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
    ("plain_tail", 41),
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


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda part: str(part)[:20])
def test_a_bad_value_is_one_line_that_names_its_field(field: str, value: Any) -> None:
    message = refusal(lambda: Recipe(**{field: value}))
    assert message.startswith(f"{field} must be ")
    assert len(message) < 200
    assert refusal(from_fields, {field: value}, "my.json") == f"my.json: {message}"


def test_sizes_leave_the_last_epoch_whole_images() -> None:
    message = refusal(lambda: dataclasses.replace(RECIPES["fast"], epochs=5))
    assert "sizes must be fewer than the 5 epochs" in message
    assert Recipe(epochs=2, sizes=(8, 32)).sizes == (8, 32)


def test_alternating_flips_without_flips_are_refused() -> None:
    assert refusal(lambda: Recipe(alternate_flip=True, flip=False)) == "alternate_flip needs flip"


def test_nesterov_without_momentum_is_refused() -> None:
    message = refusal(lambda: Recipe(nesterov=True, momentum=0))
    assert "nesterov" in message
    assert "momentum" in message


def test_values_at_the_edge_of_their_range_are_taken() -> None:
    edges: dict[str, Any] = {
        "epochs": 1, "batch_size": 1, "momentum": 0.0, "weight_decay": 0.0, "drop_epochs": (),
        "drop_factor": 1.0, "padding": 31, "cutout": 32, "sizes": (32,), "seed": 2**32 - 1,
    }  # fmt: skip
    recipe = Recipe(**edges)
    assert {name: getattr(recipe, name) for name in edges} == edges


@pytest.mark.parametrize("module", ["resnet56", "resnet56.recipe"])
def test_importing_recipes_costs_nothing(module: str) -> None:
    heavy = ("torch", "numpy", "sklearn", "PIL", "rich")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_exports_the_recipes() -> None:
    import resnet56

    assert resnet56.RECIPES is recipes.RECIPES
    assert resnet56.Recipe is recipes.Recipe
