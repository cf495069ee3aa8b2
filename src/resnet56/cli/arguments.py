"""Parse command-line arguments into a dataclass with tyro.

Each error message is one line. The syntax of numbers is stricter than in Python. Numbers must be
finite and must not contain underscores or non-ASCII digits. Integers have at most 18 digits, so
they fit in 64 bits.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from resnet56.errors import UsageError, escape

Options = TypeVar("Options")

COLUMNS = 80  # maximum width of the help
MAX_VALUE_LENGTH = 40  # maximum length of a value in an error message
NAME_INDENT = 6  # column of the names in tyro's list of missing arguments
NUMBERS = ConstructorRegistry()


def parse(
    options_type: type[Options],
    arguments: Sequence[str],
    prog: str,
    *,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Parse flags into an instance of the dataclass `options_type`.

    Raises:
        UsageError: a flag is unknown or missing, or a value is invalid.
        SystemExit: the help was requested and printed.
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    _annotate(options_type)  # type: ignore[arg-type]  # Classes are hashable.
    output, errors = _Terminal(), _Terminal()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), NUMBERS:
            options: Options
            options, unknown = tyro.cli(
                options_type,
                args=arguments,
                prog=prog,
                description=description,
                config=(tyro.conf.DisallowNone,),
                return_unknown_args=True,
                **extra,
            )
    except SystemExit as stopped:
        if stopped.code:
            raise UsageError(f"{_error_line(errors.getvalue())}; see {prog} --help") from None
        print(_format_help(output.getvalue()), end="", flush=True)
        raise
    if unknown:
        raise UsageError(f"{_unknown(unknown, options_type)}; see {prog} --help")
    return options


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return "; did you mean ...?", or an empty string if no known name is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def integer(text: str) -> int:
    """Parse an integer in ASCII digits.

    Raises:
        ValueError: `text` is not an integer or has more than 18 digits.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"expected an integer, not {escape(text[:MAX_VALUE_LENGTH])!r}")
    if len(text) > 18:
        raise ValueError(f"{text[:18]}... is too large")
    return int(text)


def number(text: str) -> float:
    """Parse a finite number such as 0.1 or 1e-4.

    Raises:
        ValueError: `text` is not a number or is not finite.
    """
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise ValueError(f"expected a finite number, not {escape(text[:MAX_VALUE_LENGTH])!r}")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:18]} is too large")
    return value


@NUMBERS.primitive_rule
def _integer(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda texts: integer(texts[0]),
        is_instance=lambda value: type(value) is int,
        str_from_instance=lambda value: [str(value)],
    )


