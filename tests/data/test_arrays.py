"""Test sets as .npy files, against arrays made here."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from resnet56.data.arrays import is_benchmark, load_benchmark
from resnet56.errors import DataError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def arrays(folder: Path, **content: np.ndarray) -> Path:
    folder.mkdir()
    for name, array in content.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_cifar10_1_is_read_with_its_own_labels(tmp_path: Path) -> None:
    images = noise(6, 32, 32, 3)
    labels = np.array([0, 1, 2, 9, 8, 7], dtype=np.int32)
    folder = arrays(tmp_path / "v6", v6_data=images, v6_labels=labels)
    assert is_benchmark(folder)
    [(name, split)] = load_benchmark(folder, 10)
    assert name == "v6"
    assert split.labels.tolist() == labels.tolist()
    assert (split.images.permute(0, 2, 3, 1).numpy() == images).all()


def test_cifar10_c_is_read_severity_by_severity(tmp_path: Path) -> None:
    images = np.zeros((50_000, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(50_000) // 10_000
    labels = np.arange(50_000) % 10
    folder = arrays(tmp_path / "c", fog=images, labels=labels)
    for number, (name, split) in enumerate(load_benchmark(folder, 10)):
        assert name == f"fog {number + 1}"
        assert len(split) == 10_000
        assert split.images[:, 0, 0, 0].unique().tolist() == [number]
    assert number == 4


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, np.int64), "shape"),
        (np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, np.int64), "of uint8"),
        (
            np.zeros((2, 32, 32, 3), np.uint8),
            np.zeros(3, np.int64),
            "2 images, and labels.npy 3 labels",
        ),
        (np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 10]), "0 to 9"),
        (np.zeros((2, 32, 32, 3), np.uint8), np.array([0.5, 1]), "of whole numbers"),
    ],
)
def test_arrays_that_are_no_test_set_are_refused(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, says: str
) -> None:
    folder = arrays(tmp_path / "bad", x=images, labels=labels)
    with pytest.raises(DataError, match=says):
        list(load_benchmark(folder, 10))


def test_an_array_file_that_is_a_pickle_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "labels.npy").write_bytes(pickle.dumps([1]))
    (folder / "x.npy").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="cannot read"):
        list(load_benchmark(folder, 10))
