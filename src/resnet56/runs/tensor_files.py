"""Read tensor files without running code. The content of a file determines its format.

This module supports safetensors, the formats that `torch.save` has written since 2017, and the ONNX
files that this package exports. Opening a file reads only names, shapes and dtypes. Values are read
on demand. Reading a tensor never allocates more memory than the file size.
"""

import contextlib
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from resnet56.data.pickles import (
    DictStub,
    UnsafePickleError,
    make_stub,
    reject_dangerous,
    unpickle,
    with_numpy,
)
from resnet56.errors import MissingExtraError, RunError, one_line
from resnet56.runs.pretrained import HEAD, has_onnx_header

_MAGIC = 0x1950A86A20F9469CFC6C  # first object in files from PyTorch versions before 1.6
_BN_EPS = 1e-5

# Signatures of other formats, which users may pass by mistake.
_OTHERS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x89HDF", "is an HDF5 file, for example from Keras; only PyTorch weights are supported"),
    (b"\x93NUMPY", "is a NumPy array; choose a state dict written by torch.save or safetensors"),
    (b"{", "is JSON text, not a checkpoint; choose the weight file"),
)

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
    "_Untyped": torch.uint8,
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file. Its values are read on demand."""

    shape: tuple[int, ...]
    type: str  # name of the dtype, as in PyTorch or in the file
    read: Callable[[], Tensor]  # reads the values. Can raise any exception for a damaged file.
    plain: bool = True  # whether the tensor is dense and contains real numbers
    memory: object = field(default_factory=object)  # identifies the memory of the values


@dataclass(frozen=True)
class Contents:
    """The content of a file."""

    tree: object  # nested containers with `StoredTensor` leaves
    metadata: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # classes of objects that are not tensors


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Contents]:
    """Open a tensor file for reading, and close it at the end of the `with` block.

    Raises:
        RunError: the file cannot be read, has another format, is damaged, or could run code.
        MissingExtraError: the file is in ONNX format and the extra `onnx` is not installed.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not file.is_file() and file.exists():
                raise RunError(f"{file} is not a regular file; choose a checkpoint")
            stream = stack.enter_context(file.open("rb"))
            size = file.stat().st_size
            head = stream.read(HEAD)
            stream.seek(0)
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror or error}") from None
        if problem := _describe_other(head):
            raise RunError(f"{file} {problem}")
        try:
            contents = _open(file, stream, head, size, stack)
        except RunError:
            raise
        except MissingExtraError:
            raise
        except UnsafePickleError as error:
            raise RunError(
                f"{file} refers to {one_line(error)}, which could run code, so the file was "
                "not loaded; do not trust this file"
            ) from None
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror or error}") from None
        except Exception as error:  # Parsers can raise any exception for a damaged file.
            raise RunError(f"{file} is not a valid checkpoint: {one_line(error)}") from None
        yield contents


def _describe_other(head: bytes) -> str | None:
    """Describe a file that is not a checkpoint. Return None if it could be a checkpoint."""
    if not head:
        return "is empty"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page, not a checkpoint; download the file itself"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    return next((text for signature, text in _OTHERS if head.startswith(signature)), None)


def _open(
    file: Path, stream: BinaryIO, head: bytes, size: int, stack: contextlib.ExitStack
) -> Contents:
    if head[8:9] == b"{":
        length = int.from_bytes(head[:8], "little")
        if length > size - 8:
            raise RunError(f"{file} is damaged: its header is truncated")
        return _safetensors(file, stack)
    if head.startswith(b"PK"):
        return _zip(file, stack.enter_context(zipfile.ZipFile(stream)), size)
    if has_onnx_header(head):
        return _onnx(file, stream.read())
    return _legacy(stream, size)


# safetensors


def _safetensors(file: Path, stack: contextlib.ExitStack) -> Contents:
    opened = stack.enter_context(safetensors.safe_open(file, framework="pt"))
    tree = {}
    for key in opened.keys():  # noqa: SIM118  # The object is not a mapping.
        part = opened.get_slice(key)
        tree[key] = StoredTensor(
            tuple(part.get_shape()), part.get_dtype(), partial(opened.get_tensor, key)
        )
    return Contents(tree, opened.metadata() or {})


# torch.save


class _Storage:
    """A storage in a file. `raw` is a function that reads the bytes of the storage."""

    def __init__(self, key: object, dtype: torch.dtype, count: int, raw: Any) -> None:
        self.key, self.dtype, self.count, self._raw = key, dtype, count, raw

    def values(self, dtype: torch.dtype) -> Tensor:
        """Read all values as a tensor of shape (N,)."""
        return torch.frombuffer(self._raw(self), dtype=dtype, count=self.size // dtype.itemsize)

    @property
    def size(self) -> int:
        """Size of the storage in bytes."""
        return self.count * self.dtype.itemsize


class _Rebuild:
    """Replaces PyTorch's functions that build a tensor from a storage."""

    def __new__(
        cls, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...],
        *_: object,
    ) -> Any:  # fmt: skip
        return _view(storage, storage.dtype, offset, shape, stride)

    def __setstate__(self, state: object) -> None:
        """Do nothing. Without this method, a pickle could set attributes of this class."""


