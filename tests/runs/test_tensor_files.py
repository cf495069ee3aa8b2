"""Tensor files are recognized by content, and no file content causes a traceback."""

import argparse
import contextlib
import datetime
import io
import json
import pathlib
import pickle
import struct
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import onnx_file, random_checkpoint
from torch import nn

from resnet56.data.pickles import make_stub, reject_all, unpickle, with_numpy
from resnet56.errors import Error, RunError
from resnet56.runs import convert
from resnet56.runs.tensor_files import open_tensors

STATE = dict(random_checkpoint("resnet8-b", tuple("0123456789")).model)


def saved(content: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


class Unknown:
    """A class that does not exist when the file is read."""

    def __init__(self) -> None:
        self.lr = 0.1


class UnknownDict(dict):  # type: ignore[type-arg]
    """A configuration class like those of EasyDict and yacs."""


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        np.float64(94.8),
        np.array([90.1, 94.8]),
        np.random.RandomState(0).get_state(),
        np.random.default_rng(0),
        datetime.datetime(2024, 5, 4, tzinfo=datetime.UTC),
        argparse.Namespace(data=pathlib.Path("/data")),
        types.SimpleNamespace(lr=0.1),
        Unknown(),
        UnknownDict(lr=0.1),
        {1, 2, frozenset({3})} - {frozenset({3})},
        torch.float16,
        torch.device("cpu"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_next_to_the_weights_are_ignored(
    other: object, legacy: bool, protocol: int, tmp_path: Path
) -> None:
    content = {"state_dict": {"a": torch.arange(6.0).view(2, 3).T}, "other": other}
    (tmp_path / "model.pth").write_bytes(
        saved(content, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    )
    with open_tensors(tmp_path / "model.pth") as contents:
        stored = contents.tree["state_dict"]["a"]  # type: ignore[index]
        assert stored.shape == (3, 2)
        assert torch.equal(stored.read(), content["state_dict"]["a"])  # type: ignore[index]


class Subclass(torch.Tensor):
    """A subclass of torch.Tensor."""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4)[1:, ::2],
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.ones(1).expand(5, 5),
        torch.randn(4).bfloat16(),
        torch.randn(4).to(torch.float8_e4m3fn),
        nn.Parameter(torch.randn(3)),
        torch.randn(3).as_subclass(Subclass),
        torch.tensor(7),
        torch.tensor([True, False]),
    ],
    ids=[
        "strided",
        "channels_last",
        "expanded",
        "bfloat16",
        "float8",
        "parameter",
        "subclass",
        "scalar",
        "bool",
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_have_the_values_that_pytorch_loads(
    tensor: torch.Tensor, legacy: bool, tmp_path: Path
) -> None:
    content = saved([tensor], _use_new_zipfile_serialization=not legacy)
    (tmp_path / "model.pth").write_bytes(content)
    with open_tensors(tmp_path / "model.pth") as contents:
        actual = contents.tree[0].read()  # type: ignore[index]
    expected = tensor.detach()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert bool((actual.float() == expected.float()).all())


OTHERS: dict[str, tuple[bytes, str]] = {
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "page.safetensors": (b"\n<!DOCTYPE html><html>", "a web page"),
    "gz.pth": (b"\x1f\x8b" + bytes(99), "compressed with gzip"),
    "tar.th": (bytes(257) + b"ustar" + bytes(250), "a tar archive"),
    "keras.bin": (b"\x89HDF\r\n" + bytes(99), "HDF5"),
    "index.json": (b'{"weight_map": {}}', "JSON text"),
    "empty.pth": (b"", "is empty"),
    "truncated.safetensors": (struct.pack("<Q", 900) + b'{"a"', "header is truncated"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_recognized_by_content(name: str, tmp_path: Path) -> None:
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name}.*{message}") as caught:
        convert.read(tmp_path / name)
    assert "code" not in str(caught.value)


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(safetensors.torch.save(STATE))
    (tmp_path / "model.safetensors").write_bytes(saved(STATE))
    for name in ("model.bin", "model.safetensors"):
        assert convert.read(tmp_path / name).checkpoint.config.arch == "resnet8-b"


def test_other_zip_archives_are_described(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", a=np.zeros(3))
    with pytest.raises(RunError, match="a zip archive but not a PyTorch checkpoint"):
        convert.read(tmp_path / "model.npz")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(RunError, match=r"pickled module \(torch\.nn\.modules\.linear\.Linear\)"):
        convert.read(tmp_path / "module.pth")


def with_header(**change: object) -> bytes:
    """Return a safetensors file with a changed header entry for one tensor."""
    content = safetensors.torch.save(STATE)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["fc.bias"] |= {key: value for key, value in change.items() if key != "name"}
    if "name" in change:
        header[str(change["name"])] = header.pop("fc.bias")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64", "X", 7])
def test_unsupported_types_cause_a_one_line_error(dtype: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(with_header(dtype=dtype))
    with pytest.raises(RunError, match=r"model\.safetensors") as caught:
        convert.read(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_larger_than_its_storage_allocates_no_memory(legacy: bool, tmp_path: Path) -> None:
    huge = dict(STATE)
    huge["fc.bias"] = torch.ones(1).expand(2**40)  # a file can specify a stride of zero
    huge["layer1." + "9" * 5000 + ".x"] = torch.zeros(1)
    (tmp_path / "model.pth").write_bytes(saved(huge, _use_new_zipfile_serialization=not legacy))
    with pytest.raises(RunError, match="matches no supported architecture"):
        convert.read(tmp_path / "model.pth")


def nested(depth: int) -> bytes:
    """Return a pickle of a dictionary whose key takes 2^depth steps to hash."""
    return b"\x80\x02}" + b")" + b"\x85" + b"".join([b"2\x86"] * depth) + b"K\x01s."


@pytest.mark.parametrize(
    "content",
    [
        nested(60),
        b"\x80\x04\x8f(" + nested(60)[3:-4] + b"\x90.",
        # a string that is encoded many times
        b"\x80\x02X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x00"
        + b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
        + b"]q\x03(" + b"h\x01h\x00h\x02\x86R" * 20_000 + b"e.",
        b"\x80\x02c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x06\x00\x00\x00utf-32\x86R.",
        b"\x80\x02c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x04\x00\x00\x00idna\x86R.",
        b"\x80\x02" + b"}" * 2_500_000 + b".",
    ],
    ids=["hash", "set", "encode", "codec", "slow codec", "objects"],
)  # fmt: skip
def test_a_small_pickle_cannot_allocate_much_memory(content: bytes) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):  # some are rejected, and others are harmless
            unpickle(io.BytesIO(content), with_numpy(reject_all))
        assert tracemalloc.get_traced_memory()[1] < 100_000_000  # without limits, tens of gigabytes
    finally:
        tracemalloc.stop()


# Mutations


def with_index(pickled: bytes) -> bytes:
    """Return a checkpoint with another index, in an intact archive."""
    source = zipfile.ZipFile(io.BytesIO(saved(SMALL)))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = pickled if name.endswith("data.pkl") else source.read(name)
            archive.writestr(name, content)
    return target.getvalue()


def index_of(content: bytes) -> bytes:
    archive = zipfile.ZipFile(io.BytesIO(content))
    return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


SMALL = {"state_dict": STATE, "args": argparse.Namespace(lr=0.1), "acc": np.float64(1)}
LEGACY = saved(SMALL, _use_new_zipfile_serialization=False)
SAFETENSORS = safetensors.torch.save(STATE)
VALID_FILES: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "zip": (saved(SMALL), bytes),
    "index": (index_of(saved(SMALL)), with_index),
    "legacy": (LEGACY, bytes),
    "safetensors": (SAFETENSORS, bytes),
    "pickle": (pickle.dumps({"a": [1, "b", 2.5, {3}, (4, b"5")], "b": Unknown()}), bytes),
}
EDGE = 6_000  # the first and last bytes, which contain the structure of a file

mutation = st.tuples(
    st.floats(-1, 1), st.sampled_from(["set", "insert", "delete", "copy"]), st.binary(max_size=9)
)


def error_message(file: Path) -> str:
    """Return the error message for a file, or "". Exceptions of other types propagate."""
    try:
        convert.read(file)
    except Error as error:
        return str(error)
    return ""


def mutated(content: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    result = bytearray(content)
    for progress, operation, new in changes:
        at = int(progress * min(EDGE, len(result))) % max(len(result), 1)
        if operation == "set":
            result[at : at + len(new)] = new
        elif operation == "insert":
            result[at:at] = new
        elif operation == "delete":
            del result[at : at + 4 * len(new)]
        else:
            result[at:at] = result[at : at + 4 * len(new)]
    return bytes(result)


@pytest.mark.parametrize("form", VALID_FILES)
@settings(
    max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(changes=st.lists(mutation, min_size=1, max_size=4))
def test_mutated_files_raise_only_package_errors(
    form: str, tmp_path: Path, changes: list[tuple[float, str, bytes]]
) -> None:
    content, wrap = VALID_FILES[form]
    file = tmp_path / "model.pth"
    file.write_bytes(wrap(mutated(content, changes)))
    assert "\n" not in error_message(file)


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(changes=st.lists(mutation, min_size=1, max_size=3))
def test_mutated_onnx_files_raise_only_package_errors(
    tmp_path: Path, changes: list[tuple[float, str, bytes]]
) -> None:
    (tmp_path / "model.onnx").write_bytes(mutated(onnx_file(), changes))
    assert "\n" not in error_message(tmp_path / "model.onnx")


def test_placeholders_have_no_behavior() -> None:
    made = make_stub("a.b")(1, key=2)
    made.__setstate__({"x": 1})
    made.append(1)
    assert made.state == {"x": 1}
    assert dict(made) == {}
