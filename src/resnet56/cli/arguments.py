"""Command-line arguments to a dataclass of options, by tyro; what is wrong with them in one line.

Numbers are stricter than Python's: ASCII digits only, no underscores, finite, and at most 18
digits, so that every integer fits 64 bits.
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

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from resnet56.errors import UsageError, shown

Options = TypeVar("Options")

COLUMNS = 80  # width of the help
SHOWN = 40  # characters of a wrong value that a message shows
NAME_INDENT = 6  # where tyro's rows of missing arguments have their names
NUMBERS = ConstructorRegistry()


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    prog: str,
    *,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Parse flags to `kind`, a dataclass; or print its help and raise SystemExit.

    Raises:
        UsageError: an unknown flag, a value of the wrong type, or something missing.
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    _hide_empty_defaults(kind)  # type: ignore[arg-type]  # a class is hashable
    printed, complaint = _Terminal(), _Terminal()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint), NUMBERS:
            options: Options
            options, unknown = tyro.cli(
                kind,
                args=arguments,
                prog=prog,
                description=description,
                config=(tyro.conf.DisallowNone,),
                return_unknown_args=True,
                **extra,
            )
    except SystemExit as stopped:
        if stopped.code:
            raise UsageError(f"{_complaint(complaint.getvalue())}; see {prog} --help") from None
        print(_laid_out(printed.getvalue()), end="", flush=True)
        raise
    if unknown:
        raise UsageError(f"{_unknown(unknown, kind)}; see {prog} --help")
    return options


def suggestion(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def integer(text: str) -> int:
    """The integer that `text` is in ASCII digits.

    Raises:
        ValueError: it is none, or has more than 18 digits.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"expected an integer, not {shown(text[:SHOWN])!r}")
    if len(text) > 18:
        raise ValueError(f"{text[:18]}... is too large")
    return int(text)


def number(text: str) -> float:
    """The finite number that `text` is, as in 0.1 or 1e-4.

    Raises:
        ValueError: it is none, or not finite.
    """
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise ValueError(f"expected a finite number, not {shown(text[:SHOWN])!r}")
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
    """Collects what tyro prints: in boxes, and in the colors that stdout would show."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.is_terminal = sys.stdout.isatty()

    def isatty(self) -> bool:
        return self.is_terminal


def _nested(kind: type) -> Iterator[tuple[type, dataclasses.Field[Any]]]:
    """Every field of the dataclass and of those in it, with the class that it belongs to."""
    for field in dataclasses.fields(kind):
        inner = field.type
        while get_origin(inner) is Annotated:
            inner = get_args(inner)[0]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _nested(inner)
        else:
            yield kind, field


@functools.cache
def _hide_empty_defaults(kind: type) -> None:
    """Annotate the fields so that the help has no "(default: None)", and no --no-json."""
    for owner, field in _nested(kind):
        settings: list[object] = [tyro.conf.arg(help_behavior_hint=_hint)]
        if field.type is bool and owner is kind:  # a recipe may set a flag, so that one unsets it
            settings = [tyro.conf.arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff]
        owner.__annotations__[field.name] = Annotated[field.type, *settings]


def _hint(label: str) -> str:
    return "" if label in ("None", "") else f"(default: {label})"


def _laid_out(text: str) -> str:
    """The help, with usage and description within the width, in characters that stdout has."""
    width = min(COLUMNS, shutil.get_terminal_size().columns)
    lines = []
    for line in text.splitlines():
        if len(line) > width and not re.search("[│╭╰]", line):
            indent = re.match(r"usage: |(?: +\S+ +)?", line)
            line = textwrap.fill(
                line, width, subsequent_indent=" " * len(indent[0] if indent else "")
            )
        lines.append(line)
    laid_out = "\n".join(lines) + "\n"
    try:
        laid_out.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return laid_out.translate(str.maketrans("╭╮╰╯│─", "++++|-"))
    return laid_out


def _unknown(tokens: Sequence[str], kind: type) -> str:
    """What is wrong with tokens that no option took."""
    flags = [token for token in tokens if token.startswith("-")]
    if not flags:
        return f"unexpected argument {shown(tokens[0][:SHOWN])!r}"
    known = ["--help"]
    for owner, field in _nested(kind):
        name = field.name.replace("_", "-")
        known += [f"--{name}"] if owner is kind else [f"--{name}", f"--no-{name}"]
    flag = shown(flags[0].partition("=")[0][:SHOWN])
    return f"unknown option {flag}{suggestion(flag, known)}"


def _complaint(printed: str) -> str:
    """What tyro complains about: a box of a title, the complaint, a rule, and help."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", printed).partition("\n")[2]
    said = re.split(r"\n\W*───", box)[0]
    rows = [re.sub("[│╭╮╰╯─]", " ", row).rstrip() for row in said.splitlines()]
    line = " ".join(" ".join(rows).split()).rstrip(".")
    if line.startswith("Missing from"):
        return _missing(rows[1:])
    for pattern, words in REWORDED.items():
        if match := re.match(pattern, line):
            return words.format(**match.groupdict())
    return line


# Tyro's complaints about a value, and how they are said here.
REWORDED = {
    r"Missing value for argument '(\S+/)?(?P<flag>\S+)'": "{flag}: a value is missing",
    r"invalid choice (?P<value>.*) for argument '(\S+/)?(?P<flag>\S+)'. Expected one of "
    r"\((?P<choices>.*?),?\)$": "{flag}: {value} is not one of {choices}",
    r"Error parsing (\S+/)?(?P<flag>\S+): (no type matching|Could not find valid parse).*?"
    r"(?P<values>\[[^\]]{0,40}\]?)": "{flag}: expected numbers, not {values}",
    r"Error parsing (\S+/)?(?P<flag>\S+): (?P<problem>.*)": "{flag}: {problem}",
}


def _missing(rows: Sequence[str]) -> str:
    """What is missing, from rows of its name and, further in, its help."""
    found: list[tuple[str, str]] = []
    for row in rows:
        text = row.strip()
        if len(row) - len(row.lstrip()) == NAME_INDENT:
            found.append((text.rpartition(", ")[2], ""))
        elif found:
            name, about = found[-1]
            found[-1] = (name, f"{about} {text}".removesuffix("(required)").strip(" ."))
    words = (f"{name} ({about[:1].lower()}{about[1:]})" for name, about in found)
    return "missing " + " and ".join(words)