class _RebuildTyped(_Rebuild):
    """Replaces functions that build tensors of float8 and other dtypes without a storage class."""

    def __new__(
        cls, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...],
        _grad: object, _hooks: object, dtype: Any, *_: object,
    ) -> Any:  # fmt: skip
        resolved = getattr(torch, str(dtype.name).removeprefix("torch."), None)
        if not isinstance(resolved, torch.dtype):
            raise ValueError(f"a tensor has the unknown dtype {dtype.name}")
        return _view(storage, resolved, offset, shape, stride)


class _RebuildParameter(_Rebuild):
    """Replaces the functions that convert a tensor to a parameter."""

    def __new__(cls, tensor: object, *_: object) -> Any:
        return tensor


class _RebuildSubclass(_Rebuild):
    """Replaces the functions that convert the result of another function to a subclass."""

    def __new__(cls, make: Any, _type: object, arguments: tuple[Any, ...], *_: object) -> Any:
        if not (isinstance(make, type) and issubclass(make, _Rebuild)):
            raise ValueError("a tensor has an unknown class")
        return make(*arguments)


class _RebuildSpecial(_Rebuild):
    """Replaces the functions that build sparse, quantized and meta tensors."""

    def __new__(cls, *_: object) -> Any:
        return StoredTensor((), "a special tensor", _unreadable, plain=False)


_REBUILDS = {
    "torch._utils._rebuild_tensor": _Rebuild,
    "torch._utils._rebuild_tensor_v2": _Rebuild,
    "torch._utils._rebuild_tensor_v3": _RebuildTyped,
    "torch._utils._rebuild_parameter": _RebuildParameter,
    "torch._utils._rebuild_parameter_with_state": _RebuildParameter,
    "torch._tensor._rebuild_from_type_v2": _RebuildSubclass,
    "torch._tensor._rebuild_from_type": _RebuildSubclass,
    "collections.OrderedDict": DictStub,
    "collections.defaultdict": DictStub,
}


def _unreadable() -> Tensor:
    raise ValueError("it is not a dense tensor")


def _view(
    storage: _Storage, dtype: torch.dtype, offset: int, shape: object, stride: object
) -> StoredTensor:
    """Return a view of a storage. Raises ValueError unless the view lies inside the storage."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple | list):
        raise ValueError("a tensor has no storage")
    if not isinstance(stride, tuple | list) or len(stride) != len(shape) or len(shape) > 64:
        raise ValueError("a tensor has no valid shape")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *stride)):
        raise ValueError("a tensor has an invalid shape")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.size // dtype.itemsize:
        raise ValueError("a tensor exceeds its storage")
    sizes = tuple(shape)
    return StoredTensor(
        sizes,
        str(dtype),
        lambda: storage.values(dtype).as_strided(sizes, tuple(stride), offset),
        plain=not dtype.is_complex,
        memory=(storage.key, offset, sizes, tuple(stride)),
    )


class _TorchPickle:
    """Unpickles a file from `torch.save` and records the classes that do not belong to PyTorch."""

    def __init__(self, raw: Callable[[_Storage], Any]) -> None:
        self.raw = raw
        self.storages: dict[object, _Storage] = {}
        self.other_classes: set[str] = set()

    def load(self, stream: BinaryIO) -> Any:
        """Read the next object."""
        # Decode strings from Python 2 as Latin-1. Keys are ASCII, and other strings are unused.
        return unpickle(stream, self._find, self._storage, encoding="latin-1")

    def contents(self, tree: object) -> Contents:
        """Return the content of the file and the recorded classes."""
        return Contents(tree, ignored=tuple(sorted(self.other_classes)))

    def _find(self, name: str) -> type:
        if name in _REBUILDS:
            return _REBUILDS[name]
        if name.startswith("torch._utils._rebuild_"):
            return _RebuildSpecial
        if name.startswith("torch."):  # for example, a storage class, a dtype or a device
            return make_stub(name)
        self.other_classes.add(name)
        return with_numpy(reject_dangerous)(name)

    def _storage(self, pid: Any) -> object:
        """Resolve a persistent ID to a storage or, in old files, to the class of a module."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        tag, storage_class, key, _, count, *view = pid
        name = storage_class.name.rpartition(".")[2].removesuffix("Storage")
        if tag != "storage" or name not in _STORAGES or any(part is not None for part in view):
            raise ValueError(f"the data of a tensor has the unknown dtype {one_line(name)}")
        if type(count) is not int or not 0 <= count < 2**60 or not isinstance(key, str | int):
            raise ValueError("the data of a tensor has an invalid size or key")
        storage = _Storage(key, _STORAGES[name], count, self.raw)
        known = self.storages.setdefault(key, storage)
        return known if (known.dtype, known.count) == (storage.dtype, count) else storage


