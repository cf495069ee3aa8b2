"""Pickles read without the power to run code, for the CIFAR files that are published as such.

A pickle is a program. This unpickler knows containers, numbers, strings and inert stand-ins for
numpy's arrays; whatever else a file names is refused before it is looked up.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resnet56.errors import DataError, one_line


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


# All a pickle may name. A pickle can also set attributes on what it names, so there is no plain
# function here: built-ins refuse, and these classes have a __setstate__ that comes first.
_STAND_INS: dict[str, object] = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": _Dtype,
    "_codecs.encode": str.encode,  # how Python 3 writes bytes in protocols 0 to 2
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")  # numpy 1 and 2
        for name, stand_in in (
            ("multiarray._reconstruct", PickledArray),
            ("numeric._frombuffer", _Buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and stand-ins for arrays; never runs foreign code."""

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full not in _STAND_INS:
            raise _UnsafeError(f"tries to call {full[:80]!a}")
        return _STAND_INS[full]

    def persistent_load(self, pid: object, /) -> Any:
        raise _UnsafeError("refers to objects outside itself")


class _UnsafeError(Exception):
    """A pickle that asks for more than data."""


def read_pickle(file: Path) -> dict[str, object]:
    """The dictionary pickled in `file`, written by Python 2 or 3. Raises DataError."""
    content = file.read_bytes()
    try:
        # The unpickler allocates what lengths and memo indices say before it looks further;
        # a damaged one can say gigabytes. genops reads lengths against what is there.
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
                raise ValueError("memo index out of range")
        unpickled = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _UnsafeError as error:
        raise DataError(
            f"{file} {error}, which no data set needs: it was not run; do not trust this file"
        ) from error
    except Exception as error:  # garbage can make an unpickler raise anything
        raise DataError(
            f"{file} is not a whole pickle ({one_line(error)}): unpack the archive again"
        ) from error
    if not isinstance(unpickled, dict):
        raise DataError(f"{file} holds no dictionary: unpack the archive again")
    return {text(key): value for key, value in unpickled.items() if isinstance(key, str | bytes)}


def text(value: str | bytes) -> str:
    """A string, which Python 2 pickled as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
