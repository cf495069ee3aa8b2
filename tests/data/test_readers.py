"""Readers, compared with hand-written files, NumPy, scikit-learn and Pillow."""

import hashlib
import os
import pickle
import random
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from resnet56.data.dataset import Dataset, channel_statistics, stratified_split
from resnet56.data.images import to_model_input, to_upright_rgb
from resnet56.data.readers import load_data, load_digits, load_directory
from resnet56.errors import DataError, UsageError

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
BIN = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
PY = [name.removesuffix(".bin") for name in BIN]


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_directory(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def batch(seed: int) -> np.ndarray:
    """Return 10,000 random records of the binary version: label, then red, green and blue bytes."""
    records = np.random.default_rng(seed).integers(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] = np.random.default_rng(seed).permutation(10_000) % 10
    return records


def python2_pickle(
    pixels: bytes,
    labels: list[int],
    *,
    shape: tuple[int, int] = (10_000, 3072),
    dtype: bytes = b"u1",
    key: bytes = b"labels",
) -> bytes:
    """Return a batch as Python 2's cPickle writes it, with strings as bytes."""
    return b"".join(
        [
            b"\x80\x02}(U\x04data",
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01" + struct.pack("<cHcHc", b"M", shape[0], b"M", shape[1], b"\x86"),
            b"cnumpy\ndtype\nU" + bytes([len(dtype)]) + dtype + b"K\x00K\x01\x87R",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb",
            b"U" + bytes([len(key)]) + key + b"](",
            b"".join(b"K" + bytes([label]) for label in labels),
            b"eu.",
        ]
    )


def link(source: Path, target: Path) -> Path:
    """Copy a directory with hard links. Unlink a file before writing to it."""
    return Path(shutil.copytree(source, target / source.name, copy_function=os.link))


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


@pytest.fixture(autouse=True)
def remove_files(tmp_path: Path) -> Iterator[None]:
    """Remove the large files of these tests, which pytest would keep."""
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("root") / "cifar-10-batches-bin"
    directory.mkdir()
    for seed, name in enumerate(BIN):
        batch(seed).tofile(directory / name)
    (directory / "batches.meta.txt").write_bytes("\n".join(NAMES[::-1]).encode() + b"\n\n")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write the same images, with a different pickle protocol in each file."""
    directory = tmp_path_factory.mktemp("root") / "cifar-10-batches-py"
    directory.mkdir()
    for seed, name in enumerate(PY):
        records = batch(seed)
        pixels, labels = np.ascontiguousarray(records[:, 1:]), records[:, 0].tolist()
        extra = {"batch_label": name, "filenames": ["a.png"] * 10_000}
        content = {
            0: lambda p=pixels, y=labels: python2_pickle(p.tobytes(), y),
            1: lambda p=pixels, y=labels, e=extra: pickle.dumps({"data": p, "labels": y, **e}, 0),
            2: lambda p=pixels, y=labels: pickle.dumps({"labels": y, "data": p}, 2),
            3: lambda p=pixels, y=labels: pickle.dumps(
                {"data": np.asfortranarray(p), "labels": y}, 3
            ),
            4: lambda p=pixels, y=labels: pickle.dumps({b"data": p, b"labels": y}, 4),
            5: lambda p=pixels, y=labels: pickle.dumps(
                {"data": np.asfortranarray(p), "labels": y}, 5
            ),
        }[seed]()
        (directory / name).write_bytes(content)
    meta = {"label_names": NAMES[::-1], "num_vis": 3072}
    (directory / "batches.meta").write_bytes(pickle.dumps(meta, 2))
    yield directory
    shutil.rmtree(directory)


def small_python_directory(parent: Path) -> Path:
    """Create a directory in which all files are empty. data_batch_1 is read first."""
    directory = parent / "cifar-10-batches-py"
    directory.mkdir(parents=True)
    for name in PY:
        (directory / name).touch()
    return directory


# CIFAR


@pytest.mark.parametrize("inside", [True, False])
def test_binary_batches_are_read_exactly(binary: Path, inside: bool) -> None:
    loaded = load_directory(binary if inside else binary.parent)
    assert (loaded.name, loaded.allow_flip) == ("cifar10", True)
    assert loaded.classes == tuple(NAMES[::-1])
    assert "50,000" in loaded.source
    assert str(binary.parent) not in loaded.source, "users share reports"
    assert loaded.train.images.shape == (50_000, 3, 32, 32)
    assert (loaded.train.images.dtype, loaded.train.labels.dtype) == (torch.uint8, torch.int64)
    assert (len(loaded.train), len(loaded.test)) == (50_000, 10_000)
    for seed in range(6):
        part = loaded.test if seed == 5 else loaded.train
        rows = slice(0, 10_000) if seed == 5 else slice(10_000 * seed, 10_000 * (seed + 1))
        records = batch(seed)
        assert np.array_equal(part.labels[rows].numpy(), records[:, 0])
        assert np.array_equal(part.images[rows].numpy().reshape(10_000, 3072), records[:, 1:])


def test_pickles_of_every_protocol_contain_the_same_data(binary: Path, pickled: Path) -> None:
    assert load_directory(pickled.parent).fingerprint() == load_directory(binary).fingerprint()


def test_missing_class_names_have_a_default(binary: Path, tmp_path: Path) -> None:
    directory = link(binary, tmp_path)
    (directory / "batches.meta.txt").unlink()
    assert load_directory(directory).classes == tuple(NAMES)


def test_a_renamed_directory_is_recognized_by_its_files(binary: Path, tmp_path: Path) -> None:
    assert load_directory(link(binary, tmp_path).rename(tmp_path / "mine")).name == "cifar10"


def test_cifar100_binary_has_fine_labels_and_needs_little_memory(tmp_path: Path) -> None:
    directory = tmp_path / "cifar-100-binary"
    directory.mkdir()
    last = bytes([3, 99]) + bytes(range(256)) * 12
    for name, count in (("train.bin", 50_000), ("test.bin", 10_000)):
        with (directory / name).open("wb") as stream:
            for start in range(0, count, 1000):
                records = np.zeros((1000, 3074), np.uint8)
                numbers = np.arange(start, start + 1000)
                records[:, 0], records[:, 1] = numbers % 20, numbers % 100
                records[:, 2], records[:, 3] = numbers % 256, numbers // 256
                stream.write(records.tobytes())
            stream.seek(-3074, os.SEEK_END)
            stream.write(last)
    names = [f"class_{number}" for number in range(100)]
    assert "fine_label_names.txt is missing" in error_of(directory)
    (directory / "fine_label_names.txt").write_text("\n".join(names))
    tracemalloc.start()
    loaded = load_directory(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # excludes the images, which PyTorch allocates
    assert (loaded.name, loaded.classes) == ("cifar100", tuple(names))
    for split in (loaded.train, loaded.test):
        assert split.labels[[0, -1]].tolist() == [0, 99]
        assert not split.images[:-1, 1:].any()
        assert split.images[300, 0, 0, :2].tolist() == [300 % 256, 1]
        assert bytes(split.images[-1].numpy().tobytes()) == last[2:]


def test_cifar100_python_has_fine_labels(tmp_path: Path) -> None:
    directory = tmp_path / "cifar-100-python"
    directory.mkdir()
    pixels = np.zeros((50_000, 3072), np.uint8)
    pixels[:, 0], pixels[:, 1] = np.arange(50_000) % 256, np.arange(50_000) // 256
    pixels[-1] = 9
    labels = [number % 100 for number in range(50_000)]
    content = {"data": pixels, "fine_labels": labels, "coarse_labels": [1] * 50_000}
    (directory / "train").write_bytes(pickle.dumps(content, 4))
    # NumPy 1 writes arrays like this with protocol 5.
    (directory / "test").write_bytes(
        b"\x80\x05}(\x8c\x04datacnumpy.core.numeric\n_frombuffer\n"
        + b"(B"
        + struct.pack("<I", 10_000 * 3072)
        + pixels[-10_000:].tobytes()
        + b"cnumpy\ndtype\n\x8c\x02u1\x89\x88\x87R(K\x03\x8c\x01|NNNJ\xff\xff\xff\xff"
        + b"J\xff\xff\xff\xffK\x00tbM\x10\x27M\x00\x0c\x86\x8c\x01CtR"
        + b"\x8c\x0bfine_labels]("
        + b"".join(b"K" + bytes([label]) for label in labels[:10_000])
        + b"eu."
    )
    names = [f"class_{number}" for number in range(100)]
    (directory / "meta").write_bytes(
        pickle.dumps({b"fine_label_names": [n.encode() for n in names]})
    )
    loaded = load_directory(directory)
    assert loaded.classes == tuple(names)
    for split in (loaded.train, loaded.test):
        assert split.labels.tolist() == labels[: len(split)]
        assert not split.images[:-1, 1:].any()
        assert split.images[-1].unique().tolist() == [9]


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_a_missing_batch_is_reported(binary: Path, tmp_path: Path, name: str) -> None:
    directory = link(binary, tmp_path)
    (directory / name).unlink()
    assert f"{directory / name} is missing" in error_of(tmp_path)
    for file in BIN:
        (directory / file).unlink(missing_ok=True)
    assert f"{directory / BIN[0]} is missing" in error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 30_729_999, 30_733_073])
def test_a_batch_of_the_wrong_size_is_rejected(binary: Path, tmp_path: Path, size: int) -> None:
    directory = link(binary, tmp_path)
    replace(directory / "data_batch_1.bin", b"")
    os.truncate(directory / "data_batch_1.bin", size)
    message = error_of(tmp_path)
    assert "data_batch_1.bin" in message
    assert f"expected 30,730,000 bytes, found {size:,};" in message


def test_a_label_out_of_range_is_rejected(binary: Path, tmp_path: Path) -> None:
    directory = link(binary, tmp_path)
    records = batch(0)
    records[[9_999, 1_234], 0] = 10
    replace(directory / "data_batch_1.bin", records.tobytes())
    message = error_of(tmp_path)
    assert "data_batch_1.bin: record 1234 (counted from 0) has label 10, expected 0 to 9" in message


@pytest.mark.parametrize("text", [b"", b"a b c d e f g h i", b"a a b c d e f g h i", b"\xff" * 99])
def test_wrong_class_names_are_rejected(binary: Path, tmp_path: Path, text: bytes) -> None:
    directory = link(binary, tmp_path)
    replace(directory / "batches.meta.txt", text)
    assert "batches.meta.txt does not contain 10 class names" in error_of(tmp_path)


def test_wrong_class_names_in_a_pickle_are_rejected(pickled: Path, tmp_path: Path) -> None:
    directory = link(pickled, tmp_path)
    for names in (NAMES[:9], "airplane", [*NAMES[:9], 1], None):
        replace(directory / "batches.meta", pickle.dumps({"label_names": names}))
        assert "batches.meta does not contain 10 class names" in error_of(tmp_path)


def test_an_unreadable_file_raises_a_data_error(
    binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    message = error_of(binary)
    assert message == f"cannot read {binary / 'batches.meta.txt'}: Permission denied"


# Invalid and malicious pickles


class Call:
    """An object that is pickled as a function call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_is_rejected_and_not_executed(
    tmp_path: Path, protocol: int
) -> None:
    directory, flag = small_python_directory(tmp_path), tmp_path / "flag"
    attack = pickle.dumps({"data": Call(os.system, f"touch {flag}")}, protocol)
    (directory / "data_batch_1").write_bytes(attack)
    message = error_of(directory)
    assert not flag.exists()
    assert "data_batch_1 tries to call" in message
    assert f"{os.system.__module__}.system" in message
    assert "nothing was executed" in message
    assert pickle.loads(attack) == {"data": 0}  # the attack works with the standard library
    assert flag.exists()


def test_an_unsafe_pickle_of_class_names_is_rejected(pickled: Path, tmp_path: Path) -> None:
    directory = link(pickled, tmp_path)
    replace(directory / "batches.meta", pickle.dumps(Call(eval, "1/0")))
    assert "batches.meta tries to call 'builtins.eval'" in error_of(directory)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x80\x02K\x01Q.", "external objects"),
        (b"Pname\n.", "external objects"),
        (b"\x80\x02cnumpy\nload\n.", "'numpy.load'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.base\x93.", "'numpy.ndarray.base'"),
        (b"\x80\x04\x8c\x05a\nb\n\xc3\x8c\x01c\x93.", "not a valid pickle"),
        (b"\x80\x04\x8c\x04a\nb\n\x8c\x01c\x93.", r"'a\nb\n.c'"),
        (b"\x80\x02\x82\x01.", "not a valid pickle"),  # the extension registry
        (b"\x80\x05\x97.", "not a valid pickle"),  # an out-of-band buffer
        (b"", "not a valid pickle"),
        (b"\x80\x02}", "not a valid pickle"),
        (b"\x80\xff}.", "not a valid pickle"),
        (b"PK\x03\x04", "not a valid pickle"),
        (b"\x80\x02K\x01.", "does not contain a dictionary"),
        (b"\x80\x02}.", "'data' is not"),
        (b"\x80\x02}U\x04datacnumpy\nndarray\n)\x81s.", "'data' is not"),  # without __init__
        (b"\x80\x02}U\x04datacnumpy\nndarray\ns.", "'data' is not"),  # the class itself
        # These pickles set attributes of allowed names: the array class, dtypes and the encoder.
        (b"\x80\x02cnumpy\nndarray\n}U\x05shapeK\x01sb.", "not a valid pickle"),
        (b"\x80\x02cnumpy\ndtype\nN}\x8c\x04codeK\x01s\x86b.", "not a valid pickle"),
        (b"\x80\x02c_codecs\nencode\nN}\x8c\x07__doc__K\x01s\x86b.", "not a valid pickle"),
    ],
)
def test_a_pickle_that_is_not_a_batch_is_rejected(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    directory = small_python_directory(tmp_path)
    (directory / "data_batch_1").write_bytes(content)
    message = error_of(directory)
    assert "data_batch_1" in message
    assert expected in message


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\x00\x00\x00\x04.",  # memo index 2**26
        b"\x80\x05\x96\x00\x00\x00\x10\x00\x00\x00\x00.",  # a bytearray of 256 MB
        b"\x80\x02T\x00\x00\x00\x10.",  # a string of 256 MB
    ],
)
def test_a_pickle_cannot_allocate_more_than_its_size(tmp_path: Path, content: bytes) -> None:
    directory = small_python_directory(tmp_path)
    (directory / "data_batch_1").write_bytes(content)
    tracemalloc.start()
    assert "not a valid pickle" in error_of(directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


ONES = [1] * 10_000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pixels": bytes(10_000 * 3072 - 1)}, "'data' is not a uint8 array of shape (10000, 3"),
        ({"pixels": b""}, "'data' is not"),
        ({"shape": (3072, 10_000)}, "'data' is not"),
        ({"dtype": b"i1"}, "'data' is not"),
        ({"labels": ONES[1:]}, "10,000 images, but 9,999 labels"),
        ({"labels": [*ONES[1:], 10]}, "record 9999 (counted from 0) has label 10"),
        ({"key": b"label"}, "'labels' is not a list"),
    ],
)
def test_an_invalid_python2_batch_is_rejected(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    directory = small_python_directory(tmp_path)
    valid = {"pixels": bytes(10_000 * 3072), "labels": ONES}
    (directory / "data_batch_1").write_bytes(python2_pickle(**valid | change))
    assert f"data_batch_1: {expected}" in error_of(directory)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": ["1"] * 10_000}, "'labels' is not a list of integers"),
        ({"labels": [*ONES[1:], 10**5000]}, "'labels' is not a list of integers"),
        ({"labels": [True] * 10_000}, "'labels' is not a list of integers"),
        ({"labels": np.ones(10_000, np.uint8)}, "'labels' is not a list"),
        ({"labels": [*ONES[1:], -1]}, "record 9999 (counted from 0) has label -1"),
        ({"data": np.zeros((10_000, 3072), np.float16)}, "'data' is not"),
        ({"data": np.zeros((10_000, 3, 1024), np.uint8)}, "'data' is not"),
        ({"data": bytes(10_000 * 3072)}, "'data' is not"),
    ],
)
def test_an_invalid_batch_is_rejected(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    directory = small_python_directory(tmp_path)
    valid = {"data": np.zeros((10_000, 3072), np.uint8), "labels": ONES}
    (directory / "data_batch_1").write_bytes(pickle.dumps(valid | change, 5))
    assert f"data_batch_1: {expected}" in error_of(directory)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_damaged_pickles_raise_only_data_errors(tmp_path: Path, protocol: int) -> None:
    rng = random.Random(protocol)
    directory = small_python_directory(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5), dtype=np.uint8)
    original = pickle.dumps({"data": pixels, "labels": [1, 2, 3], "x": [{1.5, "y"}]}, protocol)
    for _ in range(150):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        (directory / "data_batch_1").write_bytes(damaged)
        error_of(directory)


