"""Checkpoints from other projects become runs with equal outputs."""

import argparse
import io
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import randomize
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import resnet56
from resnet56 import cli
from resnet56.data.class_names import CIFAR10, CIFAR100
from resnet56.errors import Error, RunError, UsageError
from resnet56.model import build
from resnet56.runs import convert
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PadBoth(nn.Module):
    """Shortcut A of akamaster: every second pixel, with zero channels before and after."""

    def forward(self, x: Tensor) -> Tensor:
        quarter = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))


class Block(nn.Module):
    """A residual block with the names that the layouts share."""

    def __init__(self, channels: int, width: int, stride: int, layout: str) -> None:
        super().__init__()
        bottleneck = layout == "torchvision"
        channels_out = width * (4 if bottleneck else 1)
        sizes = [(channels, width, 1 if bottleneck else 3)]
        sizes += (
            [(width, width, 3), (width, channels_out, 1)] if bottleneck else [(width, width, 3)]
        )
        self.layers = len(sizes)
        strided = 2 if bottleneck else 1  # the layer with the stride
        for number, (a, b, side) in enumerate(sizes, start=1):
            step = stride if number == strided else 1
            setattr(self, f"conv{number}", nn.Conv2d(a, b, side, step, side // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(b))
        changes_shape = stride != 1 or channels != channels_out
        if layout == "akamaster":
            self.shortcut = PadBoth() if changes_shape else nn.Sequential()
        elif changes_shape:
            projection = nn.Conv2d(channels, channels_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number in range(1, self.layers + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            out = F.relu(out) if number < self.layers else out
        for name in ("shortcut", "downsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return F.relu(out + x)


class ExternalResNet(nn.Module):
    """A network from another project, with its own names and forward pass."""

    def __init__(self, layout: str, blocks: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, width in ((1, 16), (2, 32), (3, 64)):
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                layer.append(Block(channels, width, stride, layout))
                channels = width * (4 if layout == "torchvision" else 1)
            setattr(self, f"layer{stage}", layer)
        self.classifier = "linear" if layout == "akamaster" else "fc"
        setattr(self, self.classifier, nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = getattr(self, self.classifier)(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def random_external(layout: str, **options: Any) -> ExternalResNet:
    torch.manual_seed(0)
    model = ExternalResNet(layout, **options).eval()
    randomize(model, getattr(model, model.classifier))
    return model


def has_equal_outputs(model: nn.Module, run: Path) -> bool:
    imported = resnet56.load(run, device="cpu").model
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual, expected = imported(x), model(x)
    assert expected.std() > 0.1
    return torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "blocks", "arch", "prefix", "wrapping"),
    [
        ("akamaster", 1, "resnet8", "module.", "state_dict"),
        ("akamaster", 2, "resnet14", "", None),
        ("chenyaofo", 1, "resnet8-b", "", None),
        ("chenyaofo", 2, "resnet14-b", "module._orig_mod.", "state_dict_ema"),
        ("torchvision", 1, "resnet11-bottleneck", "_orig_mod.", "model"),
        ("torchvision", 2, "resnet20-bottleneck", "", "model_state_dict"),
        ("chenyaofo", 1, "resnet8-b", "_orig_mod.module.", "net"),
    ],
)
def test_every_layout_gives_equal_outputs(
    layout: str, blocks: int, arch: str, prefix: str, wrapping: str | None, tmp_path: Path
) -> None:
    model = random_external(layout, blocks=blocks)
    state = OrderedDict((prefix + key, tensor) for key, tensor in model.state_dict().items())
    content = {wrapping: state, "best_prec1": 93.39, "epoch": 7} if wrapping else state
    torch.save(content, tmp_path / "checkpoint.th")
    command = ["import", str(tmp_path / "checkpoint.th"), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--arch", arch]) == 0
    assert has_equal_outputs(model, tmp_path / "run")
    # The architecture is recognized without --arch.
    assert convert.read(tmp_path / "checkpoint.th").checkpoint.config.arch == arch


def test_ema_weights_are_preferred(tmp_path: Path) -> None:
    model = random_external("chenyaofo")
    raw = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    both = {
        "state_dict": raw,
        "state_dict_ema": {f"module.{k}": t for k, t in model.state_dict().items()}
        | {"n_averaged": torch.tensor(3)},
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(both, tmp_path / "both.pth")
    assert cli.main(["import", str(tmp_path / "both.pth"), "--out", str(tmp_path / "run")]) == 0
    assert has_equal_outputs(model, tmp_path / "run")


@pytest.mark.parametrize("form", ["half", "safetensors", "legacy", "no counters", "own layout"])
def test_state_dicts_are_read_in_every_format(form: str, tmp_path: Path) -> None:
    model: nn.Module = random_external("chenyaofo")
    if form == "own layout":
        model = build("resnet8-b", seed=1).eval()
        randomize(model, model.fc)
    state = dict(model.state_dict())
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "half":
        state = {key: t.half() if t.is_floating_point() else t for key, t in state.items()}
        model.load_state_dict(state)  # round the weights of the reference as well
    if form == "no counters":
        state = {key: t for key, t in state.items() if "num_batches" not in key}
    if form == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form != "legacy")
    assert cli.main(["import", str(file), "--out", str(tmp_path / "run")]) == 0
    assert has_equal_outputs(model, tmp_path / "run")
    parameters = resnet56.load(tmp_path / "run", device="cpu").model.parameters()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_a_plain_network_requires_arch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("plain8", seed=1).eval()
    randomize(model, model.fc)
    file = tmp_path / "plain.pth"
    torch.save(model.state_dict(), file)
    assert cli.main(["import", str(file), "--out", str(tmp_path / "guessed")]) == 0
    assert (
        "assuming resnet8; for plain8, whose tensors have the same shapes"
        in capsys.readouterr().err
    )
    assert not has_equal_outputs(model, tmp_path / "guessed")
    command = ["import", str(file), "--out", str(tmp_path / "named"), "--arch", "plain8"]
    assert cli.main(command) == 0
    assert "assuming resnet8" not in capsys.readouterr().err
    assert has_equal_outputs(model, tmp_path / "named")


@pytest.mark.parametrize("arch", ["plain8", "resnet8-b"])
def test_an_exported_network_declares_its_metadata(arch: str, tmp_path: Path) -> None:
    model = build(arch, classes=3).eval()
    randomize(model, model.fc)
    config = ModelConfig(arch, ("a", "b", "c"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    run = RunDirectory(tmp_path / "run")
    run.save(Checkpoint(config, model.state_dict()))
    hub = tmp_path / "hub"
    assert cli.main(["export", str(run.path), "--format", "hub", "--out", str(hub)]) == 0
    command = ["import", str(hub / "model.safetensors"), "--out", str(tmp_path / "again")]
    assert cli.main(command) == 0
    assert RunDirectory(tmp_path / "again").load().config == config
    assert has_equal_outputs(model, tmp_path / "again")
    file = hub / "model.safetensors"
    overridden = convert.read(file, mean=(0.7, 0.7, 0.7)).checkpoint.config
    assert (overridden.mean, overridden.std) == ((0.7, 0.7, 0.7), config.std)


def test_default_constants_match_those_of_the_authors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layout in ("akamaster", "chenyaofo"):
        torch.save(random_external(layout).state_dict(), tmp_path / f"{layout}.pth")
    akamaster = convert.read(tmp_path / "akamaster.pth").checkpoint.config
    assert (akamaster.mean, akamaster.std) == IMAGENET
    assert akamaster.classes == CIFAR10
    chenyaofo = convert.read(tmp_path / "chenyaofo.pth").checkpoint.config
    assert chenyaofo.std == (0.2023, 0.1994, 0.2010)
    flags = ["--mean", ".1", ".2", ".3", "--std", ".4", ".5", ".6"]
    run = tmp_path / "run"
    assert cli.main(["import", str(tmp_path / "akamaster.pth"), "--out", str(run), *flags]) == 0
    assert "ImageNet" not in capsys.readouterr().err
    head = json.loads((run / "checkpoint" / "checkpoint.json").read_text())["config"]
    assert (head["mean"], head["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    command = ["import", str(tmp_path / "akamaster.pth"), "--out", str(tmp_path / "b")]
    assert cli.main(command) == 0
    assert "(of ImageNet" in capsys.readouterr().err


def test_class_names_are_read_from_the_flag_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "three.pth"
    torch.save(random_external("chenyaofo", classes=3).state_dict(), file)
    command = ["import", str(file), "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    names = tmp_path / "names.txt"
    names.write_text("a\nb b\nc\n")
    assert cli.main([*command, "--out", str(tmp_path / "1"), "--classes", "x", "y", "z"]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "2"), "--classes", str(names)]) == 0
    assert resnet56.load(tmp_path / "1").classes == ("x", "y", "z")
    assert resnet56.load(tmp_path / "2").classes == ("a", "b b", "c")
    with pytest.raises(UsageError, match="3 classes requires mean and std"):
        convert.read(file)
    ones = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    with pytest.raises(UsageError, match="names of the 3 classes are unknown; set classes"):
        convert.read(file, **ones)
    with pytest.raises(UsageError, match="2 different names, but the model has 3 outputs"):
        convert.read(file, classes=("a", "b"), **ones)


@pytest.mark.parametrize("wrong", [{"std": "nan"}, {"std": "0"}, {"mean": "inf"}])
def test_invalid_constants_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, str]
) -> None:
    file = tmp_path / "any.pth"
    torch.save(random_external("chenyaofo").state_dict(), file)
    given = {"mean": "0.5", "std": "0.2"} | wrong
    flags = [word for name, value in given.items() for word in (f"--{name}", ".5", value, ".5")]
    assert cli.main(["import", str(file), "--out", str(tmp_path / "run"), *flags]) == 2
    assert re.fullmatch(
        r"resnet56: --(mean|std)\b.* (numbers|positive)\b.*\n", capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_a_mismatch_names_the_tensors_and_the_matching_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_external("chenyaofo").state_dict()
    torch.save(state, tmp_path / "model.pth")
    command = ["import", str(tmp_path / "model.pth"), "--out", str(tmp_path / "run"), "--arch"]
    assert cli.main([*command, "resnet8"]) == 1
    message = capsys.readouterr().err
    assert "unexpected (stage2.0.shortcut.0.weight" in message
    assert message.endswith("it matches --arch resnet8-b\n")
    assert cli.main([*command, "resnet14-b"]) == 1
    assert "missing (stage1.1.conv1.weight" in capsys.readouterr().err
    state["conv1.weight"] = torch.zeros(64, 3, 7, 7)  # an ImageNet stem
    torch.save(state, tmp_path / "model.pth")
    assert cli.main([*command, "resnet8-b"]) == 1
    assert "conv1.weight is 64x3x7x7, not 16x3x3x3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    state["layer1.99999999.x"] = torch.zeros(1)  # the network of this depth must not be built
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(RunError, match="matches no supported architecture"):
        convert.read(tmp_path / "model.pth")


class Bomb:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo boom > {self.file}",)


@pytest.mark.parametrize("form", ["zip", "legacy", *range(6)])
def test_a_pickle_that_could_run_code_is_rejected(form: str | int, tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": Bomb(marker)}
    if isinstance(form, int):
        file.write_bytes(pickle.dumps({"state_dict": Bomb(marker)}, protocol=form))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(RunError, match="could run code, so the file was not loaded") as caught:
        convert.read(file)
    assert "\n" not in str(caught.value)
    # The message does not suggest bypassing the check.
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()
    pickle.load(io.BytesIO(pickle.dumps(Bomb(marker))))  # pickle.load runs the code
    assert marker.exists()


def test_an_invalid_checkpoint_causes_a_one_line_error(tmp_path: Path) -> None:
    valid = io.BytesIO()
    torch.save(random_external("chenyaofo").state_dict(), valid)
    contents = {
        "empty.pth": b"",
        "text.pth": b"not a checkpoint",
        "truncated.pth": valid.getvalue()[:3000],
        "junk.safetensors": b"junk",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match=name) as caught:
            convert.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match=r"cannot read .*none\.pth"):
        convert.read(tmp_path / "none.pth")
    for other, message in (({"epoch": 3}, "its keys are: epoch"), (torch.zeros(3), "a tensor")):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(RunError, match=message):
            convert.read(tmp_path / "other.pth")
    state = random_external("chenyaofo").state_dict()
    state["fc.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(Error, match="fc.bias has values that are not finite"):
        convert.read(tmp_path / "nan.pth")


def test_a_self_referencing_dictionary_is_rejected(tmp_path: Path) -> None:
    ring: dict[str, Any] = {"epoch\n1": 3}
    ring["state_dict"] = ring
    torch.save(ring, tmp_path / "ring.pth")
    with pytest.raises(RunError, match="its keys are: epoch 1, state_dict$"):
        convert.read(tmp_path / "ring.pth")


@pytest.mark.parametrize(
    ("convert_tensor", "message"),
    [
        (lambda tensor: tensor.to("meta"), "complex or meta tensors: fc.weight"),
        (lambda tensor: tensor.to_sparse(), "complex or meta tensors: fc.weight"),
        (lambda tensor: tensor.to(torch.complex64), "complex or meta tensors: fc.weight"),
        (lambda tensor: tensor.to(torch.int8), "torch.int8; expected a floating-point dtype"),
    ],
    ids=["meta", "sparse", "complex", "integers"],
)
def test_unsupported_tensors_cause_a_one_line_error(
    convert_tensor: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    state = random_external("chenyaofo").state_dict()
    state["fc.weight"] = convert_tensor(state["fc.weight"])
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(RunError, match=message):
        convert.read(tmp_path / "other.pth")


def test_an_imported_run_can_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(random_external("akamaster", classes=2).state_dict(), tmp_path / "model.th")
    flags = ["--classes", "blue", "red", "--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2"]
    run = tmp_path / "run"
    assert cli.main(["import", str(tmp_path / "model.th"), "--out", str(run), *flags]) == 0
    for split in ("train", "test"):
        for name in ("blue", "red"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(3):
                picture = Image.new("RGB", (32, 32), name)
                picture.save(tmp_path / "data" / split / name / f"{index}.png")
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path / "data"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["test"]
    labels = np.array([0, 0, 0, 1, 1, 1])
    colors = [Image.new("RGB", (32, 32), name) for name in ("blue", "red")]
    seen = [resnet56.load(run).predict(color)[0].label for color in colors]
    hits = sum(seen[label] == ("blue", "red")[label] for label in labels)
    assert metrics["accuracy"] == hits / 6


STATE = build("resnet8-b", seed=4).state_dict()


def convert_content(content: object, tmp_path: Path, **options: Any) -> convert.ImportedModel:
    torch.save(content, tmp_path / "model.pth")
    return convert.read(tmp_path / "model.pth", **options)


def has_weights(imported: convert.ImportedModel, state: dict[str, Tensor]) -> bool:
    model = imported.checkpoint.model
    return all(torch.equal(model[key], state[key]) for key in state if "num_batches" not in key)


@pytest.mark.parametrize("path", [(), ("state_dict",), ("a", "b", "c"), ("checkpoint", "model")])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.net.0.", "x._orig_mod."])
def test_a_network_is_found_under_any_prefix(
    prefix: str, path: tuple[str, ...], tmp_path: Path
) -> None:
    content: dict[str, Any] = {prefix + key: tensor for key, tensor in STATE.items()}
    content["criterion.weight"] = torch.ones(10)
    for key in reversed(path):
        content = {key: content, "epoch": 3}
    result = convert_content(content, tmp_path)
    assert has_weights(result, STATE)
    assert any("criterion.weight" in remark for remark in result.remarks)


def test_unknown_tensors_of_the_network_are_not_ignored(tmp_path: Path) -> None:
    for key in ("stage1.0.se.weight", "attention.weight", "bn2.weight"):
        with pytest.raises(RunError, match=f"1 unexpected .{key}"):
            convert_content({**STATE, key: torch.ones(3)}, tmp_path)


@pytest.mark.parametrize(
    "name", ["model_ema", "ema", "ema_state_dict", "state_dict_ema", "swa_model", "modelEMA",
             "averaged_model"]
)  # fmt: skip
def test_ema_weights_are_recognized_by_their_name(name: str, tmp_path: Path) -> None:
    other = build("resnet8-b", seed=5).state_dict()
    inside = {f"{name}.module.{key}": tensor for key, tensor in STATE.items()}
    inside |= {f"model.{key}": tensor for key, tensor in other.items()}
    for content in (
        {"model": other, name: STATE},
        {name: STATE, "model": other},
        {"state_dict": inside},
    ):
        result = convert_content(content, tmp_path)
        assert has_weights(result, STATE)
        assert any("EMA weights" in remark for remark in result.remarks)


def test_the_averaged_model_of_pytorch_is_recognized_by_its_counter(tmp_path: Path) -> None:
    other = build("resnet8-b", seed=5).state_dict()
    averaged = {f"second.module.{key}": tensor for key, tensor in STATE.items()}
    averaged["second.n_averaged"] = torch.tensor(3)
    first = {f"first.{key}": tensor for key, tensor in other.items()}
    assert has_weights(convert_content({**first, **averaged}, tmp_path), STATE)


def test_a_prefix_selects_one_of_several_networks(tmp_path: Path) -> None:
    other = build("resnet8-b", seed=5).state_dict()
    both = {"student": other, "nets": {"teacher": STATE}}
    with pytest.raises(RunError, match=r"2 models .student, nets\.teacher.; .*--prefix"):
        convert_content(both, tmp_path)
    assert has_weights(convert_content(both, tmp_path, prefix="nets"), STATE)
    assert has_weights(convert_content(both, tmp_path, prefix="student."), other)
    with pytest.raises(UsageError, match='prefix="x" is not in'):
        convert_content(both, tmp_path, prefix="x")
    same_twice = {"model": STATE, "state_dict": STATE}
    assert has_weights(convert_content(same_twice, tmp_path), STATE)


def one_based(form: str) -> Callable[[re.Match[str]], str]:
    return lambda match: form.format(match[1], int(match[2]) + 1)


# Rules that convert the names of this package to those of other layouts.
RULES: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "osmr": ("resnet14-b", [
        (r"^stage(\d)\.(\d+)\.", one_based("features.stage{}.unit{}.")),
        (r"\.conv(\d)\.", r".body.conv\1.conv."), (r"\.bn(\d)\.", r".body.conv\1.bn."),
        (r"shortcut\.0\.", "identity_conv.conv."), (r"shortcut\.1\.", "identity_conv.bn."),
        (r"^conv1\.", "features.init_block.conv."), (r"^bn1\.", "features.init_block.bn."),
        (r"^fc\.", "output."),
    ]),
    "hysts": ("resnet14-b", [
        (r"^stage(\d)\.(\d+)\.", one_based("stage{}.block{}.")),
        (r"shortcut\.0\.", "shortcut.conv."), (r"shortcut\.1\.", "shortcut.bn."),
        (r"^conv1\.", "conv."), (r"^bn1\.", "bn."),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("layout", RULES)
def test_the_names_of_other_projects_are_recognized(layout: str, tmp_path: Path) -> None:
    arch, rules = RULES[layout]
    ours = build(arch, seed=6).state_dict()
    theirs = {}
    for key, tensor in ours.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        theirs[key] = tensor
    assert not theirs.keys() & {"conv1.weight", "bn1.weight"}
    result = convert_content({"state_dict": theirs}, tmp_path)
    assert result.checkpoint.config.arch == arch
    assert has_weights(result, ours)


class PadAfter(nn.Module):
    """Shortcut A of D-X-Y: all zero channels are at the end."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2]
        return torch.cat((x, torch.zeros_like(x)), dim=1)


def test_padding_channels_only_at_the_end_gives_equal_outputs(tmp_path: Path) -> None:
    model = random_external("akamaster", blocks=2)
    for stage in (model.layer2, model.layer3):
        stage[0].shortcut = PadAfter()  # type: ignore[index, operator]
    rules = [
        (r"^layer(\d)\.", r"stage_\1."),
        (r"\.conv1\.", ".conv_a."),
        (r"\.conv2\.", ".conv_b."),
        (r"\.bn1\.", ".bn_a."),
        (r"\.bn2\.", ".bn_b."),
        (r"^conv1\.", "conv_1_3x3."),
        (r"^bn1\.", "bn_1."),
        (r"^linear\.", "classifier."),
    ]
    theirs = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        theirs[key] = tensor
    torch.save({"state_dict": theirs}, tmp_path / "dxy.pth")
    assert cli.main(["import", str(tmp_path / "dxy.pth"), "--out", str(tmp_path / "run")]) == 0
    assert has_equal_outputs(model, tmp_path / "run")


def test_a_mismatch_describes_the_network(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it has 4 stages, but ResNets"):
        convert_content({**STATE, "stage4.0.conv1.weight": torch.zeros(1)}, tmp_path)
    with pytest.raises(RunError, match="its first convolution has shape 64x3x3x3, not 16x3x3x3"):
        convert_content({**STATE, "conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path)
    with pytest.raises(
        RunError, match="closest is resnet8-b, with these differences: 1 missing .bn1.bias"
    ):
        convert_content(
            {key: tensor for key, tensor in STATE.items() if key != "bn1.bias"}, tmp_path
        )


def test_class_names_can_come_from_a_data_set_or_a_run(tmp_path: Path) -> None:
    torch.save(build("resnet8-b", classes=100).state_dict(), tmp_path / "c100.pth")
    torch.save(STATE, tmp_path / "c10.pth")
    for name, flags, classes in (
        ("c100", [], CIFAR100),
        ("c100", ["cifar100"], CIFAR100),
        ("c10", ["digits"], tuple("0123456789")),
        ("c10", [str(tmp_path / "run1")], tuple("0123456789")),
    ):
        number = sum(1 for _ in tmp_path.glob("run*"))
        out = tmp_path / f"run{number - 1}" if number else tmp_path / "run-1"
        command = ["import", str(tmp_path / f"{name}.pth"), "--out", str(out)]
        assert cli.main([*command, *(["--classes", *flags] if flags else [])]) == 0
        assert resnet56.load(out).classes == classes


def test_weights_with_non_finite_outputs_are_rejected(tmp_path: Path) -> None:
    exploding = {
        key: torch.full_like(tensor, 1e30)
        if key.endswith("weight") and tensor.ndim == 1
        else tensor
        for key, tensor in STATE.items()
    }
    with pytest.raises(RunError, match="the outputs of the model are not finite"):
        convert_content(exploding, tmp_path)
