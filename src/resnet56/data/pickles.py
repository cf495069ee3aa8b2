"""Pickles read without the power to run code: CIFAR's batches, and other projects' checkpoints.

A pickle is a program. This unpickler knows containers, numbers and strings; every class or
function that a file names becomes a stand-in that keeps what it is given and does nothing. What
it builds is in proportion to the file: no length, index, key or encoding can ask for more.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from resnet56.errors import DataError, one_line

MAX_OPCODES = 2_000_000  # CIFAR-100's training batch has 0.4 million, a checkpoint's index 0.1

# A file that names one of these is not to be trusted, although nothing of it is called.
_DANGEROUS_MODULES = {
    "ctypes", "importlib", "nt", "os", "pdb", "posix", "pty", "runpy", "shutil", "socket",
    "subprocess", "sys", "webbrowser",
}  # fmt: skip
_DANGEROUS_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}


class UnsafePickleError(Exception):
    """A pickle that asks for more than data; the message says for what."""


class StandIn(dict[Any, Any]):
    """An object of a class or function that is not loaded; it keeps what the file says of it.

    It is a dictionary because many configuration classes are; `state` is what a pickle would
    restore its attributes from.
    """

    name = ""  # of the class, as the file has it
    state: object = None

    def __new__(cls, *_args: object, **_kwargs: object) -> "StandIn":
        """Whatever the arguments: they are not looked at."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        super().__init__()

    # Identity, as the content may be anything.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, _item: object) -> None:
        """What a subclass of list or set holds is of no use."""

    extend = add = append


def stand_in(name: str) -> type[StandIn]:
    """A new stand-in class for `name`."""
    return type("StandIn", (StandIn,), {"name": name})


class Items(dict[Any, Any]):
    """Stands in for OrderedDict and its like."""

    def __init__(self, items: object = (), *_: object) -> None:
        super().__init__()
        if isinstance(items, Iterable) and not isinstance(items, str | bytes):
            for key, value in items.items() if isinstance(items, Mapping) else items:
                check_key(key)
                self[key] = value

    def __setstate__(self, state: object) -> None:
        """Attributes of a dictionary, such as a state dict's versions: not needed."""


class _Dtype:
    """Stands in for numpy's dtype while unpickling: remembers its code and does nothing."""

    code: object = None

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which mean nothing for bytes."""


class PickledArray:
    """Stands in for numpy's ndarray, and `_reconstruct`, which makes an empty one.

    Remembers what it is given, unchecked until `pixels`.
    """

    # Defaults on the class, because a pickle may make one without calling __init__.
    shape: object = None
    dtype: object = None
    data: object = None
    fortran: object = False

    def __init__(self, *_: object) -> None:
        """The arguments say nothing yet; the state does."""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def pixels(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """The array, if it is one of bytes and of this shape."""
        if not isinstance(self.dtype, _Dtype) or self.dtype.code not in ("u1", b"u1"):
            return None
        if not isinstance(self.data, bytes | bytearray) or self.shape != shape:
            return None
        if len(self.data) != math.prod(shape):
            return None
        flat = np.frombuffer(self.data, dtype=np.uint8)
        return flat.reshape(shape[::-1]).T if self.fortran else flat.reshape(shape)


class _Buffer(PickledArray):
    """Stands in for numpy's `_frombuffer`, which makes the arrays of protocol 5."""

    def __init__(self, data: object, dtype: object, shape: object, order: object) -> None:
        self.__setstate__((1, shape, dtype, order == "F", data))


# A pickle can also set attributes on what it names, so there is no plain function here: these
# classes have a __setstate__ that comes first.
_NUMPY: dict[str, type] = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")  # numpy 1 and 2
        for name, stand_in in (
            ("multiarray._reconstruct", PickledArray),
            ("numeric._frombuffer", _Buffer),
        )
    },
}


def _encoder() -> type:
    """A stand-in for `_codecs.encode`, by which Python 3 writes bytes in protocols 0 to 2.

    Only for Latin-1, which it uses; other codecs take quadratic time or make much of little. A
    string is encoded once, however often a file asks: else a long one could be made many times.
    """
    known: dict[str, bytes] = {}

    class Encode:
        def __new__(cls, text: str, encoding: str) -> Any:
            if encoding not in ("latin1", b"latin1"):
                raise ValueError(f"bytes in the encoding {str(encoding)[:20]!a}")
            if text not in known:
                known[text] = text.encode("latin-1")
            return known[text]

        def __setstate__(self, state: object) -> None:
            """Never an instance's."""

    return Encode


