"""Errors about the arguments of every command have one line and exit code 2."""

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest

from resnet56 import cli
from resnet56.cli.arguments import integer, number

# The arguments that precede the tested flag, by command.
COMMANDS = {
    "train": ["train", "quick"],
    "evaluate": ["evaluate", "none"],
    "predict": ["predict", "none.png"],
    "serve": ["serve"],
    "import": ["import", "none.pt", "--out", "none"],
    "export": ["export", "none"],
    "report": ["report", "none"],
    "compare": ["compare", "none", "other"],
    "sweep": ["sweep", "quick", "--val-size", "99", "--out", "none", "--vary", "lr=0.1,0.2"],
    "inspect": ["inspect", "resnet8"],
    "describe": ["describe"],
    "bench": ["bench"],
    "data": ["data", "fetch"],
}
INVALID_NUMBERS = ("99999999999999999999", "-1", "٣", "")


def options_of(command: str) -> type:
    """Return the dataclass of a command's options."""
    module = import_module(
        f"resnet56.cli.{command}_" if command == "import" else f"resnet56.cli.{command}"
    )
    [kind] = [
        value
        for name, value in vars(module).items()
        if name.endswith("Options") and dataclasses.is_dataclass(value)
    ]
    assert isinstance(kind, type)
    return kind


