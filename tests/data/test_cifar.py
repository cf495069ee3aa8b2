"""What claims to be CIFAR against what was published, in all its forms, and damaged in all ways.

The sets here are small: the sizes and checksums that the reader knows are replaced by theirs.
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
from resnet56.data.readers import load_folder
from resnet56.errors import DataError, Error

ROWS = {"cifar10": [20] * 5 + [20], "cifar100": [200, 100]}
FOLDERS = [layout.folder for layout in cifar.LAYOUTS]


def records(name: str, file: int) -> np.ndarray:
    """The records of one file of the binary form, every class as often as any other."""
    count = ROWS[name][file]
    ahead = 1 if name == "cifar10" else 2
    rng = np.random.default_rng(100 * ahead + file)
    made = rng.integers(0, 256, (count, ahead + 3072), dtype=np.uint8)
    fine = rng.permutation(count) % (10 if ahead == 1 else 100)
    made[:, 0] = fine // 5
    made[:, ahead - 1] = fine
    return made


def names_of(name: str) -> tuple[str, ...]:
    return cifar.PUBLISHED[name]


def write(layout: "cifar._Layout", root: Path) -> Path:
    """The made set in one form."""
    folder = root / layout.folder
    folder.mkdir(parents=True)
    for number, file in enumerate((*layout.train, layout.test)):
        made = records(layout.name, number)
        pixels = np.ascontiguousarray(made[:, layout.label_bytes :])
        labels = {layout.labels: made[:, layout.label_bytes - 1]}
        if layout.name == "cifar100":
            labels["coarse_labels"] = made[:, 0]
        if layout.form == "binary":
            made.tofile(folder / file)
        else:
            lists = {key: value.tolist() for key, value in labels.items()}
            (folder / file).write_bytes(pickle.dumps({"data": pixels, **lists}, 2))
    names = names_of(layout.name)
    if layout.form == "binary":
        (folder / layout.meta).write_text("\n".join(names) + "\n")
    else:
        (folder / layout.meta).write_bytes(pickle.dumps({layout.names: list(names)}, 2))
    return folder


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Sets of 100 to 300 images."""
    published = {
        name: tuple(
            hashlib.sha1(records(name, file).tobytes()).hexdigest() for file in range(len(rows))
        )
        for name, rows in ROWS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "_PUBLISHED", published)
        patch.setattr(cifar, "_read_files", sized(cifar._read_files))
        yield


def sized(read: object) -> object:
    def read_sized(layout: object, files: list[Path], total: int, pool: object) -> object:
        rows = ROWS[layout.name]  # type: ignore[attr-defined]
        total = rows[-1] if total == cifar._TEST else sum(rows[:-1])
        return read(layout, files, total, pool)  # type: ignore[operator]

    return read_sized


@pytest.fixture(scope="module")
def made(small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {layout.folder: write(layout, root) for layout in cifar.LAYOUTS}


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / folder.name))


def layout_of(folder: Path) -> "cifar._Layout":
    return next(layout for layout in cifar.LAYOUTS if layout.folder == folder.name)


@pytest.mark.parametrize("form", FOLDERS)
def test_every_form_of_the_published_images_is_known_as_such(
    made: dict[str, Path], form: str
) -> None:
    loaded = load_folder(made[form])
    assert loaded.source.endswith("the published split")
    assert loaded.remarks == ()
    assert loaded.classes == names_of(loaded.name)
    whole = np.concatenate([records(loaded.name, n) for n in range(len(ROWS[loaded.name]))])
    ahead = 1 if loaded.name == "cifar10" else 2
    both = np.concatenate([split.images.numpy() for split in (loaded.train, loaded.test)])
    assert np.array_equal(both.reshape(-1, 3072), whole[:, ahead:])
    labels = np.concatenate([split.labels.numpy() for split in (loaded.train, loaded.test)])
    assert np.array_equal(labels, whole[:, ahead - 1])