# Image directories


def save(file: Path, color: object = "red", size: tuple[int, int] = (4, 4)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)
    return file


def test_images_are_read_from_class_directories(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    save(root / "train" / "dog" / "b.PNG", (1, 2, 3), (9, 5))
    pixels = noise(32, 32, 3)
    Image.fromarray(pixels).save(save(root / "train" / "dog" / "a" / "deep.bmp"))
    save(root / "train" / "cat" / "x.tiff", (7, 8, 9))
    save(root / "test" / "dog" / "y.gif", (10, 10, 10))
    for junk in (".DS_Store", "Thumbs.db", "notes.txt", "._b.png", ".hidden/z.png"):
        file = root / "train" / "dog" / junk
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"junk")
    (root / "train" / ".git").mkdir()
    (root / "train" / "README.md").touch()
    loaded = load_directory(root)
    assert (loaded.name, loaded.classes, loaded.allow_flip) == ("pets", ("cat", "dog"), True)
    assert loaded.train.labels.tolist() == [0, 1, 1]
    assert loaded.train.images[[0, 2], :, 16, 16].tolist() == [[7, 8, 9], [1, 2, 3]]
    assert np.array_equal(loaded.train.images[1].permute(1, 2, 0).numpy(), pixels)
    assert loaded.test.labels.tolist() == [1]
    assert loaded.test.images.shape == (1, 3, 32, 32)
    assert "3 training and 1 test" in loaded.source


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems do not allow such names")
def test_a_class_name_that_is_not_utf_8_is_rejected(tmp_path: Path) -> None:
    for name in (b"cat", b"caf\xe9"):
        save(tmp_path / "train" / os.fsdecode(name) / "x.png")
    expected = r"caf\udce9' is not a valid class name: it is empty, is not Unicode"
    assert expected in error_of(tmp_path)