def _zip(file: Path, archive: zipfile.ZipFile, size: int) -> Contents:
    """Read the zip format of PyTorch 1.6 and later: a pickle and one entry per storage."""
    names = set(archive.namelist())
    index = next((name for name in names if name.split("/")[1:] == ["data.pkl"]), None)
    if index is None:
        raise RunError(
            f"{file} is a zip archive but not a PyTorch checkpoint; if it contains a checkpoint, "
            "unpack it first"
        )
    prefix = index.removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in names:
        raise RunError(
            f"{file} is a TorchScript program, which could run code, so the file was not loaded; "
            "save the state dict instead"
        )
    cache: dict[object, bytearray] = {}

    def read(name: str) -> bytes:
        entry = archive.getinfo(name)
        # PyTorch does not compress entries, so no entry is larger than the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"{one_line(name)} is compressed or larger than the file")
        return archive.read(entry)

    def raw(storage: _Storage) -> bytearray:
        if storage.key not in cache:
            cache[storage.key] = bytearray(read(f"{prefix}data/{storage.key}"))
            if sum(map(len, cache.values())) > size:
                raise ValueError("entries of the archive overlap")
        if len(cache[storage.key]) < storage.size:
            raise ValueError("the data of a tensor is truncated")
        return cache[storage.key]

    if f"{prefix}byteorder" in names and read(f"{prefix}byteorder") != b"little":
        raise RunError(
            f"{file} is in big-endian byte order, which is not supported; save it on a "
            "little-endian machine"
        )
    loader = _TorchPickle(raw)
    return loader.contents(loader.load(io.BytesIO(read(index))))


def _legacy(stream: BinaryIO, size: int) -> Contents:
    """Read a single pickle, or the older format of PyTorch: pickles followed by storages."""
    offsets: dict[object, int] = {}

    def raw(storage: _Storage) -> bytearray:
        if storage.key not in offsets or offsets[storage.key] + storage.size > size:
            raise ValueError("the data of a tensor is truncated")
        stream.seek(offsets[storage.key])
        return bytearray(stream.read(storage.size))

    loader = _TorchPickle(raw)
    tree = loader.load(stream)
    if tree != _MAGIC:
        return loader.contents(tree)
    loader.load(stream)  # protocol version
    loader.load(stream)  # system information
    tree = loader.load(stream)
    for key in loader.load(stream):
        stream.seek(8, io.SEEK_CUR)  # Skip the element count, which the pickle also contains.
        offsets[key] = stream.tell()
        stream.seek(loader.storages[key].size, io.SEEK_CUR)
    return loader.contents(tree)


# ONNX


def _onnx(file: Path, content: bytes) -> Contents:
    """Read a file from `resnet56 export` and return the weights under their PyTorch names.

    The export folds each batch norm into the preceding convolution. This function converts the
    bias of each convolution to a batch norm that only adds this bias.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise MissingExtraError("onnx, which reads ONNX files,", "onnx") from None
    model = onnx.load_model_from_string(content)
    values = {}
    for entry in model.graph.initializer:
        if entry.external_data:  # The path could refer to any file on this machine.
            raise RunError(f"{file} stores its weights in other files; export it to a single file")
        values[entry.name] = torch.from_numpy(numpy_helper.to_array(entry).copy())
    parts = ("weight", "bias", "running_mean", "running_var")
    tree = {
        name: value
        for name, value in values.items()
        # The export writes a padding shortcut as a convolution whose weights are zeros and ones.
        if name.rpartition(".")[2] in parts and not name.endswith(".shortcut.weight")
    }
    for node in model.graph.node:
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[1] in tree:
            conv = node.input[1].removesuffix(".weight")
            norm = f"{conv[:-1]}1" if conv.endswith(".shortcut.0") else conv.replace("conv", "bn")
            bias = values[node.input[2]]
            tree[f"{norm}.weight"] = torch.ones_like(bias)
            tree[f"{norm}.bias"] = bias
            tree[f"{norm}.running_mean"] = torch.zeros_like(bias)
            tree[f"{norm}.running_var"] = torch.full_like(bias, 1 - _BN_EPS)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    stored = {
        name: StoredTensor(tuple(value.shape), str(value.dtype), value.clone)
        for name, value in tree.items()
    }
    return Contents(stored, metadata)
