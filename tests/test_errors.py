"""Error messages in the terms of Python and of the command line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import resnet56
from resnet56 import cli
from resnet56.data.dataset import Dataset
from resnet56.errors import RunError, UsageError, either, option, spell_flags
from resnet56.recipe import Recipe

PACKAGE = Path(resnet56.__file__).parent


@pytest.mark.parametrize(
    ("name", "value", "python", "flag"),
    [
        ("val_size", None, "val_size", "--val-size"),
        ("resume", True, "resume=True", "--resume"),
        ("alternate_flip", False, "alternate_flip=False", "--no-alternate-flip"),
        ("device", "cpu", 'device="cpu"', "--device cpu"),
        ("threads", 2, "threads=2", "--threads 2"),
    ],
)
def test_an_option_is_an_argument_in_python_and_a_flag_in_the_command(
    name: str, value: object, python: str, flag: str
) -> None:
    assert option(name, value) == python
    with spell_flags():
        assert option(name, value) == flag
        assert either("python", "command") == "command"
    assert option(name, value) == python
    assert either("python", "command") == "python"


def test_a_used_run_directory_is_reported_in_the_terms_of_the_caller(
    tiny: Dataset, small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    resnet56.train(small, tiny, out, device="cpu")
    with pytest.raises(RunError, match="continue it with resume=True or .* directory for out$"):
        resnet56.train(small, tiny, out)
    assert cli.main(["train", "quick", "--data", "digits", "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert "continue it with --resume or choose another directory for --out" in message
    with pytest.raises(UsageError, match=f"^threads must be from 1 to .*, not {10**6}"):
        resnet56.load(threads=10**6)  # after the command, messages use the terms of Python again


def messages(tree: ast.AST) -> Iterator[str]:
    """Yield all strings except docstrings, with {} for the expressions in f-strings.

    The text of `either` for the command line is omitted.
    """
    omitted: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            omitted.add(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "either":
            omitted |= set(ast.walk(node.args[1]))
        if node in omitted:
            continue
        if isinstance(node, ast.JoinedStr):
            omitted |= {part for part in node.values if isinstance(part, ast.Constant)}
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_only_the_command_line_names_flags() -> None:
    """A message may contain a complete command, such as `resnet56 import FILE --out RUN`."""
    flag = re.compile(r"(^| | \()--[a-z]")
    named = {
        f"{file.relative_to(PACKAGE)}: {text}"
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).parts[0] not in ("cli", "benchmark")
        for text in messages(ast.parse(file.read_text(encoding="utf-8")))
        if flag.search(re.sub(r"resnet56 \w+ .*", "", text))
        and not text.startswith("--porcelain")
        and text not in ("--data", "--no-{}")  # parts of the command that trains the best trial
    }
    assert named == set()