@pytest.mark.parametrize("suffix", "png jpg jpeg bmp gif webp tif tiff ppm pgm".split())  # noqa: SIM905
def test_every_documented_format_is_read(tmp_path: Path, suffix: str) -> None:
    for directory in ("train/a", "train/b", "test/a"):
        save(tmp_path / directory / f"image.{suffix}", (200, 200, 200))
    image = load_directory(tmp_path).test.images[0].int()
    assert (image - 200).abs().max() <= 3  # JPEG and WebP are lossy


def test_a_stratified_fifth_is_used_for_testing_without_a_test_directory(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / "train" / "many" / f"{index}.png", (index, 0, 0))
    for index in range(5):
        save(tmp_path / "train" / "some" / f"{index}.png", (100 + index, 0, 0))
    loaded = load_directory(tmp_path)
    assert loaded.train.labels.bincount().tolist() == [16, 4]
    assert loaded.test.labels.bincount().tolist() == [4, 1]
    assert "80/20" in loaded.source
    values = [split.images[:, 0, 0, 0].tolist() for split in (loaded.train, loaded.test)]
    assert sorted(values[0] + values[1]) == [*range(20), *range(100, 105)]
    assert load_directory(tmp_path).fingerprint() == loaded.fingerprint()


def test_paths_without_a_data_set_are_rejected(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in error_of(tmp_path / "file")
    message = error_of(tmp_path)
    assert "unknown layout" in message
    for layout in ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "train/<"):
        assert layout in message
    (tmp_path / "empty").mkdir()
    assert "is empty" in error_of(tmp_path / "empty")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        for index in range(2):
            save(tmp_path / "train" / name / f"{index}.png")
    return tmp_path