def numeric_flags(kind: type) -> Iterator[tuple[str, int]]:
    """Return the flags that take numbers, and how many numbers each takes."""
    for field in dataclasses.fields(kind):
        annotation = field.type
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from numeric_flags(annotation)
        elif re.search(r"\b(int|float)\b", str(annotation)):
            count = max(str(annotation).count("float"), 1) if "..." not in str(annotation) else 1
            yield "--" + field.name.replace("_", "-"), count


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, so that no command finds data or a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def test_every_command_is_tested() -> None:
    assert set(COMMANDS) == set(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_invalid_numbers_cause_one_line_errors(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The values are huge, negative, empty, or written with digits of other scripts."""
    for flag, count in numeric_flags(options_of(command)):
        for value in INVALID_NUMBERS:
            code = cli.main([*COMMANDS[command], flag, *[value] * count])
            shown = capsys.readouterr()
            assert code == 2, f"{flag} {value!r}: {shown.err}"
            assert shown.err.count("\n") == 1, shown.err
            assert shown.err.startswith("resnet56: ")
            assert flag[2:].replace("-", "_") in shown.err.replace("-", "_"), shown.err
            assert len(shown.err) < 200
    assert not list(Path().iterdir())


def test_there_are_numeric_flags() -> None:
    found = {name: dict(numeric_flags(options_of(name))) for name in COMMANDS}
    assert {"--epochs", "--lr", "--sizes", "--seed"} <= set(found["train"])
    assert found["import"] == {"--mean": 3, "--std": 3}
    assert found["predict"].keys() >= {"--top", "--max-pixels"}


@pytest.mark.parametrize("text", ["", " 1", "1 ", "1_0", "٣", "0x1", "1.0", "--1", "9" * 19])
def test_integers_must_be_ascii_digits(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected an integer|too large"):
        integer(text)


@pytest.mark.parametrize(
    "text", ["", " 1", "1_0.0", "٣", "nan", "inf", "1e999", "1e", ".", "0x1p3"]
)
def test_numbers_must_be_ascii_and_finite(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a finite number|too large"):
        number(text)


def test_common_notations_of_numbers_are_accepted() -> None:
    assert [integer(text) for text in ("0", "+7", "-3", "9" * 18)] == [0, 7, -3, 10**18 - 1]
    written = ("1", "-0.5", ".5", "5.", "1e-4", "+2.5E+3")
    assert [number(text) for text in written] == [1, -0.5, 0.5, 5, 1e-4, 2500]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_shows_no_empty_defaults(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*COMMANDS[command], "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "None" not in shown
    assert "default: )" not in shown
    assert not re.search(r"--no-(json|quiet|resume|csv|compiled)", shown)


def test_help_texts_fill_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A line ends where the next word would not fit, not where the line of the source ends."""
    assert cli.main(["train", "quick", "--help"]) == 0
    rows = [line[2:-2] for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    wrapped = [
        (first.rstrip(), second.split()[0])
        for first, second in pairwise(rows)
        if first[:23].strip() == "" == second[:23].strip()
    ]
    assert len(wrapped) > 20
    assert [first for first, word in wrapped if len(first) + 1 + len(word) <= len(rows[0])] == []


def test_help_on_a_terminal_without_unicode_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert cli.main(["describe", "--help"]) == 0
    text = ascii_only.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "| --classes INT" in text
    assert "\\u" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train", "qick"], "unknown recipe 'qick'; did you mean quick?"),
        (["train", "quick", "--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["train", "quick", "--no-fliip"], "unknown option --no-fliip; did you mean --no-flip?"),
        (["train", "quick", "--evaluate"], "--evaluate; did you mean --no-evaluate?"),
        (["train", "quick", "--no-val-siz"], "--no-val-siz; did you mean --val-size?"),
        (["evaluate", "a", "--robustnes=4"], "option --robustnes; did you mean --robustness?"),
        (["describe", "resnet20", "resnet32"], "unexpected argument 'resnet32'"),
        (["evaluate"], "missing RUN|NAME"),
        (["export"], "missing RUN|NAME"),
        (["import"], "--out RUN (run directory to create)"),
        (["predict"], "no images given"),
        (["report"], "no run given"),
        (["describe", "--classes"], "--classes: a value is missing"),
        (["train", "quick", "--data-dir"], "--data: a value is missing"),
        (["train", "quick", "--schedule", "x"], "--schedule: 'x' is not one of 'step', 'cosine'"),
        (["import", "a", "--out", "b", "--mean", "1", "2"], "--mean: expected numbers, not ['1'"),
        (["describe", "resnet56-cifar100"], "'resnet56-cifar100'; did you mean resnet56?"),
        (["describe", "ResNet56-B"], "unknown architecture 'ResNet56-B'; did you mean resnet56-b?"),
        (["describe", "resnet٥٦"], "unknown architecture"),  # noqa: RUF001
        (["describe", "--classes", "1000001"], "2 to 1,000,000 classes"),
        (["bench", "--batch", "32,٣"], "--batch: expected an integer"),
        (["bench", "--batch", "32,9999999"], "--batch requires batch sizes from 1 to"),
    ],
)
def test_usage_errors_state_what_is_expected(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1


def test_errors_about_very_long_values_are_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for field, value in {
        "epochs": "9" * 4000,
        "seed": "9" * 4000,
        "arch": f'["{"x" * 9999}"]',
    }.items():
        Path("recipe.json").write_text(f'{{"{field}": {value}}}')
        assert cli.main(["train", "recipe.json"]) == 2
        shown = capsys.readouterr().err
        assert field in shown
        assert len(shown) < 400


CLOSED = """
import os, sys
os.close({number})
os.execv(sys.executable, [sys.executable, "-m", "resnet56", *sys.argv[1:]])
"""


@pytest.mark.skipif(
    sys.platform == "win32", reason="closing descriptors works differently on Windows"
)
@pytest.mark.parametrize(("number", "code"), [(0, 2), (1, 2), (2, 2)])
def test_a_closed_standard_stream_causes_no_traceback(number: int, code: int) -> None:
    """For example, `resnet56 nonsense >&-`."""
    command = [sys.executable, "-c", CLOSED.format(number=number), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert ("unknown command" in done.stderr) == (number != 2)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("by_rich", [False, True])
@pytest.mark.parametrize(("command", "says"), [("describe", ""), ("train", "output pipe")])
def test_a_broken_pipe_exits_with_the_code_of_sigpipe(
    by_rich: bool,
    command: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rich turns a broken pipe into SystemExit. `train` also prints a message."""

    def run(_: list[str]) -> int:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            if by_rich:
                raise SystemExit(1)  # noqa: B904
            raise

    monkeypatch.setattr(f"resnet56.cli.{command}.run", run)
    assert cli.main([command]) == 141
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == bool(says)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is not an integer"),
        ({"WORLD_SIZE": "2", "RANK": "٣"}, "in the environment is not an integer"),
        ({"RANK": ""}, "RANK= in the environment is not an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict each other"),
        ({"WORLD_SIZE": "0"}, "contradict each other"),
        ({"WORLD_SIZE": "9" * 5000}, "is not an integer"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR expected"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "find each other",
        ),
    ],
)
def test_an_invalid_torchrun_environment_causes_a_one_line_error(
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = ["train", "quick", "--arch", "resnet8", "--device", "cpu", "--quiet", "--out", "run"]
    assert cli.main(command) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1
    assert len(shown) < 400
    assert not Path("run").exists()
