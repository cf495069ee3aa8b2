"""The `resnet56` command. The module of a subcommand is imported only when the subcommand runs."""

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
from resnet56.errors import Error, UsageError, escape_line, spell_flags

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as in shells
BROKEN_PIPE = 141  # 128 + SIGPIPE, as in shells

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # parts of PyTorch's error messages
MEMORY_HINTS = {
    "train": "choose a smaller --batch-size",
    "sweep": "choose a smaller --batch-size",
    "bench": "choose a smaller --batch",
}

COMMANDS = {
    "train": "train a model and evaluate it",
    "sweep": "search for the settings with the highest validation accuracy",
    "evaluate": "evaluate a model on this machine",
    "predict": "classify images and explain the predictions",
    "serve": "serve predictions over HTTP, with a demo page",
    "import": "convert a checkpoint from another project to a run",
    "export": "export a model to ONNX or to a model hub directory",
    "report": "write a report on one network, or a comparison of several networks",
    "compare": "test whether the accuracies of networks differ significantly",
    "inspect": "measure the gradients and responses of each layer",
    "describe": "print the layers, parameters and multiply-accumulates of a model",
    "bench": "benchmark training and inference against a standard loop",
    "data": "download CIFAR-10 or CIFAR-100",
}

HELP = """\
usage: resnet56 COMMAND [options]

Train, evaluate and explain ResNet-56 on CIFAR-10.

{commands}

  resnet56 COMMAND --help    show the options of a command
  resnet56 --version         show the version

Exit codes: 0 success; 1 failure; 2 usage error; 130 interrupted by Ctrl-C;
141 output pipe closed, as in `| head`.

To train without a download: resnet56 train quick --data digits
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Each user error is printed on one line."""
    _open_standard_streams()
    # Without a writable /dev/shm, joblib warns about multiprocessing, which is unused.
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [_expand(argument) for argument in given]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape names that stdout cannot encode
    try:
        with spell_flags():
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except Error as error:
        return _fail(str(error), error.exit_code)
    except SystemExit as stopped:  # Either tyro printed the help, or rich found a broken pipe.
        if isinstance(stopped.__context__, BrokenPipeError):
            return _pipe_closed(arguments)
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except BrokenPipeError:
        return _pipe_closed(arguments)
    except OSError as error:  # for example, missing permissions or a path that is too long
        prefix = f"{error.filename}: " if error.filename else ""
        line = f"{prefix}{error.strerror or error}"
        if "usable temporary directory" in line:
            line += "; set TMPDIR to a writable directory"
        return _fail(line, 1)
    except (MemoryError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, MemoryError) and not any(s in message for s in OUT_OF_MEMORY):
            raise
        hints = [MEMORY_HINTS[name] for name in arguments[:1] if name in MEMORY_HINTS]
        return _fail("; ".join(("out of memory", *hints)), 1)


def _expand(argument: str) -> str:
    """Expand `~` in `~/x` and `--flag=~/x`, which shells do not always expand."""
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={os.path.expanduser(value)}"  # noqa: PTH111 - pathlib drops "./" and raises
    return os.path.expanduser(argument)  # noqa: PTH111


def _open_standard_streams() -> None:
    """Connect closed standard streams (`>&-`) to the null device.

    Otherwise, the next opened file would get the descriptor of the stream, and C libraries would
    write messages to that file.
    """
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for number, (name, mode) in enumerate(modes.items()):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _pipe_closed(arguments: Sequence[str]) -> int:
    """Return the exit code for a closed stdout, as in `resnet56 ... | head -1`."""
    _discard(sys.stdout)
    if arguments[:1] != ["train"]:
        return BROKEN_PIPE
    return _fail(
        "training stopped because its output pipe was closed; use --quiet or write the output to "
        "a file (if there is a checkpoint, --resume continues from it)",
        BROKEN_PIPE,
    )


def _discard(stream: TextIO) -> None:
    """Discard buffered output. Otherwise, Python would print an error at exit."""
    with contextlib.suppress(OSError, ValueError):  # In tests, streams have no file descriptor.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}  {about}" for name, about in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if arguments else USAGE_ERROR
    if first in ("-V", "--version"):
        print(f"resnet56 {__version__}")
        return 0
    if first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown command {first!r}; {hint}choose from {', '.join(COMMANDS)}")
    return _command(first)(arguments[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    """Import the module of a command and return its `run` function."""
    module = f"{name}_" if iskeyword(name) else name
    run: Callable[[list[str]], int] = import_module(f"{__name__}.{module}").run
    return run


def _fail(line: str, code: int) -> int:
    """Print an error to stderr and return the exit code."""
    try:
        print(escape_line(f"resnet56: {line}"), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)
    return code
