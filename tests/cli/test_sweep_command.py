"""The command `resnet56 sweep`: its values and its errors."""

from pathlib import Path

import pytest

from resnet56 import cli
from resnet56.cli.sweep import parse_space
from resnet56.sweep.space import Choices, Range

pytest.importorskip("optuna")


def test_values_are_parsed_by_the_type_of_their_field() -> None:
    texts = (
        "lr=0.05..0.4:log", "batch-size=8..64", "epochs=2,3", "nesterov=true,false",
        "schedule=step,one-cycle", "drop_epochs=10 20,15,",
    )  # fmt: skip
    assert parse_space(texts) == {
        "lr": Range(0.05, 0.4, log=True),
        "batch_size": Range(8, 64),
        "epochs": Choices((2, 3)),
        "nesterov": Choices((True, False)),
        "schedule": Choices(("step", "one-cycle")),
        "drop_epochs": Choices(((10.0, 20.0), (15.0,), ())),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "expected FIELD=LOW..HIGH"),
        ("weight-decy=1,2", "did you mean weight_decay?"),
        ("lr=0.1..x", "expected a finite number, not 'x'"),
        ("lr=0.1..0.2:exp", "expected :log"),
        ("lr=0.4..0.1", "lr: the range 0.4..0.1 is empty"),
        ("lr=0..0.1:log", "must begin above 0"),
        ("lr=-1,0.1", "lr must be above 0"),
        ("epochs=1.5,2", "expected an integer"),
        ("nesterov=yes", "expected true or false"),
        ("schedule=linear", "is not one of step, cosine, one-cycle"),
        ("schedule=step..cosine", "is not one of"),
        ("lr=0.1,0.1", "listed twice"),
        ("arch=resnet57,resnet56", "depth 57"),
        ("seed=1,2", "seed cannot vary in a sweep; use --seeds"),
    ],
)
def test_an_invalid_value_causes_a_one_line_error(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "quick", "--val-size", "200", "--out", str(tmp_path / "s"), "--vary", text]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", "lr=0.1..0.2"], "set --val-size 5000"),
        (["--val-size", "200"], "use --vary"),
        (
            ["--val-size", "200", "--vary", "lr=0.1..0.2", "--grid"],
            "requires a list of values for lr",
        ),
        (["--val-size", "200", "--vary", "lr=0.1,0.2", "--grid", "--trials", "3"], "omit --trials"),
        (
            ["--val-size", "200", "--vary", "nesterov=true,false", "--vary", "momentum=0,0.9"],
            "the combination nesterov true, momentum 0 is invalid",
        ),
        (["--val-size", "200", "--vary", "lr=0.1,0.2", "--seeds", "1", "1"], "must be distinct"),
        (["--val-size", "200", "--vary", "lr=0.1,0.2", "--trials", "0"], "at least 1"),
        (
            ["--val-size", "200", "--vary", "lr=0.1,0.2", "--storage", "nonsense"],
            "must be a URL such as postgresql://",
        ),
    ],
)
def test_an_invalid_option_causes_a_one_line_error(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", "quick", "--out", str(tmp_path / "s"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
