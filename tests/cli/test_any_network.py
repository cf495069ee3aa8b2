"""Imported, pretrained and exported networks are evaluated and reported in the same way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CLASSES, onnx_file, random_checkpoint
from onnxruntime.quantization import quantize_dynamic
from PIL import Image
from report_fixtures import Page

from resnet56 import RECIPES, cli, export, inference, samples
from resnet56.model import ResNet
from resnet56.runs import pretrained
from resnet56.runs.checkpoint import Checkpoint
from resnet56.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("blank_charts")
Says = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write noise images of three classes: four training and six test images per class."""
    root = tmp_path_factory.mktemp("data") / "noise"
    chance = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 6)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                coarse = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((32, 32), Image.Resampling.NEAREST)
                image.save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one network as a state dict, a hub directory and an ONNX file."""
    root = tmp_path_factory.mktemp("forms")
    checkpoint = random_checkpoint()
    torch.save(dict(checkpoint.model), root / "theirs.pth")
    export.write_hub_directory(checkpoint, root / "hub")
    (root / "net.onnx").write_bytes(onnx_file())
    return {"file": root / "theirs.pth", "hub": root / "hub", "onnx": root / "net.onnx"}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Says:
    """Return a function that runs a failing command and returns its error line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()  # discard the output of earlier commands
        assert cli.main([str(argument) for argument in arguments]) > 0
        shown = capsys.readouterr()
        assert not shown.out
        assert shown.err.startswith("resnet56: ")
        assert shown.err.count("\n") == 1, shown.err
        return shown.err

    return run


CONSTANTS = ["--mean", ".4", ".5", ".6", "--std", ".2", ".25", ".3", "--classes", *CLASSES]


@pytest.mark.usefixtures("quick_evaluation")
def test_an_import_with_data_is_evaluated(
    forms: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "theirs"
    command = ["import", str(forms["file"]), "--out", str(run), "--data", str(data), *CONSTANTS]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{run}\n"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"test accuracy {100 * evaluation['test']['accuracy']:.2f} % on 18" in shown.err
    assert evaluation["weights"] == "imported"
    assert [evaluation[split]["n"] for split in ("test", "train")] == [18, 12]
    assert evaluation["robustness"]["images"] == 18
    # The imported network has the accuracy of the exported files.
    flags = ["--robustness", "0", "--json"]
    assert cli.main(["evaluate", str(forms["hub"]), "--data", str(data), *flags]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert theirs["test"]["accuracy"] == evaluation["test"]["accuracy"]
    # Without --data, the network is evaluated again. Results on other images do not replace these.
    assert cli.main(["evaluate", str(run), "--robustness", "0"]) == 0
    assert cli.main(["evaluate", str(run), "--parity", "fp32,bf16"]) == 0
    kept = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    assert {"evaluation.json", "predictions.npz", "samples.npz", "parity.json"} <= set(kept)
    fewer = Path(shutil.copytree(data, tmp_path / "fewer"))
    (fewer / "test" / CLASSES[0] / "0.png").unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--data", str(fewer), *flags]) == 0
    shown = capsys.readouterr()
    assert "not saved; to save them, import the network again" in shown.err
    assert json.loads(shown.out)["test"]["n"] == 17
    assert kept == {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}


@pytest.mark.usefixtures("quick_evaluation")
def test_the_first_evaluation_of_an_imported_network_is_saved(
    forms: dict[str, Path], data: Path, tmp_path: Path, refused: Says
) -> None:
    run = tmp_path / "theirs"
    assert cli.main(["import", str(forms["file"]), "--out", str(run), *CONSTANTS]) == 0
    weights = {key: tensor.clone() for key, tensor in RunDirectory(run).load().model.items()}
    assert cli.main(["evaluate", str(run), "--data", str(data), "--parity", "fp32,bf16"]) == 0
    assert not (run / "parity.json").exists()
    (tmp_path / "only").mkdir()
    shutil.copytree(data / "test", tmp_path / "only" / "test")
    assert "imported network without a data set, so --data is required" in refused("evaluate", run)
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path / "only")]) == 0
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "train" not in evaluation  # there are no training images
    with np.load(run / "samples.npz") as samples:
        assert len(samples["originals"]) == 3
    assert "no train images" in refused("evaluate", run, "--split", "train")
    after = RunDirectory(run).load().model
    assert all(torch.equal(tensor, after[key]) for key, tensor in weights.items())


