"""Commands read networks in all formats that the package writes, with equal outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import CLASSES, onnx_file, random_checkpoint
from PIL import Image

import resnet56
from resnet56 import cli, export
from resnet56.errors import RunError
from resnet56.runs import pretrained
from resnet56.runs.checkpoint import Checkpoint
from resnet56.runs.directory import RunDirectory
from resnet56.runs.sources import import_model, open_model

FORMATS = ("run", "checkpoint directory", "checkpoint.json", "weights of the run", "hub directory",
         "hub weights", "renamed hub weights", "onnx")  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one network in all formats that the package writes."""
    directory = tmp_path_factory.mktemp("written")
    run = RunDirectory(directory / "run")
    run.save(random_checkpoint())
    export.write_hub_directory(run.load(), directory / "hub")
    (directory / "net.onnx").write_bytes(onnx_file())
    shutil.copy(directory / "hub" / "model.safetensors", directory / "alone.bin")
    return {
        "run": run.path,
        "checkpoint directory": run.checkpoint_file.parent,
        "checkpoint.json": run.checkpoint_file,
        "weights of the run": next(run.checkpoint_file.parent.glob("model-*")),
        "hub directory": directory / "hub",
        "hub weights": directory / "hub" / "model.safetensors",
        "renamed hub weights": directory / "alone.bin",
        "onnx": directory / "net.onnx",
    }


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_outputs(
    form: str, written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = resnet56.load(written["run"], device="cpu")
    loaded = resnet56.load(written[form], device="cpu")
    assert cli.main(["import", str(written[form]), "--out", str(tmp_path / "back")]) == 0
    assert "assuming" not in capsys.readouterr().err
    for config in (loaded, resnet56.load(tmp_path / "back", device="cpu")):
        assert (config.classes, config.mean, config.std) == (
            expected.classes,
            expected.mean,
            expected.std,
        )
        assert np.allclose(config.run(noise(4))[0], expected.run(noise(4))[0], atol=1e-4)


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.parametrize("form", ["hub directory", "hub weights", "weights of the run", "onnx"])
def test_every_format_can_be_evaluated(
    form: str, written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        directory = tmp_path / "data" / "test" / name
        directory.mkdir(parents=True)
        for index in range(3):
            Image.fromarray(noise(9)[index].transpose(1, 2, 0)).save(directory / f"{index}.png")
    flags = ["--data", str(tmp_path / "data"), "--json"]
    assert cli.main(["evaluate", str(written["run"]), *flags]) == 0
    expected = json.loads(capsys.readouterr().out)["test"]
    assert cli.main(["evaluate", str(written[form]), *flags]) == 0
    actual = json.loads(capsys.readouterr().out)["test"]
    assert actual["accuracy"] == expected["accuracy"]
    assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_a_copy_of_pretrained_weights_opens_like_its_name(tmp_path: Path) -> None:
    file = pretrained.DIRECTORY / "resnet56.safetensors"
    by_name, by_file = open_model("resnet56"), open_model(shutil.copy(file, tmp_path / "it"))
    assert by_name.pretrained == "resnet56"
    assert by_file.pretrained is None
    assert by_name.checkpoint.config == by_file.checkpoint.config
    for key, tensor in by_name.checkpoint.model.items():
        assert torch.equal(tensor, by_file.checkpoint.model[key]) or "num_batches" in key


def test_weights_without_declared_classes_must_be_imported(tmp_path: Path) -> None:
    torch.save(dict(random_checkpoint().model), tmp_path / "bare.pth")
    with pytest.raises(RunError, match="its classes, mean, std; import it first: resnet56 i"):
        open_model(tmp_path / "bare.pth")
    with pytest.raises(RunError, match="nowhere is neither a run nor a pretrained model"):
        open_model("nowhere")


def test_the_training_state_of_a_run_is_not_accepted_as_weights(written: dict[str, Path]) -> None:
    file = next(written["checkpoint directory"].glob("training-*"))
    with pytest.raises(RunError, match="does not contain the weights of its run"):
        open_model(file)


def test_flags_override_the_file_with_a_remark(written: dict[str, Path]) -> None:
    for form in ("run", "hub weights", "onnx"):
        names = ("x", "y", "z")
        imported = import_model(written[form], mean=(0.1, 0.2, 0.3), classes=names)
        assert imported.checkpoint.config.mean == (0.1, 0.2, 0.3)
        assert imported.checkpoint.config.classes == names
        assert sum("although" in remark for remark in imported.remarks) == 2


def test_the_config_of_a_hub_directory_declares_constants_and_classes(tmp_path: Path) -> None:
    torch.save(dict(random_checkpoint("resnet8-b").model), tmp_path / "pytorch_model.bin")
    declared = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "label_names": ["a", "b", "c"]}
    for config in (
        {"architecture": "resnet56", "num_classes": 3, "pretrained_cfg": declared},
        {**declared, "label_names": None, "id2label": {"0": "a", "1": "b", "2": "c"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        config = open_model(tmp_path).checkpoint.config
        assert config.arch == "resnet8-b"
        assert config.classes == ("a", "b", "c")
        assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "metadata",
    [
        {"mean": '"text"'}, {"mean": "[1, 2]"}, {"std": "[0, 1, 1]"}, {"std": "[NaN, 1, 1]"},
        {"mean": "[1e300, 0, 0]"}, {"classes": '["a", "a", "b"]'}, {"classes": "[1, 2, 3]"},
        {"classes": "7"}, {"arch": "56"}, {"format": "2"}, {"mean": "[" * 100_000},
    ],
    ids=lambda metadata: next(iter(metadata)),
)  # fmt: skip
def test_invalid_onnx_metadata_causes_a_one_line_error(
    metadata: dict[str, str], written: dict[str, Path], tmp_path: Path
) -> None:
    proto = onnx.load(written["onnx"])
    for entry in proto.metadata_props:
        entry.value = metadata.get(entry.key, entry.value)
    onnx.save(proto, tmp_path / "net.onnx")
    with pytest.raises(RunError, match=r"net\.onnx has no valid model metadata") as caught:
        resnet56.load(tmp_path / "net.onnx")
    assert "\n" not in str(caught.value)


def test_an_onnx_file_with_a_fixed_batch_size_causes_a_one_line_error(
    written: dict[str, Path], tmp_path: Path
) -> None:
    proto = onnx.load(written["onnx"])
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, tmp_path / "net.onnx")
    with pytest.raises(
        RunError, match=r"net\.onnx fails on a uint8 batch of shape \(2, 3, 32, 32\)"
    ):
        resnet56.load(tmp_path / "net.onnx")


def test_loaded_weights_are_contiguous(written: dict[str, Path]) -> None:
    for form in ("run", "hub directory"):
        model = resnet56.load(written[form], device="cpu").model
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        torch.nn.utils.parameters_to_vector(model.parameters())


def test_a_run_with_non_finite_outputs_is_rejected(tmp_path: Path) -> None:
    checkpoint = random_checkpoint()
    weights = {
        k: t * 1e30 if "bn" in k and "weight" in k else t for k, t in checkpoint.model.items()
    }
    RunDirectory(tmp_path).save(Checkpoint(checkpoint.config, weights))
    with pytest.raises(RunError, match="outputs that are not finite"):
        resnet56.load(tmp_path, device="cpu")
