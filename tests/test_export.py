"""Exported models match PyTorch, and invalid exports are rejected."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from networks import CLASSES, random_checkpoint
from PIL import Image
from report_fixtures import evaluation

import resnet56
from resnet56 import backends, cli, export
from resnet56.data.dataset import Dataset
from resnet56.errors import Error, RunError
from resnet56.model import build
from resnet56.runs import pretrained
from resnet56.runs.directory import RunDirectory

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "random_checkpoint"
    RunDirectory(path).save(random_checkpoint(classes=CIFAR10))
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    file = run.parent / "random_checkpoint.onnx"
    assert cli.main(["export", str(run), "--out", str(file)]) == 0
    return file


@pytest.mark.parametrize("arch", ["resnet11-bottleneck", "plain8"])
def test_other_architectures_are_exported(arch: str, tmp_path: Path) -> None:
    export.write_onnx(random_checkpoint(arch), tmp_path / "it.onnx")
    images = np.random.default_rng(9).integers(0, 256, (3, 3, 32, 32), np.uint8)
    logits, maps, features = resnet56.load(tmp_path / "it.onnx").run(images)
    assert logits.shape == (3, 3)
    assert features.shape == (3, 256 if "bottleneck" in arch else 64)
    assert maps.shape == (3, 3, 8, 8)


def test_onnx_matches_pytorch_for_any_batch_size(run: Path, exported: Path) -> None:
    torch_model, onnx_model = resnet56.load(run, device="cpu"), resnet56.load(exported)
    for count in (1, 2, 7):
        images = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), np.uint8)
        outputs = zip(torch_model.run(images), onnx_model.run(images), strict=True)
        for expected, actual in outputs:
            assert actual.dtype == np.float32
            assert np.abs(expected - actual).max() < 1e-4


def test_onnx_has_the_metrics_of_pytorch(run: Path, exported: Path, tiny: Dataset) -> None:
    expected = resnet56.load(run, device="cpu").evaluate(tiny.test)
    actual = resnet56.load(exported).evaluate(tiny.test)
    assert actual["confusion_matrix"] == expected["confusion_matrix"]
    assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_onnx_matches_pytorch_on_cifar10(cifar10: Dataset, run: Path, exported: Path) -> None:
    images = cifar10.test.images[:256].numpy()
    expected = resnet56.load(run, device="cpu").run(images).logits
    actual = resnet56.load(exported).run(images).logits
    assert np.abs(expected - actual).max() < 1e-4
    assert (expected.argmax(1) == actual.argmax(1)).all()
    assert len(set(expected.argmax(1).tolist())) > 1


def test_onnx_files_have_metadata_inputs_and_outputs(exported: Path) -> None:
    proto = onnx.load(exported)
    onnx.checker.check_model(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["classes"]) == list(CIFAR10)
    assert json.loads(metadata["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(metadata["std"]) == [0.2, 0.25, 0.3]
    [graph_input] = proto.graph.input
    assert graph_input.name == "images"
    assert graph_input.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [output.name for output in proto.graph.output] == ["logits", "maps", "features"]


def test_predict_with_onnx_does_not_import_pytorch(exported: Path, tmp_path: Path) -> None:
    Image.effect_noise((70, 50), 60).save(tmp_path / "it.png")
    script = (
        "import sys\n"
        "from resnet56.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit('PyTorch was imported' if 'torch' in sys.modules else code)"
    )
    flags = ["predict", "it.png", "--run", str(exported), "--cam", "maps", "--top", "1"]
    flags += ["--features", "features.npz"]
    completed = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    label = resnet56.load(exported).predict(tmp_path / "it.png")[0].label
    assert completed.stdout.startswith(f"it.png: {label} ")
    assert (tmp_path / "maps" / "it.cam.png").exists()


def test_serve_with_onnx_does_not_import_pytorch(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    Image.effect_noise((70, 50), 60).save(tmp_path / "it.png")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from starlette.testclient import TestClient\n"
        "from resnet56.predict import load\n"
        "from resnet56.serve.app import build_app\n"
        "with TestClient(build_app(load(sys.argv[1]))) as client:\n"
        "    files = {'image': Path(sys.argv[2]).read_bytes()}\n"
        "    response = client.post('/v1/predict', files=files).json()\n"
        "print(response['predictions'][0]['classes'][0]['name'])\n"
        "sys.exit('PyTorch was imported' if 'torch' in sys.modules else 0)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script, str(exported), str(tmp_path / "it.png")],
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip() == resnet56.load(exported).predict(tmp_path / "it.png")[0].label


def test_python_onnx_and_the_command_agree_on_a_photo(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The photo shows Chelsea, a cat from scikit-image that is not in CIFAR-10."""
    data = pytest.importorskip("skimage.data")
    chelsea = data.chelsea()
    Image.fromarray(chelsea).save(tmp_path / "chelsea.png")
    from_python = resnet56.load(run).predict(chelsea, maps=True)[0]
    from_onnx = resnet56.load(exported).predict(tmp_path / "chelsea.png", maps=True)[0]
    assert from_onnx.probabilities == pytest.approx(from_python.probabilities, abs=1e-4)
    assert sum(from_python.probabilities.values()) == pytest.approx(1)
    assert np.abs(from_onnx.map - from_python.map).max() < 1e-3
    capsys.readouterr()
    for model in (run, exported):
        file = str(tmp_path / "chelsea.png")
        assert cli.main(["predict", file, "--run", str(model), "--json", "--top", "10"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["label"] == from_python.label
        assert row["probabilities"] == pytest.approx(from_python.probabilities, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in pretrained.names() if "cifar100" not in name])
def test_pretrained_models_recognize_a_cat(name: str) -> None:
    data = pytest.importorskip("skimage.data")
    assert resnet56.load(name).predict(data.chelsea())[0].label == "cat"


def test_an_inaccurate_export_is_not_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error of 0.001 simulates an inaccurate runtime."""
    original_run = backends.OnnxBackend.run

    def inaccurate_run(self: backends.OnnxBackend, images: backends.UInt8Array) -> backends.Outputs:
        outputs = original_run(self, images)
        return outputs._replace(logits=outputs.logits + np.float32(0.001))

    monkeypatch.setattr(backends.OnnxBackend, "run", inaccurate_run)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "it.onnx")]) == 1
    assert "predicted classes differ for 0 of 256 images" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_check_rejects_the_file_of_another_model(exported: Path) -> None:
    other = random_checkpoint(classes=CIFAR10)
    other.model["fc.weight"].neg_()
    with pytest.raises(Error, match=r"predicted classes differ for [1-9]\d* of 256 images"):
        export.check_onnx(exported.read_bytes(), other)


@pytest.mark.parametrize("module", ["onnxruntime", "onnxscript"])
def test_the_error_about_a_missing_extra_says_what_to_install(
    module: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["export", str(run), "--out", str(run / "x.onnx")]) == 1
    message = capsys.readouterr().err
    assert message.endswith("is not installed; pip install 'resnet56[onnx]'\n")
    assert message.count("\n") == 1


def test_other_files_are_rejected(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(RunError, match=r"junk\.onnx is not a valid ONNX file"):
        resnet56.load(tmp_path / "junk.onnx")
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(RunError, match=r"bare\.onnx has no valid model metadata"):
        resnet56.load(tmp_path / "bare.onnx")
    with pytest.raises(Error, match="runs only on the CPU"):
        resnet56.load(exported, device="cuda")
    with pytest.raises(Error, match="has no PyTorch module"):
        _ = resnet56.load(exported).model


def test_files_with_wrong_outputs_or_metadata_are_rejected(exported: Path, tmp_path: Path) -> None:
    def modified_copy(name: str, **metadata: str) -> Path:
        proto = onnx.load(exported)
        for entry in proto.metadata_props:
            entry.value = metadata.get(entry.key, entry.value)
        if not metadata:
            renamed = {"logits": "scores"}
            proto.graph.output[0].name = "scores"
            for node in proto.graph.node:
                node.output[:] = [renamed.get(output, output) for output in node.output]
                node.input[:] = [renamed.get(name, name) for name in node.input]
        onnx.save(proto, tmp_path / name)
        return tmp_path / name

    with pytest.raises(RunError, match=r"fails on a uint8 batch of shape \(1, 3, 32, 32\)"):
        resnet56.load(modified_copy("outputs.onnx"))
    with pytest.raises(RunError, match="logits and maps for its 2 classes"):
        resnet56.load(modified_copy("classes.onnx", classes='["a", "b"]'))
    with pytest.raises(RunError, match="has no valid model metadata"):
        resnet56.load(modified_copy("deep.onnx", classes="[" * 200_000))


def test_evaluate_compares_pytorch_and_onnx(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    RunDirectory(small).save(random_checkpoint())
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(2):
                path = tmp_path / "data" / split / name / f"{index}.png"
                Image.new("RGB", (32, 32), name).save(path)
    flags = ["--data", str(tmp_path / "data"), "--parity", "torch,onnx", "--device", "cpu"]
    assert cli.main(["evaluate", str(small), *flags, "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert (comparison["a"], comparison["b"]) == ("cpu fp32", "ONNX Runtime")
    assert comparison["changed"] == 0
    assert 0 < comparison["largest_difference"] < 1e-4


def test_a_hub_directory_has_weights_config_and_card(run: Path, tmp_path: Path) -> None:
    result = evaluation(accuracy=0.8517, accuracy_interval=[0.8446, 0.8585])
    (run / "evaluation.json").write_text(json.dumps(result))
    directory = tmp_path / "my-net"
    assert cli.main(["export", str(run), "--format", "hub", "--out", str(directory)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-net"]
    assert {path.name for path in directory.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert config["id2label"]["3"] == "cat"
    assert config["architecture"] == "resnet8"
    model = build(config["architecture"], classes=config["num_classes"])
    model.load_state_dict(safetensors.torch.load_file(directory / "model.safetensors"))
    with safetensors.safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # required by hub libraries
    images = torch.rand(2, 3, 32, 32)
    expected = resnet56.load(run, device="cpu").model
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), expected(images), atol=1e-5)
    card = (directory / "README.md").read_text()
    front_matter = card.split("---\n")[1]
    values = dict(line.split(": ", 1) for line in front_matter.splitlines())
    assert json.loads(values["pipeline_tag"]) == "image-classification"
    assert json.loads(values["model-index"])[0]["results"][0]["metrics"][0]["value"] == 0.8517
    assert "85.17 % (95 % interval 84.46 to 85.85)" in card
    assert cli.main(["export", str(run), "--format", "hub", "--out", str(directory)]) == 1


def test_the_card_of_a_pretrained_model_has_its_accuracy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    copy = RunDirectory(tmp_path / "copy")
    copy.save(RunDirectory(run).load())
    pretrained.save(copy, "bare", pretrained.DIRECTORY)
    copy.write_evaluation(evaluation(accuracy=0.9312, accuracy_interval=[0.9261, 0.936]))
    pretrained.save(copy, "measured", pretrained.DIRECTORY)
    for name, text in (("measured", "93.12 %"), ("bare", "has not been evaluated")):
        assert cli.main(["export", name, "--format", "hub"]) == 0
        assert text in (tmp_path / f"{name}-hub" / "README.md").read_text()