@pytest.mark.usefixtures("quick_evaluation")
def test_the_model_is_built_once(
    forms: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Checkpoint] = []

    def restore(checkpoint: Checkpoint, device: torch.device) -> ResNet:
        built.append(checkpoint)
        return inference.restore(checkpoint, device)

    monkeypatch.setattr("resnet56.evaluation.restore", restore)
    run = tmp_path / "theirs"
    command = ["import", str(forms["file"]), "--out", str(run), "--data", str(data), *CONSTANTS]
    assert cli.main(command) == 0
    assert len(built) == 1
    for command in (["--robustness", "1"], ["--parity", "fp32,bf16"]):
        built.clear()
        assert cli.main(["evaluate", str(run), *command]) == 0
        assert len(built) == 1


def test_a_failed_import_leaves_no_files(
    forms: dict[str, Path], data: Path, tmp_path: Path, refused: Says
) -> None:
    command = ["import", forms["hub"], "--out", tmp_path / "run"]
    flags = ["--out", tmp_path / "run", "--prefix", "student"]
    assert "--prefix has no effect" in refused("import", "resnet56", *flags)
    assert "does not exist" in refused(*command, "--data", tmp_path / "none")
    (tmp_path / "other" / "test" / "dog").mkdir(parents=True)
    (tmp_path / "other" / "test" / "dog" / "1.png").write_bytes(
        (data / "test" / CLASSES[0] / "0.png").read_bytes()
    )
    assert "no classes in common" in refused(*command, "--data", tmp_path / "other")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["hub", "onnx"])
