"""Published, modified and damaged CIFAR files, in all versions.

The tests use small data sets and replace the published sizes and checksums with theirs.
"""

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet56.data import cifar
from resnet56.data.dataset import Dataset
from resnet56.data.readers import load_directory
from resnet56.errors import DataError, Error

ROWS = {"cifar10": [20] * 5 + [20], "cifar100": [200, 100]}
DIRECTORIES = [layout.directory for layout in cifar.LAYOUTS]


def records(name: str, file: int) -> np.ndarray:
    """Return the records of one file of the binary version, with equally many images per class."""
    count = ROWS[name][file]
    label_bytes = 1 if name == "cifar10" else 2
    rng = np.random.default_rng(100 * label_bytes + file)
    content = rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
    fine = rng.permutation(count) % (10 if label_bytes == 1 else 100)
    content[:, 0] = fine // 5
    content[:, label_bytes - 1] = fine
    return content


def names_of(name: str) -> tuple[str, ...]:
    return cifar.PUBLISHED[name]


def write(layout: "cifar._Layout", root: Path) -> Path:
    """Write the data set in one version."""
    directory = root / layout.directory
    directory.mkdir(parents=True)
    for number, file in enumerate((*layout.train, layout.test)):
        content = records(layout.name, number)
        pixels = np.ascontiguousarray(content[:, layout.label_bytes :])
        labels = {layout.labels: content[:, layout.label_bytes - 1]}
        if layout.name == "cifar100":
            labels["coarse_labels"] = content[:, 0]
        if layout.file_format == "binary":
            content.tofile(directory / file)
        else:
            lists = {key: value.tolist() for key, value in labels.items()}
            (directory / file).write_bytes(pickle.dumps({"data": pixels, **lists}, 2))
    names = names_of(layout.name)
    if layout.file_format == "binary":
        (directory / layout.meta).write_text("\n".join(names) + "\n")
    else:
        (directory / layout.meta).write_bytes(pickle.dumps({layout.names: list(names)}, 2))
    return directory


@pytest.fixture(scope="module", autouse=True)
def small_data_sets() -> Iterator[None]:
    """Use data sets of 100 to 300 images."""
    published = {
        name: tuple(
            hashlib.sha1(records(name, file).tobytes()).hexdigest() for file in range(len(rows))
        )
        for name, rows in ROWS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "_PUBLISHED", published)
        patch.setattr(cifar, "_read_files", with_small_sizes(cifar._read_files))
        yield


def with_small_sizes(read: object) -> object:
    def read_with_small_sizes(
        layout: object, files: list[Path], total: int, pool: object
    ) -> object:
        rows = ROWS[layout.name]  # type: ignore[attr-defined]
        total = rows[-1] if total == cifar._TEST_SIZE else sum(rows[:-1])
        return read(layout, files, total, pool)  # type: ignore[operator]

    return read_with_small_sizes


@pytest.fixture(scope="module")
def directories(small_data_sets: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("directories")
    return {layout.directory: write(layout, root) for layout in cifar.LAYOUTS}


def copy(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target / directory.name))


def layout_of(directory: Path) -> "cifar._Layout":
    return next(layout for layout in cifar.LAYOUTS if layout.directory == directory.name)


@pytest.mark.parametrize("form", DIRECTORIES)
def test_published_images_are_recognized_in_every_version(
    directories: dict[str, Path], form: str
) -> None:
    loaded = load_directory(directories[form])
    title = loaded.name.replace("cifar", "CIFAR-")
    sizes = f"{len(loaded.train):,} training and {len(loaded.test):,} test images"
    assert loaded.source == f"{title} (official split): {sizes}"
    assert loaded.remarks == ()
    assert loaded.classes == names_of(loaded.name)
    expected = np.concatenate([records(loaded.name, n) for n in range(len(ROWS[loaded.name]))])
    label_bytes = 1 if loaded.name == "cifar10" else 2
    actual = np.concatenate([split.images.numpy() for split in (loaded.train, loaded.test)])
    assert np.array_equal(actual.reshape(-1, 3072), expected[:, label_bytes:])
    labels = np.concatenate([split.labels.numpy() for split in (loaded.train, loaded.test)])
    assert np.array_equal(labels, expected[:, label_bytes - 1])


