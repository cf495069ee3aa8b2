"""The command `resnet56 predict`."""

import csv
import dataclasses
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from networks import CLASSES, random_checkpoint
from PIL import Image

import resnet56
from resnet56 import cli
from resnet56.cli.tables import show_metrics
from resnet56.data.images import read_image
from resnet56.runs import pretrained
from resnet56.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "random_checkpoint"
    RunDirectory(path).save(random_checkpoint())
    return path


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a directory with three images of different sizes, a truncated one and a text file."""
    directory = tmp_path_factory.mktemp("album")
    generator = np.random.default_rng(0)
    (directory / "nested").mkdir()
    for name, size in (("a.png", (40, 60)), ("c.jpg", (50, 50)), ("nested/a.png", (33, 90))):
        pixels = generator.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(directory / name)
    (directory / "b.png").write_bytes((directory / "a.png").read_bytes()[:900])
    (directory / "notes.txt").write_text("not an image")
    return directory


def test_an_unreadable_image_is_reported_and_the_others_are_classified(
    run: Path, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", "--run", str(run), str(album), "--json"]) == 1
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    names = [str(album / name) for name in ("a.png", "c.jpg", "nested/a.png")]
    assert [row["image"] for row in rows] == names
    for row, prediction in zip(rows, resnet56.load(run).predict(names), strict=True):
        assert row["label"] == prediction.label
        assert row["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
    first, second = output.err.splitlines()
    assert first.startswith(f"resnet56: cannot read {album / 'b.png'}: ")
    assert second == "resnet56: 1 input could not be read"


def test_text_and_csv_output_contain_the_top_classes(
    run: Path, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(album / "a.png"), str(album / "c.jpg")]
    assert cli.main(["predict", "--run", str(run), *images, "--top", "2"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert cli.main(["predict", "--run", str(run), *images, "--top", "2", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["image", "label_1", "probability_1", "label_2", "probability_2"]
    for line, row in zip(text, rows, strict=True):
        best, second = (
            f"{row[f'label_{n}']} {100 * float(row[f'probability_{n}']):.1f} %" for n in (1, 2)
        )
        assert line == f"{row['image']}: {best}, {second}"
        assert row["label_1"] != row["label_2"]
        assert {row["label_1"], row["label_2"]} <= set(CLASSES)


def test_maps_have_the_image_size_and_unique_names(
    run: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in album.rglob("*.png")}
    command = ["predict", "--run", str(run), str(album / "a.png"), str(album / "nested/a.png")]
    for _ in range(2):  # the second call does not classify the maps of the first
        assert cli.main([*command, str(album), "--cam", str(album)]) == 1
    maps = {file.relative_to(album).as_posix() for file in album.rglob("*.cam.png")}
    sizes = {name: read_image(album / name).size for name in maps}
    for name in maps:
        (album / name).unlink()
    assert sizes == {
        "a.cam.png": (60, 40),
        "a-2.cam.png": (90, 33),
        "a-3.cam.png": (60, 40),
        "c.cam.png": (50, 50),
        "nested/a.cam.png": (90, 33),
    }
    assert {file: file.read_bytes() for file in album.rglob("*.png")} == before


def test_logits_and_features_are_written(
    run: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file omits the truncated image of the album."""
    names = [str(album / name) for name in ("a.png", "c.jpg", "nested/a.png")]
    predictor = resnet56.load(run)
    expected = {
        "logits": predictor.logits(names),
        "features": predictor.features(names),
        "images": np.array(names),
        "classes": np.array(CLASSES),
    }
    command = ["predict", "--run", str(run), str(album)]
    first, second = tmp_path / "new" / "logits.npz", tmp_path / "features.npz"
    assert cli.main([*command, "--logits", str(first), "--features", str(second)]) == 1
    both = tmp_path / "both.npz"
    assert cli.main([*command, "--logits", str(both), "--features", str(both)]) == 1
    for file, absent in ((first, {"features"}), (second, {"logits"}), (both, set())):
        with np.load(file, allow_pickle=False) as arrays:
            assert set(arrays) == set(expected) - absent
            for name, array in arrays.items():
                assert array.dtype == expected[name].dtype
                assert (array == expected[name]).all()