def test_robustness_and_speed_are_measured_in_every_format(
    form: str, forms: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(forms[form]), "--data", str(data)]
    assert cli.main([*command, "--robustness", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["robustness"]["images"] == 5
    assert result["speed"]["batch_1"]["ms_per_image"] > 0
    assert result.get("runtime") == ("ONNX Runtime" if form == "onnx" else None)


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.parametrize("form", ["hub", "onnx"])
def test_the_training_images_are_evaluated_on_request(
    form: str, forms: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--robustness", "0", "--split", "train"]
    assert cli.main(["evaluate", str(forms[form]), "--data", str(data), *flags]) == 0
    shown = capsys.readouterr().out
    assert "on the train images" in shown
    assert "12 images" in shown
    assert "severity" not in shown


def test_parity_of_an_onnx_file_runs_this_file(
    forms: dict[str, Path],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(export.OnnxModel, "from_checkpoint")  # exports again
    for sides, names in (
        ("torch,onnx", ["cpu fp32", "ONNX Runtime"]),
        ("fp32,bf16", ["cpu fp32", "cpu bf16"]),
    ):
        command = ["evaluate", str(forms["onnx"]), "--data", str(data), "--parity", sides]
        assert cli.main([*command, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert [result["a"], result["b"]] == names
        assert 0 < result["largest_difference"] < (1e-4 if "onnx" in sides else 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--parity fp32,bf16 --robustness 5", "--parity and --robustness cannot be combined"),
        ("--parity fp32,bf16 --split train", "omit --split"),
        ("--parity fp32,bf16 --precision bf16", "omit --precision"),
        ("--parity cpu,cuda --device cpu", "omit --device"),
        ("--parity fp32", "--parity requires a pair"),
        ("--robustness -1", "--robustness must be at least 0"),
        ("--split validation", "validation images exist only for the data set"),
    ],
)
@pytest.mark.parametrize("form", ["hub", "onnx"])
def test_flags_that_would_be_ignored_are_rejected(
    form: str, flags: str, message: str, forms: dict[str, Path], data: Path, refused: Says
) -> None:
    assert message in refused("evaluate", forms[form], "--data", data, *flags.split())


def test_flags_that_arrays_do_not_support_are_rejected(
    forms: dict[str, Path], tmp_path: Path, refused: Says
) -> None:
    np.save(tmp_path / "x_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(tmp_path / "x_labels.npy", np.array([0, 1, 0]))
    for flags in (["--robustness", "5"], ["--split", "train"], ["--parity", "fp32,bf16"]):
        error = refused("evaluate", forms["hub"], "--data", tmp_path, *flags)
        assert re.search(rf"{flags[0]}\b", error)


@pytest.mark.usefixtures("quick_evaluation")
def test_an_exported_network_keeps_the_test_images_of_its_run(
    forms: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a test directory, a fixed fifth of the images is used for testing.

    Other images may be training images of the exported network.
    """
    folder = shutil.copytree(data / "test", tmp_path / "plain")
    assert cli.main(["evaluate", str(forms["hub"]), "--data", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["n"] == 3


@pytest.fixture(scope="module")
def ours(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on the images."""
    out = tmp_path_factory.mktemp("ours") / "ours"
    flags = ["--arch", "resnet8", "--batch-size", "6", "--epochs", "1", "--device", "cpu"]
    assert cli.main(["train", "quick", "--data", str(data), "--out", str(out), *flags]) == 0
    return out


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.parametrize("format", ["html", "md", "slides"])
def test_a_network_that_is_not_a_run_is_reported(
    format: str,
    forms: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    form = {"html": "onnx", "md": "hub", "slides": "hub"}[format]
    command = ["report", str(forms[form]), "--data", str(data), "--format", format]
    assert cli.main(command) == 0
    name = {"html": "net-report.html", "md": "hub-report.md", "slides": "hub-slides.html"}[format]
    assert capsys.readouterr().out == f"{name}\n"
    text = (tmp_path / name).read_text(encoding="utf-8")
    flags = ["--robustness", "0", "--json"]
    assert cli.main(["evaluate", str(forms[form]), "--data", str(data), *flags]) == 0
    test = json.loads(capsys.readouterr().out)["test"]
    assert f"{100 * test['accuracy']:.2f} %" in text
    if format == "html":
        page = Page(text)
        assert page.by_id["test-accuracy"] == f"{100 * test['accuracy']:.2f} %"
        _, *rows = page.tables["confusion"]
        assert [[int(cell) for cell in row[1:]] for row in rows] == test["confusion_matrix"]
        assert "were evaluated in ONNX Runtime on the CPU" in page.text
        assert "net.onnx contains no recipe and no training curves." in page.text
        assert "Measured on 18 test images" in page.text
        assert "Training accuracy" in page.text
    elif format == "md":
        assert "hub contains no recipe and no training curves." in text
    assert {path.name for path in tmp_path.iterdir()} <= {name, "hub-report-files"}


@pytest.mark.usefixtures("quick_evaluation")
def test_pretrained_weights_are_reported_with_their_recipe(
    ours: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentations = []

    def record(*arguments: Any) -> dict[str, Any]:
        augmentations.append(arguments[-1])
        return samples.augmented_samples(*arguments)

    monkeypatch.setattr("resnet56.evaluation.augmented_samples", record)
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "weights")
    pretrained.save(RunDirectory(ours), "tiny", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "tiny", "--data", str(data)]) == 0
    page = Page((tmp_path / "tiny-report.html").read_text(encoding="utf-8"))
    assert "The pretrained weights were evaluated" in page.text
    assert "includes the recipe of these weights, but not their training curves" in page.text
    assert "batch size 6" in page.text
    assert [augmentation.padding for augmentation in augmentations] == [RECIPES["quick"].padding]
    assert "recipe" in page.ids


def test_other_networks_are_compared_with_a_run_by_a_paired_test(
    ours: Path,
    forms: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "weights")
    pretrained.save(RunDirectory(ours), "tiny", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    names = ["tiny", str(forms["hub"]), str(forms["onnx"]), str(ours)]
    assert cli.main(["compare", *names, "--json", "--out", "page.html"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["groups"]) == 4
    assert [pair["test"] for pair in result["differences"]] == ["McNemar"] * 6
    runs = {group["runs"][0]["run"]: group["runs"][0] for group in result["groups"]}
    evaluation = json.loads((ours / "evaluation.json").read_text())
    assert runs[str(ours)]["test_accuracy"] == evaluation["test"]["accuracy"]
    assert runs[str(forms["hub"])]["test_accuracy"] == runs[str(forms["onnx"])]["test_accuracy"]
    assert runs[str(forms["hub"])]["seed"] is None
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "hub and net.onnx have no recorded recipe" in page
    # The paired test counts the images that only one of the two classifies correctly.
    hub, onnx = (
        [group["runs"][0]["run"] for group in result["groups"]].index(str(forms[form]))
        for form in ("hub", "onnx")
    )
    [pair] = [d for d in result["differences"] if {d["better"], d["other"]} == {hub, onnx}]
    assert (pair["only_first"], pair["only_second"], pair["p_value"]) == (0, 0, 1.0)
    # A report of the same networks, with --data.
    assert cli.main(["report", str(ours), str(forms["hub"]), "--data", str(data)]) == 0
    assert "McNemar" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick_evaluation")
def test_a_report_with_data_evaluates_an_imported_network_once(
    forms: dict[str, Path], data: Path, tmp_path: Path, refused: Says
) -> None:
    run = tmp_path / "theirs"
    assert cli.main(["import", str(forms["hub"]), "--out", str(run)]) == 0
    assert cli.main(["report", str(run)]) == 0
    assert "has not been evaluated" in (run / "report.html").read_text(encoding="utf-8")
    assert cli.main(["report", str(run), "--data", str(data)]) == 0
    assert "test-accuracy" in (run / "report.html").read_text(encoding="utf-8")
    kept = (run / "evaluation.json").read_bytes()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "evaluation.json").read_bytes() == kept
    assert "--data is not used" in refused("report", run, "--data", data)
    assert "--skip-broken is not used" in refused("report", run, "--skip-broken")
    assert "--data is not used" in refused("compare", run, run, "--data", data)


@pytest.mark.usefixtures("quick_evaluation")
def test_unreadable_images_are_skipped_on_request(
    forms: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Says,
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    (broken / "test" / CLASSES[0] / "0.png").write_bytes(b"not an image")
    commands = {
        "import": ["import", forms["hub"], "--out", tmp_path / "run", "--data", broken],
        "report": ["report", forms["hub"], "--data", broken],
        "compare": ["compare", forms["hub"], forms["hub"], "--data", broken],
    }
    for command in commands.values():
        assert "--skip-broken" in refused(*command)
        assert cli.main([*map(str, command), "--skip-broken"]) == 0
        assert "skipped 1 image that cannot be read" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test"]["n"] == 17
    assert "requires --data" in refused(*commands["import"][:2], "--out", "x", "--skip-broken")


@pytest.mark.usefixtures("quick_evaluation")
def test_a_quantized_onnx_file_is_evaluated(
    forms: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another tool changes the weights of an exported file, but not its metadata."""
    file = tmp_path / "int8.onnx"
    quantize_dynamic(forms["onnx"], file)
    assert file.read_bytes() != forms["onnx"].read_bytes()
    results = []
    for path in (file, forms["onnx"]):
        command = ["evaluate", str(path), "--data", str(data), "--robustness", "0", "--json"]
        assert cli.main(command) == 0
        results.append(json.loads(capsys.readouterr().out)["test"])
    assert results[0]["loss"] != results[1]["loss"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=0.3)


def test_a_report_that_cannot_be_written_is_refused_before_the_evaluation(
    forms: dict[str, Path],
    data: Path,
    tmp_path: Path,
    refused: Says,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("resnet56.evaluation.measure")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "report.html"
    message = refused("report", forms["hub"], "--data", data, "--out", out)
    assert f"cannot write to {tmp_path / 'file'}: Not a directory" in message


def test_networks_that_cannot_be_reported_cause_one_line_errors(
    forms: dict[str, Path], data: Path, tmp_path: Path, refused: Says
) -> None:
    none = tmp_path / "none"
    assert "is not a run, so --data is required" in refused("report", forms["hub"])
    assert "is not a run, so --data is required" in refused("compare", forms["hub"], forms["onnx"])
    assert "does not exist" in refused("report", forms["hub"], "--data", none)
    assert "import it first" in refused("report", forms["file"], "--data", data)
    two = (forms["hub"], forms["onnx"], "--data", data, "--format", "slides")
    assert "slides show one run, not 2" in refused("report", *two)
    assert "is neither a run nor" in refused("compare", forms["hub"], none, "--data", data)
