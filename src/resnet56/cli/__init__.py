"""The command `resnet56`: one module a subcommand, each imported when it runs."""

import contextlib
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from keyword import iskeyword
from typing import TextIO

from resnet56 import __version__
from resnet56.errors import Error, UsageError, printable

PROBLEM = 2  # exit code of a call that is wrong
INTERRUPTED = 130  # of Ctrl-C, as shells have it
BROKEN_PIPE = 141  # of output whose reader has gone, as shells have it: 128 and SIGPIPE

NO_MEMORY = ("out of memory", "can't allocate memory")  # what PyTorch's RuntimeErrors say then
# What makes a command need less.
SMALLER = {"train": "choose a smaller --batch-size", "bench": "choose a smaller --batch"}

COMMANDS = {
    "train": "train a network, keep the run in a directory, and test it",
    "evaluate": "measure a run's weights, on this machine",
    "predict": "say what is in pictures, and where in them it is seen",
    "serve": "answer over HTTP, with a page to try it on",
    "import": "make a run of a checkpoint that another program wrote",
    "export": "write a network for other programs: ONNX, or a hub's folder",
    "report": "write a page about a run, or one that compares several",
    "inspect": "measure gradients and responses through a network's layers",
    "describe": "print a network's layers, parameters and operations",
    "bench": "measure training and inference against the usual loop",
    "data": "fetch CIFAR-10 or CIFAR-100",
}

HELP = """\
usage: resnet56 COMMAND [options]

ResNet-56 on CIFAR-10: train it, test it, explain it.

{commands}

  resnet56 COMMAND --help    its options
  resnet56 --version         the version

Exit codes: 0 success; 1 failure; 2 wrong usage; 130 stopped by Ctrl-C;
141 the reader of the output has gone, as in `| head`.

Without any download: resnet56 train quick --data digits
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; every error a user can cause ends as one line and an exit code."""
    _open_standard_streams()
    # Where there is no /dev/shm to write to, joblib warns that it cannot do what is not used here.
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [_expand(argument) for argument in given]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may be of no encoding
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except Error as error:
        return _fail(str(error), error.exit_code)
    except SystemExit as stopped:  # tyro has printed the help, or rich met a broken pipe
        if isinstance(stopped.__context__, BrokenPipeError):
            return _reader_gone(arguments)
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except BrokenPipeError:
        return _reader_gone(arguments)
    except OSError as error:  # a path that the system refuses: no permission, too long
        where = f"{error.filename}: " if error.filename else ""
        line = f"{where}{error.strerror or error}"
        if "usable temporary directory" in line:
            line += "; set TMPDIR to a folder that can be written to"
        return _fail(line, 1)
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, MemoryError) and not any(words in said for words in NO_MEMORY):
            raise
        hints = [SMALLER[name] for name in arguments[:1] if name in SMALLER]
        return _fail("; ".join(("out of memory", *hints)), 1)


def _expand(argument: str) -> str:
    """`~/x` and `--flag=~/x` with the home directory, where no shell has done so: in Makefiles."""
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={os.path.expanduser(value)}"  # noqa: PTH111 - pathlib's drops "./" and raises
    return os.path.expanduser(argument)  # noqa: PTH111


def _open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (`>&-`) an empty one.

    Otherwise the next file that is opened takes its place, and C libraries write messages into it.
    """
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for number, (name, mode) in enumerate(modes.items()):
        if getattr(sys, name) is None:
            empty = os.open(os.devnull, os.O_RDWR)
            if empty != number:
                os.dup2(empty, number)
                os.close(empty)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _reader_gone(arguments: Sequence[str]) -> int:
    """Nobody reads stdout any more, as in `| head -1`: end as if by SIGPIPE."""
    _discard(sys.stdout)
    if arguments[:1] != ["train"]:
        return BROKEN_PIPE  # what is missing, its reader did not want
    return _fail(
        "training stopped, because the reader of its output has gone; use --quiet, or write the "
        "output to a file (if there is a checkpoint, --resume continues from it)",
        BROKEN_PIPE,
    )


def _discard(stream: TextIO) -> None:
    """Send what is still to be written nowhere: Python would complain at exit."""
    with contextlib.suppress(OSError, ValueError):  # without a file descriptor, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}  {about}" for name, about in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if arguments else PROBLEM
    if first in ("-V", "--version"):
        print(f"resnet56 {__version__}")
        return 0
    if first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown command {first!r}; {hint}the commands: {', '.join(COMMANDS)}")
    return _command(first)(arguments[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    """The `run` of the command's own module, which is imported only now."""
    module = f"{name}_" if iskeyword(name) else name
    run: Callable[[list[str]], int] = import_module(f"{__name__}.{module}").run
    return run


def _fail(line: str, code: int) -> int:
    """Say what is wrong on stderr, if anybody reads it."""
    try:
        print(printable(f"resnet56: {line}"), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)
    return code