def test_a_target_that_cannot_be_written_is_reported_first(
    run: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.npz"
    old.write_bytes(b"old")
    command = ["predict", "--run", str(run), str(album / "b.png"), "--logits", str(old)]
    assert cli.main([*command, "--features", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (f"resnet56: cannot write {tmp_path}: it is a directory; choose a file\n")
    assert cli.main(command) == 1  # no image can be read
    assert old.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in the file system")
def test_an_image_can_be_read_from_a_named_pipe(
    run: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "cat"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        pool.submit(pipe.write_bytes, (album / "a.png").read_bytes())
        assert cli.main(["predict", str(pipe), "--run", str(run), "--cam", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{pipe}: ")
    assert read_image(tmp_path / "cat.cam.png").size == (60, 40)


def test_an_image_can_be_read_from_stdin(
    run: Path, album: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = io.BytesIO((album / "a.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    assert cli.main(["predict", "-", "--run", str(run), "--json"]) == 0
    shown = capsys.readouterr()
    row = json.loads(shown.out)
    assert row["image"] == "-"
    assert row["label"] == resnet56.load(run).predict(album / "a.png")[0].label
    assert shown.err == ""


def test_max_pixels_limits_the_image_size(
    run: Path, album: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS
    )  # restored after the test
    command = ["predict", str(album / "a.png"), "--run", str(run), "--max-pixels"]
    assert cli.main([*command, "100"]) == 1
    assert "more than the 100 allowed" in capsys.readouterr().err
    assert cli.main([*command, "1000000000"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no images given"),
        (["x.png", "--json", "--csv"], 2, "cannot be combined"),
        (["x.png", "--top", "0"], 2, "--top must be at least 1"),
        (["x.png", "--max-pixels", "0"], 2, "--max-pixels must be at least 1"),
        (["x.png", "--run", "nothing"], 1, "nothing is neither a run nor a pretrained model"),
        (["x.png", "--run", "none.onnx"], 1, "cannot read none.onnx"),
    ],
)
def test_a_usage_error_has_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", *arguments]) == code
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_directory_without_images_raises_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", "--run", str(run), str(tmp_path)]) == 1
    assert f"{tmp_path} contains no images" in capsys.readouterr().err


def test_the_name_of_pretrained_weights_is_accepted_instead_of_a_run(
    run: Path,
    album: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`predict` uses resnet56 by default. `evaluate` accepts this name and writes no files."""
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "weights")
    pretrained.save(RunDirectory(run), "resnet56", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", str(album / "a.png"), "--top", "1"]) == 0
    label = resnet56.load(run).predict(album / "a.png")[0].label
    assert capsys.readouterr().out.startswith(f"{album / 'a.png'}: {label} ")

    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (32, 32), name).save(
                    tmp_path / "data" / split / name / f"{index}.png"
                )
    assert cli.main(["evaluate", "resnet56"]) == 2
    assert "--data is required" in capsys.readouterr().err
    assert cli.main(["evaluate", "resnet56", "--data", "data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["n"] == 6
    parity = ["evaluate", "resnet56", "--data", "data", "--parity", "fp32,bf16", "--device", "cpu"]
    assert cli.main(parity) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "weights"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_control_characters_in_file_names_are_escaped(
    run: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (b"a\nb.png", b"not utf-8 \xff.png", b"\x1b[2J.png")
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes((album / "a.png").read_bytes())
    (tmp_path / "\x1b[2J broken.png").write_bytes(b"not an image")
    for flags in ([], ["--json"], ["--csv"]):
        assert cli.main(["predict", "--run", str(run), str(tmp_path), *flags]) == 1
        output = capsys.readouterr()
        assert len(output.err.splitlines()) == 2
        assert "\x1b" not in output.err
        if "--csv" in flags:  # CSV quotes the names
            assert len(list(csv.DictReader(io.StringIO(output.out)))) == 3
        else:
            assert len(output.out.splitlines()) == 3
            assert "\x1b" not in output.out


def test_control_characters_in_class_names_are_escaped(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class names can come from an untrusted file."""
    evil = "a\nb.png: cat 99 %\x1b[2J"
    checkpoint = random_checkpoint()
    names = tuple(f"{evil}{number}" for number in range(len(CLASSES)))
    config = dataclasses.replace(checkpoint.config, classes=names)
    RunDirectory(tmp_path / "run").save(dataclasses.replace(checkpoint, config=config))
    assert cli.main(["predict", "--run", str(tmp_path / "run"), str(album / "a.png")]) == 0
    pair = {"count": 1, "true": evil, "predicted": evil}
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    metrics = {"accuracy": 1.0, "accuracy_interval": (0.9, 1.0), "top2": 1.0, "top3": 1.0}
    metrics |= {"loss": 0.1, "n": 1, "per_class": {evil: row}, "most_confused": [pair]}
    metrics |= {"calibration": {"ece": 0.1, "brier": 0.1}, "macro": row, "weighted": row}
    show_metrics(metrics, "title")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\nb.png" not in printed
    assert printed.count(r"\x1b[2J") >= 3 + 3
