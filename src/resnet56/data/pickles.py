"""Read pickles without executing code: CIFAR batches and checkpoints from other projects.

A pickle is a program. This unpickler supports containers, numbers and strings. It replaces classes
and functions with stubs that store data and do nothing else. Memory use is proportional
to the size of the file, regardless of the lengths, indices and keys in the file.
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

MAX_OPCODES = 2_000_000  # the training file of CIFAR-100 contains 0.4 million operations

# Files that refer to these modules are rejected, although the unpickler never calls functions.
_DANGEROUS_MODULES = {
    "ctypes", "importlib", "nt", "os", "pdb", "posix", "pty", "runpy", "shutil", "socket",
    "subprocess", "sys", "webbrowser",
}  # fmt: skip
_DANGEROUS_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}


class UnsafePickleError(Exception):
    """A pickle refers to dangerous code or external objects. The message states which."""


class Stub(dict[Any, Any]):
    """Placeholder for an instance of a class or for the result of a function.

    A stub stores the content of the object that it replaces. A stub is a dictionary, because many
    configuration classes are dictionaries. `state` contains the attributes of the instance as the
    pickle stores them.
    """

    name = ""  # full name of the class or function
    state: object = None

    def __new__(cls, *_args: object, **_kwargs: object) -> "Stub":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        super().__init__()

    # Compare by identity, because the content can have any type.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, _item: object) -> None:
        """Ignore the items of subclasses of list or set."""

    extend = add = append


def make_stub(name: str) -> type[Stub]:
    """Create a stub class for `name`."""
    return type("Stub", (Stub,), {"name": name})


class DictStub(dict[Any, Any]):
    """Replaces OrderedDict and similar classes."""

    def __init__(self, items: object = (), *_: object) -> None:
        super().__init__()
        if isinstance(items, Iterable) and not isinstance(items, str | bytes):
            for key, value in items.items() if isinstance(items, Mapping) else items:
                check_key(key)
                self[key] = value

    def __setstate__(self, state: object) -> None:
        """Ignore attributes, such as the versions in a state dict."""


class _Dtype:
    """Replaces `numpy.dtype` and stores its type code."""

    code: object = None

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment, which do not matter for uint8 arrays."""


class PickledArray:
    """Replaces `numpy.ndarray` and `_reconstruct`, the function that creates an empty array.

    This class stores the content without checking it. `pixels` checks the content.
    """

    # These are class attributes, because a pickle can create instances without calling __init__.
    shape: object = None
    dtype: object = None
    data: object = None
    fortran: object = False

    def __init__(self, *_: object) -> None:
        """Ignore the arguments, because the state defines the array."""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def pixels(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """Return the array if its dtype is uint8 and its shape is `shape`, otherwise None."""
        if not isinstance(self.dtype, _Dtype) or self.dtype.code not in ("u1", b"u1"):
            return None
        if not isinstance(self.data, bytes | bytearray) or self.shape != shape:
            return None
        if len(self.data) != math.prod(shape):
            return None
        flat = np.frombuffer(self.data, dtype=np.uint8)
        return flat.reshape(shape[::-1]).T if self.fortran else flat.reshape(shape)


class _Buffer(PickledArray):
    """Replaces `_frombuffer`, the function that creates NumPy arrays in protocol 5."""

    def __init__(self, data: object, dtype: object, shape: object, order: object) -> None:
        self.__setstate__((1, shape, dtype, order == "F", data))


# A pickle can set attributes of every object that it names, unless the object defines __setstate__.
# The values of this dictionary are therefore classes with this method, not functions.
_NUMPY: dict[str, type] = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.{name}": stub
        for core in ("core", "_core")  # NumPy 1 and 2
        for name, stub in (
            ("multiarray._reconstruct", PickledArray),
            ("numeric._frombuffer", _Buffer),
        )
    },
}


def _encoder() -> type:
    """Create a stub for `_codecs.encode`, which Python 3 uses for bytes in protocols 0 to 2.

    Python's pickler uses only Latin-1 for bytes, so the stub supports no other encoding. Other
    encodings can require quadratic time or produce a large output. The stub caches results, because
    a file could request the encoding of a long string many times.
    """
    cache: dict[str, bytes] = {}

    class Encode:
        def __new__(cls, text: str, encoding: str) -> Any:
            if encoding not in ("latin1", b"latin1"):
                raise ValueError(f"unsupported encoding {str(encoding)[:20]!a}")
            if text not in cache:
                cache[text] = text.encode("latin-1")
            return cache[text]

        def __setstate__(self, state: object) -> None:
            """Ignore the state, because there are no instances."""

    return Encode