@pytest.mark.parametrize("form", ["cifar-10-batches-bin", "cifar-100-binary"])
def test_minor_differences_cause_a_remark(
    directories: dict[str, Path], tmp_path: Path, form: str
) -> None:
    directory = copy(directories[form], tmp_path)
    file = directory / layout_of(directory).test
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    loaded = load_directory(directory)
    assert f"(official split, with differences in {file.name}): " in loaded.source
    assert f"differs from the published data set in {file.name}" in loaded.remarks[0]


def test_different_class_names_cause_a_remark(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = copy(directories["cifar-10-batches-bin"], tmp_path)
    (directory / "batches.meta.txt").write_text("\n".join(reversed(cifar.CIFAR10)))
    assert (
        "differs from the published data set in batches.meta.txt"
        in load_directory(directory).remarks[0]
    )


@pytest.mark.parametrize("form", DIRECTORIES)
@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_color_are_rejected_in_every_version(
    directories: dict[str, Path],
    tmp_path: Path,
    form: str,
    value: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the images are missing, as after an incomplete copy, but all labels are present."""
    layout = layout_of(directories[form])
    original = records

    def damaged(name: str, file: int) -> np.ndarray:
        content = original(name, file)
        if file == len(ROWS[name]) - 1:
            content[len(content) // 2 :, layout.label_bytes :] = value
        return content

    monkeypatch.setitem(globals(), "records", damaged)
    directory = write(layout, tmp_path)
    with pytest.raises(DataError, match=r"is not the published data set: \d+ of its \d+ test"):
        load_directory(directory)


@pytest.mark.parametrize("form", DIRECTORIES)
def test_a_wrong_class_count_is_rejected_in_every_version(
    directories: dict[str, Path], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(directories[form])
    original = records

    def damaged(name: str, file: int) -> np.ndarray:
        content = original(name, file)
        labels = content[:, layout.label_bytes - 1]
        labels[0] = (labels[0] + 1) % layout.classes
        return content

    monkeypatch.setitem(globals(), "records", damaged)
    with pytest.raises(DataError, match=r"images have the label .*, expected"):
        load_directory(write(layout, tmp_path))


@pytest.mark.parametrize("form", DIRECTORIES)
def test_damaged_files_raise_only_package_errors(directories: dict[str, Path], form: str) -> None:
    directory = directories[form]
    layout = layout_of(directory)
    files = [layout.train[0], layout.test, layout.meta]

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def damage(data: st.DataObject) -> None:
        with TemporaryDirectory() as root:
            damaged = copy(directory, Path(root))
            file = damaged / data.draw(st.sampled_from(files))
            content = bytearray(file.read_bytes())
            for _ in range(data.draw(st.integers(1, 4))):
                offset = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content) - 1)))
                content[min(offset, len(content) - 1)] = data.draw(st.integers(0, 255))
            if data.draw(st.booleans()):
                del content[data.draw(st.integers(0, len(content) - 1)) :]
            file.write_bytes(content)
            try:
                assert isinstance(load_directory(damaged), Dataset)
            except Error as error:
                assert str(error).isprintable()  # noqa: PT017

    damage()


@pytest.mark.parametrize("name", list(cifar.ARCHIVES))
def test_an_archive_is_unpacked_into_its_own_directory(
    directories: dict[str, Path], tmp_path: Path, name: str
) -> None:
    directory = directories[cifar.ARCHIVES[name]]
    with tarfile.open(tmp_path / name, "w:gz", compresslevel=1) as tar:
        tar.add(directory, directory.name)
    loaded = load_directory(tmp_path / name)
    assert loaded.origin == str((tmp_path / directory.name).resolve())
    shutil.rmtree(tmp_path / directory.name)
    assert load_directory(tmp_path).fingerprint() == loaded.fingerprint()
    (tmp_path / name).write_bytes(b"")
    assert load_directory(tmp_path / name).fingerprint() == loaded.fingerprint()


def test_invalid_archives_raise_one_line_errors(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    for content in (b"", b"\x1f\x8b" + bytes(99), gzip.compress(stream.getvalue())):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match="cannot be unpacked: .*; download it again"):
            load_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "cifar-10-batches-mat/data_batch_1.mat",
            "MATLAB files, which are not supported; use the binary",
        ),
        ("cifar-10-matlab.tar.gz", "MATLAB files, which are not supported"),
        (
            "plain_text/train-00000-of-00001.parquet",
            "Parquet files, which are not supported; save the",
        ),
    ],
)
def test_errors_about_unsupported_formats_suggest_an_alternative(
    tmp_path: Path, file: str, message: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(DataError, match=message):
        load_directory(tmp_path)