def check_key(key: object) -> None:
    """ValueError for a key that could take long to hash: nested tuples, huge numbers."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if isinstance(part, tuple | frozenset) or (isinstance(part, int) and abs(part) >= 2**64):
            raise ValueError(f"a key that is a {type(part).__name__} inside or of more than 64 bit")


def _with_checked_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """The standard library's handler of `opcode`, after `check_key` for a part of the stack."""
    handle: Callable[[Any], None] = pickle._Unpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            check_key(key)
        handle(unpickler)

    return checked


class _Unpickler(pickle._Unpickler):
    """Unpickles containers, numbers, strings and stand-ins; never runs foreign code.

    It is the standard library's own in Python, not the one in C, as that cannot be asked to look
    at keys before it hashes them.
    """

    def __init__(
        self,
        stream: BinaryIO,
        find: Callable[[str], type],
        persistent: Callable[[Any], object] | None,
        encoding: str,
    ) -> None:
        super().__init__(stream, encoding=encoding)
        self._find = find
        self._persistent = persistent
        self._known: dict[str, type] = {"_codecs.encode": _encoder()}

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full not in self._known:
            self._known[full] = self._find(full)
        return self._known[full]

    def persistent_load(self, pid: object, /) -> Any:
        if self._persistent is None:
            raise UnsafePickleError("refers to external objects")
        return self._persistent(pid)

    dispatch = {  # noqa: RUF012  # the base class's way
        **pickle._Unpickler.dispatch,
        **{
            opcode[0]: _with_checked_keys(opcode, keys)
            for opcode, keys in (
                (pickle.SETITEM, slice(-2, -1)),
                (pickle.SETITEMS, slice(None, None, 2)),  # the stack begins at the mark
                (pickle.DICT, slice(None, None, 2)),
                (pickle.ADDITEMS, slice(None)),
                (pickle.FROZENSET, slice(None)),
            )
        },
    }


def unpickle(
    stream: BinaryIO,
    find: Callable[[str], type],
    persistent: Callable[[Any], object] | None = None,
    encoding: str = "utf-8",
) -> Any:
    """The next pickle in a stream.

    Args:
        stream: seekable; afterwards it stands behind the pickle.
        find: gives the stand-in for a class or function, by its full name.
        persistent: gives what a persistent id stands for; none are allowed by default.
        encoding: of strings that Python 2 wrote; "bytes" to keep them as they are.

    Raises:
        UnsafePickleError: it asks for more than data.
        Exception: any, if it is damaged.
    """
    begin = stream.tell()
    # The unpickler allocates what lengths and memo indices say before it looks further;
    # a damaged one can say gigabytes. genops reads lengths against what is there.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise ValueError("memo index out of range")
        if count == MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES:,} operations")
    stream.seek(begin)
    return _Unpickler(stream, find, persistent, encoding).load()


def numpy_or(find: Callable[[str], type]) -> Callable[[str], type]:
    """The stand-ins for numpy's arrays, and `find` for everything else."""
    return lambda name: _NUMPY[name] if name in _NUMPY else find(name)


def refuse(name: str) -> type:
    """The strictest `find`: no other class or function belongs in the file."""
    raise UnsafePickleError(f"tries to call {name[:80]!a}")


def refuse_dangerous(name: str) -> type[StandIn]:
    """A stand-in for anything but what only an attack has use for."""
    module, _, attribute = name.rpartition(".")
    builtin = module in ("builtins", "__builtin__") and attribute in _DANGEROUS_BUILTINS
    if builtin or module.partition(".")[0] in _DANGEROUS_MODULES:
        raise UnsafePickleError(name[:80])
    return stand_in(name)


def read_pickle(file: Path) -> dict[str, object]:
    """The dictionary pickled in `file`, written by Python 2 or 3. Raises DataError."""
    content = file.read_bytes()
    try:
        unpickled = unpickle(io.BytesIO(content), numpy_or(refuse), encoding="bytes")
    except UnsafePickleError as error:
        raise DataError(
            f"{file} {error}, which no data set needs; it was not executed, do not trust this file"
        ) from error
    except Exception as error:  # garbage can make an unpickler raise anything
        raise DataError(
            f"{file} is not a valid pickle ({one_line(error)}); unpack the archive again"
        ) from error
    if not isinstance(unpickled, dict):
        raise DataError(f"{file} does not contain a dictionary; unpack the archive again")
    return {text(key): value for key, value in unpickled.items() if isinstance(key, str | bytes)}


def text(value: str | bytes) -> str:
    """A string, which Python 2 pickled as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
