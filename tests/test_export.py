"""A network in other programs gives the answers that it gives here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from networks import CLASSES, lively
from PIL import Image
from report_fixtures import evaluation

import resnet56
from resnet56 import cli, export, predict
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
    path = tmp_path_factory.mktemp("runs") / "lively"
    RunDirectory(path).save(lively(classes=CIFAR10))
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    file = run.parent / "lively.onnx"
    assert cli.main(["export", str(run), "--out", str(file)]) == 0
    return file


@pytest.mark.parametrize("arch", ["resnet11-bottleneck", "plain8"])
def test_bottlenecks_projections_and_plain_networks_are_exported_and_checked(
    arch: str, tmp_path: Path
) -> None:
    export.write_onnx(lively(arch), tmp_path / "it.onnx")
    images = np.random.default_rng(9).integers(0, 256, (3, 3, 32, 32), np.uint8)
    logits, maps = resnet56.load(tmp_path / "it.onnx").run(images)
    assert logits.shape == (3, 3)
    assert maps.shape == (3, 3, 8, 8)


def test_the_file_answers_like_pytorch_for_any_number_of_images(run: Path, exported: Path) -> None:
    ours, theirs = resnet56.load(run, device="cpu"), resnet56.load(exported)
    for count in (1, 2, 7):
        images = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), np.uint8)
        for mine, other in zip(ours.run(images), theirs.run(images), strict=True):
            assert other.dtype == np.float32
            assert np.abs(mine - other).max() < 1e-4


def test_real_images_get_the_same_class_either_way(
    cifar10: Dataset, run: Path, exported: Path
) -> None:
    images = cifar10.test.images[:256].numpy()
    ours, theirs = resnet56.load(run, device="cpu").run(images), resnet56.load(exported).run(images)
    assert np.abs(ours[0] - theirs[0]).max() < 1e-4
    assert (ours[0].argmax(1) == theirs[0].argmax(1)).all()
    assert len(set(ours[0].argmax(1).tolist())) > 1


def test_the_file_says_what_it_takes_and_gives(exported: Path) -> None:
    proto = onnx.load(exported)
    onnx.checker.check_model(proto)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(facts["classes"]) == list(CIFAR10)
    assert json.loads(facts["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(facts["std"]) == [0.2, 0.25, 0.3]
    [taken] = proto.graph.input
    assert taken.name == "images"
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [given.name for given in proto.graph.output] == ["logits", "maps"]


def test_a_file_is_used_without_pytorch(exported: Path, tmp_path: Path) -> None:
    Image.effect_noise((70, 50), 60).save(tmp_path / "it.png")
    script = (
        "import sys\n"
        "from resnet56.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit('PyTorch was imported' if 'torch' in sys.modules else code)"
    )
    flags = ["predict", "it.png", "--run", str(exported), "--cam", "maps", "--top", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    label = resnet56.load(exported).predict(tmp_path / "it.png")[0].label
    assert done.stdout.startswith(f"it.png: {label} ")
    assert (tmp_path / "maps" / "it.cam.png").exists()


def test_a_file_is_served_without_pytorch(exported: Path, tmp_path: Path) -> None:
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
        "    answer = client.post('/v1/predict', files=files).json()\n"
        "print(answer['predictions'][0]['classes'][0]['name'])\n"
        "sys.exit('PyTorch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(exported), str(tmp_path / "it.png")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == resnet56.load(exported).predict(tmp_path / "it.png")[0].label


def test_a_real_photograph_gets_one_answer_through_every_door(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """scikit-image's Chelsea, a cat that is in no CIFAR."""
    data = pytest.importorskip("skimage.data")
    chelsea = data.chelsea()
    Image.fromarray(chelsea).save(tmp_path / "chelsea.png")
    by_python = resnet56.load(run).predict(chelsea, maps=True)[0]
    by_onnx = resnet56.load(exported).predict(tmp_path / "chelsea.png", maps=True)[0]
    assert by_onnx.probabilities == pytest.approx(by_python.probabilities, abs=1e-4)
    assert sum(by_python.probabilities.values()) == pytest.approx(1)
    assert np.abs(by_onnx.map - by_python.map).max() < 1e-3
    capsys.readouterr()
    for network in (run, exported):
        file = str(tmp_path / "chelsea.png")
        assert cli.main(["predict", file, "--run", str(network), "--json", "--top", "10"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["label"] == by_python.label
        assert answer["probabilities"] == pytest.approx(by_python.probabilities, abs=1e-4)


@pytest.mark.parametrize("name", ["resnet56", "resnet56-bottleneck"])
def test_the_shipped_networks_see_a_cat_in_chelsea(name: str) -> None:
    data = pytest.importorskip("skimage.data")
    if name not in pretrained.names():
        pytest.skip(f"{name} does not ship yet")
    assert resnet56.load(name).predict(data.chelsea())[0].label == "cat"


def test_a_file_that_differs_is_not_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if ONNX Runtime rounded coarsely: logits off by 0.001."""
    right = predict.OnnxBackend.run

    def coarse(self: predict.OnnxBackend, images: predict.Bytes) -> tuple[object, object]:
        logits, maps = right(self, images)
        return logits + np.float32(0.001), maps

    monkeypatch.setattr(predict.OnnxBackend, "run", coarse)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "it.onnx")]) == 1
    assert "not the same: 0 of 256 images change their class" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_networks_file_does_not_pass_the_check(exported: Path) -> None:
    other = lively(classes=CIFAR10)
    other.model["fc.weight"].neg_()
    with pytest.raises(Error, match=r"[1-9]\d* of 256 images change their class"):
        export.check(exported.read_bytes(), other)


@pytest.mark.parametrize("module", ["onnxruntime", "onnxscript"])
def test_a_missing_extra_is_one_line_with_the_command(
    module: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["export", str(run), "--out", str(run / "x.onnx")]) == 1
    shown = capsys.readouterr().err
    assert shown.endswith("is not installed; pip install 'resnet56[onnx]'\n")
    assert shown.count("\n") == 1


def test_files_that_are_no_export_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(RunError, match=r"junk\.onnx is no whole ONNX file"):
        resnet56.load(tmp_path / "junk.onnx")
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(RunError, match=r"bare\.onnx does not say what its network is"):
        resnet56.load(tmp_path / "bare.onnx")
    with pytest.raises(Error, match="runs on the CPU"):
        resnet56.load(exported, device="cuda")
    with pytest.raises(Error, match="has no PyTorch module"):
        _ = resnet56.load(exported).model


def test_files_that_say_one_thing_and_do_another_are_refused(
    exported: Path, tmp_path: Path
) -> None:
    def changed(name: str, **metadata: str) -> Path:
        proto = onnx.load(exported)
        for entry in proto.metadata_props:
            entry.value = metadata.get(entry.key, entry.value)
        if not metadata:
            proto.graph.output[0].name = "scores"
            for node in proto.graph.node:
                node.output[:] = ["scores" if one == "logits" else one for one in node.output]
                node.input[:] = ["scores" if one == "logits" else one for one in node.input]
        onnx.save(proto, tmp_path / name)
        return tmp_path / name

    with pytest.raises(RunError, match="does not answer 1 images"):
        resnet56.load(changed("outputs.onnx"))
    with pytest.raises(RunError, match="logits and maps of its 2 classes"):
        resnet56.load(changed("classes.onnx", classes='["a", "b"]'))
    with pytest.raises(RunError, match="does not say what its network is"):
        resnet56.load(changed("deep.onnx", classes="[" * 200_000))


def test_evaluate_compares_pytorch_and_onnx(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    RunDirectory(small).save(lively())
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(2):
                picture = tmp_path / "data" / split / name / f"{index}.png"
                Image.new("RGB", (32, 32), name).save(picture)
    flags = ["--data", str(tmp_path / "data"), "--parity", "torch,onnx", "--device", "cpu"]
    assert cli.main(["evaluate", str(small), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["a"], found["b"]) == ("cpu fp32", "ONNX Runtime")
    assert found["changed"] == 0
    assert 0 < found["largest_difference"] < 1e-4


def test_a_hubs_folder_holds_the_network_and_its_card(run: Path, tmp_path: Path) -> None:
    measured = evaluation(accuracy=0.8517, accuracy_interval=[0.8446, 0.8585])
    (run / "evaluation.json").write_text(json.dumps(measured))
    folder = tmp_path / "my-net"
    assert cli.main(["export", str(run), "--format", "hub", "--out", str(folder)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-net"]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["3"] == "cat"
    assert config["architecture"] == "resnet8"
    model = build(config["architecture"], classes=config["num_classes"])
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # which hubs' libraries insist on
    images = torch.rand(2, 3, 32, 32)
    expected = resnet56.load(run, device="cpu").model
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), expected(images), atol=1e-5)
    card = (folder / "README.md").read_text()
    front = card.split("---\n")[1]
    values = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(values["pipeline_tag"]) == "image-classification"
    assert json.loads(values["model-index"])[0]["results"][0]["metrics"][0]["value"] == 0.8517
    assert "85.17 % (95 % interval 84.46 to 85.85)" in card
    assert cli.main(["export", str(run), "--format", "hub", "--out", str(folder)]) == 1


def test_a_shipped_networks_card_has_its_measurement(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    copy = RunDirectory(tmp_path / "copy")
    copy.save(RunDirectory(run).load())
    pretrained.save(copy, "bare", pretrained.FOLDER)
    copy.write_evaluation(evaluation(accuracy=0.9312, accuracy_interval=[0.9261, 0.936]))
    pretrained.save(copy, "measured", pretrained.FOLDER)
    for name, says in (("measured", "93.12 %"), ("bare", "comes without a measurement")):
        assert cli.main(["export", name, "--format", "hub"]) == 0
        assert says in (tmp_path / f"{name}-hub" / "README.md").read_text()