def check_key(key: object) -> None:
    """Raise ValueError for a key that is slow to hash: a nested tuple or a large integer."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if isinstance(part, tuple | frozenset) or (isinstance(part, int) and abs(part) >= 2**64):
            raise ValueError(f"a key contains a nested or large {type(part).__name__}")


def _with_checked_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """Wrap the standard handler of `opcode` in a handler that checks the keys on the stack."""
    handle: Callable[[Any], None] = pickle._Unpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            check_key(key)
        handle(unpickler)

    return checked


class _Unpickler(pickle._Unpickler):
    """Unpickles containers, numbers, strings and stubs without executing code from the file.

    The base class is the Python implementation in the standard library. The C implementation hashes
    keys before they can be checked.
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
        self._classes: dict[str, type] = {"_codecs.encode": _encoder()}

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full not in self._classes:
            self._classes[full] = self._find(full)
        return self._classes[full]

    def persistent_load(self, pid: object, /) -> Any:
        if self._persistent is None:
            raise UnsafePickleError("refers to external objects")
        return self._persistent(pid)

    dispatch = {  # noqa: RUF012  # a class attribute, as in the base class
        **pickle._Unpickler.dispatch,
        **{
            opcode[0]: _with_checked_keys(opcode, keys)
            for opcode, keys in (
                (pickle.SETITEM, slice(-2, -1)),
                (pickle.SETITEMS, slice(None, None, 2)),  # the stack contains only keys and values
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
    """Read the next pickle from a stream.

    Args:
        stream: seekable stream. Afterward, its position is the end of the pickle.
        find: function that returns the stub for the full name of a class or function.
        persistent: function that returns the object for a persistent ID. By default, the function
            raises an error for persistent IDs.
        encoding: encoding of strings from Python 2, or "bytes" to return bytes.

    Raises:
        UnsafePickleError: the pickle refers to dangerous code or external objects.
        Exception: any exception, if the pickle is damaged.
    """
    start = stream.tell()
    # Before the unpickler reads the data, it allocates the memory that the lengths and memo indices
    # in the file require. In a damaged file, these numbers could make the unpickler allocate
    # gigabytes of memory. `genops` compares lengths with the number of available bytes.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise ValueError("memo index out of range")
        if count == MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES:,} operations")
    stream.seek(start)
    return _Unpickler(stream, find, persistent, encoding).load()


def with_numpy(find: Callable[[str], type]) -> Callable[[str], type]:
    """Extend `find` with stubs for NumPy arrays."""
    return lambda name: _NUMPY[name] if name in _NUMPY else find(name)


def reject_all(name: str) -> type:
    """Reject every class and function.

    Of the functions that can be passed as `find`, this one is the strictest.
    """
    raise UnsafePickleError(f"tries to call {name[:80]!a}")


def reject_dangerous(name: str) -> type[Stub]:
    """Return a stub for `name`. Raises UnsafePickleError if `name` is dangerous."""
    module, _, attribute = name.rpartition(".")
    builtin = module in ("builtins", "__builtin__") and attribute in _DANGEROUS_BUILTINS
    if builtin or module.partition(".")[0] in _DANGEROUS_MODULES:
        raise UnsafePickleError(name[:80])
    return make_stub(name)


def read_pickle(file: Path) -> dict[str, object]:
    """Read a dictionary pickled by Python 2 or 3. Raises DataError for any other content."""
    content = file.read_bytes()
    try:
        unpickled = unpickle(io.BytesIO(content), with_numpy(reject_all), encoding="bytes")
    except UnsafePickleError as error:
        raise DataError(
            f"{file} {error}, which no data set needs (nothing was executed); do not use this file"
        ) from error
    except Exception as error:  # the unpickler can raise any exception for damaged data
        raise DataError(
            f"{file} is not a valid pickle ({one_line(error)}); unpack the archive again"
        ) from error
    if not isinstance(unpickled, dict):
        raise DataError(f"{file} does not contain a dictionary; unpack the archive again")
    return {text(key): value for key, value in unpickled.items() if isinstance(key, str | bytes)}


def text(value: str | bytes) -> str:
    """Return `value` as a string. Python 2 pickles strings as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
