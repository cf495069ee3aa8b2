"""Test sets stored as .npy files."""

import io
import pickle
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet56.data.arrays import is_benchmark, load_benchmark
from resnet56.errors import DataError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def arrays(directory: Path, **content: np.ndarray) -> Path:
    directory.mkdir()
    for name, array in content.items():
        np.save(directory / f"{name}.npy", array)
    return directory


def test_cifar10_1_is_read_with_its_labels(tmp_path: Path) -> None:
    images = noise(6, 32, 32, 3)
    labels = np.array([0, 1, 2, 9, 8, 7], dtype=np.int32)
    directory = arrays(tmp_path / "v6", v6_data=images, v6_labels=labels)
    assert is_benchmark(directory)
    [(name, split)] = load_benchmark(directory, 10)
    assert name == "v6"
    assert split.labels.tolist() == labels.tolist()
    assert (split.images.permute(0, 2, 3, 1).numpy() == images).all()


def test_cifar10_c_is_split_by_severity(tmp_path: Path) -> None:
    images = np.zeros((50_000, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(50_000) // 10_000
    labels = np.arange(50_000) % 10
    directory = arrays(tmp_path / "c", fog=images, labels=labels)
    for number, (name, split) in enumerate(load_benchmark(directory, 10)):
        assert name == f"fog {number + 1}"
        assert len(split) == 10_000
        assert split.images[:, 0, 0, 0].unique().tolist() == [number]
    assert number == 4


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, np.int64), "shape"),
        (np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, np.int64), "and dtype uint8"),
        (
            np.zeros((2, 32, 32, 3), np.uint8),
            np.zeros(3, np.int64),
            "2 images, but labels.npy has 3 labels",
        ),
        (np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 10]), "0 to 9"),
        (np.zeros((2, 32, 32, 3), np.uint8), np.array([0.5, 1]), "and an integer dtype"),
    ],
)
def test_invalid_test_sets_are_rejected(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    directory = arrays(tmp_path / "bad", x=images, labels=labels)
    with pytest.raises(DataError, match=message):
        list(load_benchmark(directory, 10))


def test_pickled_array_files_are_not_executed(tmp_path: Path) -> None:
    directory = tmp_path / "bad"
    directory.mkdir()
    (directory / "labels.npy").write_bytes(pickle.dumps([1]))
    (directory / "x.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="cannot read"):
        list(load_benchmark(directory, 10))


@pytest.mark.parametrize(
    ("images", "labels", "name"),
    [
        ("x_test", "y_test", "test"),
        ("X_test", "y_test", "test"),
        ("x", "y", ""),
        ("x_data", "x_labels", "x"),
        ("test_images", "test_labels", "test"),
        ("v6_x", "v6_y", "v6"),
        ("fog", "labels", "fog"),
    ],
)
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_common_names_of_pairs_are_recognized(
    tmp_path: Path, images: str, labels: str, name: str, shape: tuple[int, ...]
) -> None:
    pixels = noise(4, 32, 32, 3)
    directory = arrays(
        tmp_path / "k", **{images: pixels, labels: np.arange(4, dtype=np.uint8).reshape(shape)}
    )
    [(found, split)] = load_benchmark(directory, 10)
    assert found == (name or "x")
    assert split.labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels)


def test_an_error_about_missing_labels_lists_the_expected_names(tmp_path: Path) -> None:
    directory = arrays(tmp_path / "k", x_test=noise(4, 32, 32, 3))
    with pytest.raises(DataError, match=r"one of x_test_labels.npy, labels.npy, y_test.npy"):
        list(load_benchmark(directory, 10))
    directory = arrays(tmp_path / "l", labels=np.arange(4))
    with pytest.raises(DataError, match="contains no image arrays"):
        list(load_benchmark(directory, 10))


def serialized(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_arrays_raise_only_data_errors(data: st.DataObject) -> None:
    """Most of the damage is in the header, which stores dtype and shape as Python code."""
    files = {
        "x.npy": serialized(noise(3, 32, 32, 3)),
        "labels.npy": serialized(np.array([0, 1, 2])),
    }
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 5))):
        offset = data.draw(st.integers(0, 140))
        junk = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from(JUNK)))
        content[offset : offset + data.draw(st.integers(0, 3))] = junk
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    with TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("error")
        for file, original in files.items():
            Path(directory, file).write_bytes(bytes(content) if file == name else original)
        try:
            for _, split in load_benchmark(Path(directory), 10):
                assert len(split) == len(split.images)
        except DataError as error:
            assert str(error).isprintable()  # noqa: PT017


JUNK = [b"'", b"(", b"\\d", b"O8", b"-1", b"9" * 30, b"1e9", b"\x00", b"{" * 40, b"True", b"[]"]


def test_file_names_in_errors_are_printable(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows does not allow such names")
    for images in (noise(2, 32, 32, 3), noise(2, 2)):
        directory = tmp_path / f"k{images.ndim}"
        directory.mkdir()
        np.save(directory / "\x1b[2J\n_data.npy", images)
        with pytest.raises(DataError) as caught:
            list(load_benchmark(directory, 10))
        assert str(caught.value).isprintable()
        np.save(directory / "labels.npy", np.array([0, 99]))
        with pytest.raises(DataError) as caught:
            list(load_benchmark(directory, 10))
        assert str(caught.value).isprintable()