def test_broken_images_are_reported(pets: Path) -> None:
    original = (pets / "train" / "cat" / "0.png").read_bytes()
    Image.new("RGB", (4, 4)).save(pets / "other.pcx")  # supported by Pillow but not by this package
    for content in (b"", b"junk", original[:45], (pets / "other.pcx").read_bytes()):
        (pets / "train" / "dog" / "1.png").write_bytes(content)
        message = error_of(pets)
        assert str(pets / "train" / "dog" / "1.png") in message
        assert "repair or remove it" in message


@pytest.mark.parametrize("error", [ValueError("two\nlines"), ValueError()])
def test_any_decoder_error_becomes_a_one_line_error(
    pets: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("resnet56.data.images.to_upright_rgb", fail)
    assert ("two lines" if str(error) == "two\nlines" else "ValueError") in error_of(pets)


@pytest.mark.parametrize(
    "pixels", [200, 300]
)  # Pillow warns above its limit and raises above twice its limit
def test_a_decompression_bomb_is_rejected(
    pets: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128)
    save(pets / "train" / "cat" / "bomb.png", size=(1, pixels))
    message = error_of(pets)
    assert "bomb.png" in message
    assert "decompression bomb" in message


def test_invalid_class_directories_are_rejected(pets: Path) -> None:
    (pets / "train" / "empty").mkdir()
    assert f"{pets / 'train' / 'empty'} contains no images" in error_of(pets)
    (pets / "train" / "empty").rmdir()
    (pets / "test").mkdir()
    assert "test contains no class directories" in error_of(pets)
    save(pets / "test" / "fish" / "0.png")
    assert "fish is not a class in train/" in error_of(pets)
    shutil.rmtree(pets / "test")
    (pets / "train" / "dog" / "0.png").unlink()
    assert "dog has only one image, too few" in error_of(pets)
    shutil.rmtree(pets / "train" / "dog")
    assert "at least two class directories, found 1;" in error_of(pets)
    shutil.rmtree(pets / "train" / "cat")
    assert "at least two class directories, found 0;" in error_of(pets)
    (pets / "test").touch()
    save(pets / "train" / "cat" / "0.png")
    save(pets / "train" / "dog" / "0.png")
    assert f"cannot read {pets / 'test'}" in error_of(pets)


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "jpg", "webp", "ppm"])
def test_damaged_images_raise_only_data_errors(pets: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    file = save(pets / "train" / "dog" / f"damaged.{suffix}", size=(8, 8))
    original = file.read_bytes()
    for _ in range(30):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            load_directory(pets)
        except DataError as error:
            assert "damaged" in str(error)  # noqa: PT017


# One image


def to_32x32(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert an image to a model input, as (32, 32, 3)."""
    return to_model_input(to_upright_rgb(image)).transpose(1, 2, 0)


def test_a_32x32_rgb_image_is_unchanged() -> None:
    pixels = noise(32, 32, 3)
    result = to_32x32(Image.fromarray(pixels))
    assert np.array_equal(result, pixels)
    assert result.dtype == np.uint8


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = noise(32, 32, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the stored image is shown at the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(to_32x32(image), np.rot90(pixels, -1))


def test_the_central_square_is_cropped() -> None:
    pixels = noise(32, 100, 3)
    assert np.array_equal(to_32x32(Image.fromarray(pixels)), pixels[:, 34:66])
    assert np.array_equal(
        to_32x32(Image.fromarray(pixels.transpose(1, 0, 2).copy())),
        pixels[:, 34:66].transpose(1, 0, 2),
    )


def test_downsampling_is_antialiased() -> None:
    board = np.indices((320, 320)).sum(axis=0) % 2 * np.uint8(255)
    result = to_32x32(Image.fromarray(board.astype(np.uint8)))
    assert np.abs(result.astype(int) - 127).max() <= 2


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(1)
        assert to_32x32(image)[16, 16].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 100), (51, 224)])
def test_transparent_images_are_composited_on_white(alpha: int, expected: int) -> None:
    for image in (
        Image.new("RGBA", (5, 5), (100, 100, 100, alpha)),
        Image.new("LA", (5, 5), (100, alpha)),
    ):
        assert np.unique(to_32x32(image)).tolist() == [expected]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:, 16:] = 1
    image = Image.fromarray(pixels)
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "p.png", transparency=0)
    with Image.open(tmp_path / "p.png") as opened:
        assert opened.mode == "P"
        result = to_32x32(opened)
    assert result[0, 0].tolist() == [255, 255, 255]
    assert result[0, 31].tolist() == [40, 50, 60]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_16_bit_grayscale_is_scaled(dtype: str) -> None:
    values = np.linspace(0, 65535, 1024).reshape(32, 32).astype(dtype)
    image = Image.frombytes(
        {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype], (32, 32), values.tobytes()
    )
    expected = np.rint(values.astype(float) * 255 / 65535).astype(np.uint8)
    assert np.array_equal(to_32x32(image), np.repeat(expected[:, :, None], 3, axis=2))


def test_a_16_bit_png_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert np.unique(to_32x32(image)).tolist() == [round(40_000 / 257)]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("F", 77.0, [77, 77, 77]),
        ("F", 1e9, [255, 255, 255]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("I", -5, [0, 0, 0]),
        ("I", 2**31 - 1, [255, 255, 255]),
    ],
)
def test_images_of_other_modes_are_converted_to_rgb(
    mode: str, color: object, expected: list[int]
) -> None:
    result = to_32x32(Image.new(mode, (1, 3), color))
    assert result.shape == (32, 32, 3)
    assert np.unique(result.reshape(-1, 3), axis=0).tolist() == [expected]


# Digits


def test_digits_are_upsampled_from_scikit_learn() -> None:
    from sklearn import datasets, model_selection

    loaded = load_digits()
    assert loaded.classes == tuple("0123456789")
    assert (loaded.name, loaded.allow_flip) == ("digits", False)
    assert "80/20" in loaded.source
    digits = datasets.load_digits()
    train, test, train_labels, test_labels = model_selection.train_test_split(
        digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    for split, images, labels in (
        (loaded.train, train, train_labels),
        (loaded.test, test, test_labels),
    ):
        assert split.labels.tolist() == labels.tolist()
        assert split.images.dtype == torch.uint8
        assert (split.images == split.images[:, :1]).all()
        # Averaged to 8x8, the loaded images are slightly blurred originals.
        downsampled = split.images[:, 0].reshape(-1, 8, 4, 8, 4).double().mean(dim=(2, 4)).numpy()
        assert np.abs(downsampled / 255 - images / 16).mean() < 0.06
        assert np.corrcoef(downsampled.ravel(), images.ravel())[0, 1] > 0.99


# By name


def test_a_name_loads_the_data_set_from_the_cache(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESNET56_DATA", str(link(binary, tmp_path).parent))
    loaded = load_data("cifar10")
    assert loaded.fingerprint() == load_directory(binary).fingerprint()
    assert load_data("digits").origin == "digits"


def test_a_path_is_a_string_or_a_path(binary: Path) -> None:
    fingerprints = {load_data(path).fingerprint() for path in (binary, str(binary))}
    assert fingerprints == {load_directory(binary).fingerprint()}


def test_a_directory_with_the_name_of_a_data_set_is_loaded_with_a_remark(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(binary, tmp_path).rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    loaded = load_data("digits")
    assert loaded.name == "cifar10"
    assert str(tmp_path / "digits") in loaded.remarks[0]


def test_an_unknown_name_raises_an_error() -> None:
    expected = "unknown data set 'cifra10'; use digits, cifar10, cifar100"
    with pytest.raises(UsageError, match=expected):
        load_data("cifra10")


# The published CIFAR-10


def test_cifar10_has_the_published_classes(cifar10: Dataset) -> None:
    assert cifar10.classes == tuple(NAMES)
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    assert cifar10.classes[int(cifar10.train.labels[0])] == "frog"
    assert cifar10.classes[int(cifar10.test.labels[0])] == "cat"


def test_cifar10_has_the_well_known_statistics(cifar10: Dataset) -> None:
    mean, std = channel_statistics(cifar10.train.images)
    assert [round(value, 4) for value in mean] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in std] == [0.2470, 0.2435, 0.2616]


def test_cifar10_is_split_evenly(cifar10: Dataset) -> None:
    rest, selected = stratified_split(cifar10.train, 5000)
    assert rest.labels.bincount().tolist() == [4500] * 10
    assert selected.labels.bincount().tolist() == [500] * 10


# SHA-1 of the files of the binary version, from gluon.data.vision.CIFAR10 in Apache MXNet.
SHA1 = [
    "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "67eb016db431130d61cd03c7ad570b013799c88c",
]


def test_cifar10_matches_the_published_checksums(cifar10: Dataset) -> None:
    """Compute the checksums from the loaded images and labels, in the binary format."""
    sums = []
    for split in (cifar10.train, cifar10.test):
        records = np.empty((len(split), 1 + 3072), np.uint8)
        records[:, 0] = split.labels.numpy()
        records[:, 1:] = split.images.numpy().reshape(len(split), 3072)
        for file in np.split(records, len(split) // 10_000):
            sums.append(hashlib.sha1(file.tobytes(), usedforsecurity=False).hexdigest())
    assert sums == SHA1
    assert cifar10.source.startswith("CIFAR-10 (official split): 50,000 training")
    assert cifar10.remarks == ()