@pytest.mark.parametrize("form", ["cifar-10-batches-bin", "cifar-100-binary"])
def test_a_few_other_bytes_are_remarked_on(
    made: dict[str, Path], tmp_path: Path, form: str
) -> None:
    folder = copy(made[form], tmp_path)
    file = folder / layout_of(folder).test
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    loaded = load_folder(folder)
    assert loaded.source.endswith(f"but not its bytes in {file.name}")
    assert f"{file.name} differs" in loaded.remarks[0]


def test_other_class_names_are_remarked_on(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(made["cifar-10-batches-bin"], tmp_path)
    (folder / "batches.meta.txt").write_text("\n".join(reversed(cifar.CIFAR10)))
    assert "batches.meta.txt differs" in load_folder(folder).remarks[0]


@pytest.mark.parametrize("form", FOLDERS)
@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_color_are_refused_in_every_form(
    made: dict[str, Path], tmp_path: Path, form: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a file is what a broken copy leaves; here the labels are whole."""
    layout = layout_of(made[form])
    original = records

    def damaged(name: str, file: int) -> np.ndarray:
        content = original(name, file)
        if file == len(ROWS[name]) - 1:
            content[len(content) // 2 :, layout.label_bytes :] = value
        return content

    monkeypatch.setitem(globals(), "records", damaged)
    folder = write(layout, tmp_path)
    with pytest.raises(DataError, match=r"is not the published data set: \d+ of its \d+ test"):
        load_folder(folder)


@pytest.mark.parametrize("form", FOLDERS)
def test_a_class_of_another_count_is_refused_in_every_form(
    made: dict[str, Path], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(made[form])
    original = records

    def damaged(name: str, file: int) -> np.ndarray:
        content = original(name, file)
        labels = content[:, layout.label_bytes - 1]
        labels[0] = (labels[0] + 1) % layout.classes
        return content

    monkeypatch.setitem(globals(), "records", damaged)
    with pytest.raises(DataError, match=r"images have the label .*, expected"):
        load_folder(write(layout, tmp_path))


@pytest.mark.parametrize("form", FOLDERS)
def test_a_damaged_form_raises_nothing_but_our_errors(made: dict[str, Path], form: str) -> None:
    folder = made[form]
    layout = layout_of(folder)
    files = [layout.train[0], layout.test, layout.meta]

    @given(data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def damage(data: st.DataObject) -> None:
        with TemporaryDirectory() as root:
            broken = copy(folder, Path(root))
            file = broken / data.draw(st.sampled_from(files))
            content = bytearray(file.read_bytes())
            for _ in range(data.draw(st.integers(1, 4))):
                where = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content) - 1)))
                content[min(where, len(content) - 1)] = data.draw(st.integers(0, 255))
            if data.draw(st.booleans()):
                del content[data.draw(st.integers(0, len(content) - 1)) :]
            file.write_bytes(content)
            try:
                assert isinstance(load_folder(broken), Dataset)
            except Error as error:
                assert str(error).isprintable()  # noqa: PT017

    damage()


@pytest.mark.parametrize("name", list(cifar.ARCHIVES))
def test_an_archive_is_unpacked_beside_itself(
    made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = made[cifar.ARCHIVES[name]]
    with tarfile.open(tmp_path / name, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    loaded = load_folder(tmp_path / name)
    assert loaded.origin == str((tmp_path / folder.name).resolve())
    shutil.rmtree(tmp_path / folder.name)
    assert load_folder(tmp_path).fingerprint() == loaded.fingerprint()
    (tmp_path / name).write_bytes(b"")
    assert load_folder(tmp_path / name).fingerprint() == loaded.fingerprint()


def test_an_archive_that_is_none_is_one_line(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    for content in (b"", b"\x1f\x8b" + bytes(99), gzip.compress(stream.getvalue())):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match="cannot be unpacked: .*; download it again"):
            load_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (
            "cifar-10-batches-mat/data_batch_1.mat",
            "MATLAB files, which are not read: take the binary",
        ),
        ("cifar-10-matlab.tar.gz", "MATLAB files, which are not read"),
        ("plain_text/train-00000-of-00001.parquet", "Parquet files, which are not read: save the"),
    ],
)
def test_forms_that_are_not_read_name_a_way(tmp_path: Path, file: str, says: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(DataError, match=says):
        load_folder(tmp_path)