@NUMBERS.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda texts: number(texts[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


class _Terminal(io.StringIO):
    """Collects the output of tyro, with colors if stdout is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.is_terminal = sys.stdout.isatty()

    def isatty(self) -> bool:
        return self.is_terminal


def _nested(options_type: type) -> Iterator[tuple[type, dataclasses.Field[Any]]]:
    """Yield pairs (class, field) for the fields of a dataclass and of its nested dataclasses."""
    for field in dataclasses.fields(options_type):
        inner = _base_type(field)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _nested(inner)
        else:
            yield options_type, field


def _base_type(field: dataclasses.Field[Any]) -> Any:
    """Return the type of a field without its annotations."""
    inner = field.type
    while get_origin(inner) is Annotated:
        inner = get_args(inner)[0]
    return inner


@functools.cache
def _annotate(options_type: type) -> None:
    """Annotate the fields to hide "(default: None)" and --no-json in the help.

    Also join the lines of their docstrings, because tyro keeps line breaks before indented lines.
    """
    for owner, field in _nested(options_type):
        text = _help(owner).get(field.name)
        settings: list[object] = [tyro.conf.arg(help=text, help_behavior_hint=_hint)]
        # A recipe flag keeps its --no- form, which overrides a recipe that sets the field to true.
        if field.type is bool and owner is options_type:
            settings = [
                tyro.conf.arg(help=text, help_behavior_hint=""),
                tyro.conf.FlagCreatePairsOff,
            ]
        owner.__annotations__[field.name] = Annotated[field.type, *settings]


@functools.cache
def _help(options_type: type) -> dict[str, str]:
    """Return the docstrings of the fields of a dataclass, each on one line."""
    parameters = docstring_parser.parse_from_object(options_type).params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in parameters}


def _hint(label: str) -> str:
    return "" if label in ("None", "", "''") else f"(default: {label})"


def _format_help(text: str) -> str:
    """Wrap the usage and the description. Use ASCII if stdout cannot encode box characters."""
    width = min(COLUMNS, shutil.get_terminal_size().columns)
    lines = []
    for line in text.splitlines():
        if len(line) > width and not re.search("[│╭╰]", line):
            indent = re.match(r"usage: |(?: +\S+ +)?", line)
            line = textwrap.fill(
                line, width, subsequent_indent=" " * len(indent[0] if indent else "")
            )
        lines.append(line)
    wrapped = "\n".join(lines) + "\n"
    try:
        wrapped.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return wrapped.translate(str.maketrans("╭╮╰╯│─", "++++|-"))
    return wrapped


def _unknown(tokens: Sequence[str], options_type: type) -> str:
    """Return an error message about arguments that tyro did not recognize."""
    flags = [token for token in tokens if token.startswith("-")]
    if not flags:
        return f"unexpected argument {escape(tokens[0][:MAX_VALUE_LENGTH])!r}"
    known = ["--help"]
    for owner, field in _nested(options_type):
        name = field.name.replace("_", "-")
        on, off = f"--{name}", f"--no-{name}"
        if _base_type(field) is not bool:
            known.append(on)
        elif owner is not options_type:  # a field of a recipe
            known += [on, off]
        else:  # only the flag that changes the default
            known.append(off if field.default is True else on)
    flag = escape(flags[0].partition("=")[0][:MAX_VALUE_LENGTH])
    return f"unknown option {flag}{suggestion(flag, known)}"


def _error_line(output: str) -> str:
    """Extract the error from tyro's box: a title, the error, a horizontal rule and the help."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", output).partition("\n")[2]
    error = re.split(r"\n\W*───", box)[0]
    rows = [re.sub("[│╭╮╰╯─]", " ", row).rstrip() for row in error.splitlines()]
    line = " ".join(" ".join(rows).split()).rstrip(".")
    if line.startswith("Missing from"):
        return _missing(rows[1:])
    for pattern, message in ERROR_MESSAGES.items():
        if match := re.match(pattern, line):
            return message.format(**match.groupdict())
    return line


# Patterns of tyro's errors and their replacement messages.
ERROR_MESSAGES = {
    r"Missing value for argument '(\S+/)?(?P<flag>\S+)'": "{flag}: a value is missing",
    r"invalid choice (?P<value>.*) for argument '(\S+/)?(?P<flag>\S+)'. Expected one of "
    r"\((?P<choices>.*?),?\)$": "{flag}: {value} is not one of {choices}",
    r"Error parsing (\S+/)?(?P<flag>\S+): (no type matching|Could not find valid parse).*?"
    r"(?P<values>\[[^\]]{0,40}\]?)": "{flag}: expected numbers, not {values}",
    r"Error parsing (\S+/)?(?P<flag>\S+): (?P<problem>.*)": "{flag}: {problem}",
}


def _missing(rows: Sequence[str]) -> str:
    """Convert tyro's list of missing arguments and their help texts to an error message."""
    missing: list[tuple[str, str]] = []
    for row in rows:
        text = row.strip()
        if len(row) - len(row.lstrip()) == NAME_INDENT:
            missing.append((text.rpartition(", ")[2], ""))
        elif missing:
            name, about = missing[-1]
            missing[-1] = (name, f"{about} {text}".removesuffix("(required)").strip(" ."))
    words = (f"{name} ({about[:1].lower()}{about[1:]})" for name, about in missing)
    return "missing " + " and ".join(words)
