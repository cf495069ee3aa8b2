"""Inspection compared with NumPy and with finite differences."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56 import cli
from resnet56.inspection import inspect_layers
from resnet56.model import ResNet, build
from resnet56.runs.checkpoint import Checkpoint, ModelConfig
from resnet56.runs.directory import RunDirectory

DIGITS = tuple("0123456789")


def batch(count: int = 6, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator, dtype=torch.double)
    return images, torch.arange(count) % 3


def two_layers() -> ResNet:
    """Return a network that consists of a convolution, batch norm, ReLU and a classifier."""
    model = build("plain8", classes=3)
    model.stage1, model.stage2, model.stage3 = nn.Sequential(), nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(16, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randn(model.conv1.weight.shape, generator=generator))
        model.bn1.weight.copy_(torch.rand(16, generator=generator) + 0.5)
        model.bn1.bias.copy_(0.2 * torch.randn(16, generator=generator))
        model.bn1.bias[[2, 5, 11]] = -100  # never positive, so the ReLU is dead
        model.fc.weight.copy_(torch.randn(3, 16, generator=generator))
    return model.double()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_two_layers_match_numpy(batch_norm: bool) -> None:
    """NumPy computes each output and derivative, with im2col for the convolution."""
    model = two_layers()
    images, labels = batch()
    found = inspect_layers(model, images, labels, batch_norm=batch_norm)

    n, pixels = len(images), 8 * 8
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.stack(
        [padded[:, :, dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)], axis=2
    )  # (n, 3, 9, 8, 8)
    columns = patches.transpose(0, 3, 4, 1, 2).reshape(n * pixels, 27)
    kernel = model.conv1.weight.detach().numpy().reshape(16, 27)
    z = columns @ kernel.T
    centered, deviation = z - z.mean(axis=0), np.sqrt(z.var(axis=0) + 1e-5)
    gamma, beta = model.bn1.weight.detach().numpy(), model.bn1.bias.detach().numpy()
    response = centered / deviation * gamma + beta if batch_norm else z
    pooled = np.maximum(response, 0).reshape(n, pixels, 16).mean(axis=1)
    weight, bias = model.fc.weight.detach().numpy(), model.fc.bias.detach().numpy()
    logits = pooled @ weight.T + bias
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(n), labels.numpy()]).mean()

    logits_grad = (shares - np.eye(3)[labels.numpy()]) / n
    pooled_grad = logits_grad @ weight
    response_grad = np.repeat(pooled_grad / pixels, pixels, axis=0) * (response > 0)
    z_grad = response_grad
    if batch_norm:
        xhat = centered / deviation
        z_grad = response_grad - response_grad.mean(axis=0)
        z_grad = gamma / deviation * (z_grad - xhat * (response_grad * xhat).mean(axis=0))

    assert found.loss == pytest.approx(loss, rel=1e-9)
    first, last = found.layers
    assert (first.name, last.name) == ("conv1", "fc")
    assert first.response_std == pytest.approx(response.std(), rel=1e-9)
    assert first.response_gradient == pytest.approx(np.linalg.norm(response_grad), rel=1e-9)
    assert first.weight_gradient == pytest.approx(np.linalg.norm(z_grad.T @ columns), rel=1e-9)
    assert first.dead_relus == pytest.approx((response <= 0).all(axis=0).mean(), abs=1e-6)
    assert first.dead_relus == (3 / 16 if batch_norm else 0)
    assert last.response_std == pytest.approx(logits.std(), rel=1e-9)
    assert last.response_gradient == pytest.approx(np.linalg.norm(logits_grad), rel=1e-9)
    assert last.weight_gradient == pytest.approx(np.linalg.norm(logits_grad.T @ pooled), rel=1e-9)
    assert last.dead_relus is None


@pytest.mark.parametrize("arch", ["plain8", "resnet8", "resnet8-b", "resnet11-bottleneck"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradients_match_finite_differences(arch: str, batch_norm: bool) -> None:
    """The directional derivative of the loss along its gradient is the norm of the gradient."""
    model = build(arch, classes=3, seed=2).double().train()
    if not batch_norm:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())
    images, labels = batch()
    found = {x.name: x for x in inspect_layers(model, images, labels).layers}
    F.cross_entropy(model(images), labels).backward()
    for name, statistics in found.items():
        weight = model.get_submodule(name).weight
        direction = weight.grad / weight.grad.norm()
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                step = sign * 1e-6 * direction
                weight.add_(step)
                losses.append(float(F.cross_entropy(model(images), labels)))
                weight.sub_(step)
        slope = (losses[0] - losses[1]) / 2e-6
        assert statistics.weight_gradient == pytest.approx(slope, rel=1e-3), name


def test_response_gradients_match_those_of_an_added_shift() -> None:
    """The gradient of a zero that is added to a response equals the gradient of the response."""
    model = build("resnet8", classes=3, seed=2).double().train()
    images, labels = batch()
    found = {x.name: x for x in inspect_layers(model, images, labels).layers}
    shifted: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def add(_: nn.Module, __: object, out: Tensor, name: str = name) -> Tensor:
                shifted[name] = torch.zeros_like(out, requires_grad=True)
                return out + shifted[name]

            module.register_forward_hook(add)
    F.cross_entropy(model(images), labels).backward()
    for name, shift in shifted.items():
        expected = float(shift.grad.norm())
        assert found[name.replace("bn", "conv")].response_gradient == pytest.approx(expected)


def test_all_weighted_layers_are_listed_in_order_and_the_model_is_unchanged() -> None:
    model = build("resnet20-bottleneck", classes=3).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = batch()
    layers = inspect_layers(model, images.float(), labels).layers
    weighted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert [layer.name for layer in layers] == weighted
    assert len(layers) == 20
    assert not model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# The command

SMALL = ["--images", "8"]


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert cli.main(["inspect", *arguments, *SMALL, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = RunDirectory(tmp_path_factory.mktemp("run") / "run")
    config = ModelConfig("plain8", DIGITS, (0.3, 0.3, 0.3), (0.4, 0.4, 0.4))
    directory.save(Checkpoint(config, build("plain8", seed=4).state_dict()))
    return directory.path


def test_the_command_inspects_runs_and_architectures_and_draws_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layers.svg"
    found = inspected(capsys, str(run), "resnet8", "--out", str(out))
    trained, initial = found["models"]
    assert (trained["weights"], initial["weights"]) == ("trained", "initial")
    assert [len(config["layers"]) for config in (trained, initial)] == [8, 8]
    assert out.read_text(encoding="utf-8").count("resnet8") >= 1
    without = inspected(capsys, "resnet8", "--no-batch-norm")["models"][0]
    assert without["loss"] != initial["loss"]
    assert not math.isclose(
        without["layers"][3]["response_std"], initial["layers"][3]["response_std"]
    )
    assert cli.main(["inspect", "plain8", *SMALL, "--out", str(tmp_path / "layers.png")]) == 0
    assert "stage3.0.conv2" in capsys.readouterr().out
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no model given"),
        (["plain57"], "nearest are 56 and 62"),
        (["plain56-bottleneck"], "choose plain56"),
        (["resnet56-cifar100"], "add --pretrained"),
        (["vgg16"], "neither a run nor an architecture"),
        (["plain8", "--images", "0"], "--images must be at least 1"),
        (["plain8", "--images", "1000000"], "--images must be at most"),
        (["plain8", "--out", "layers.gif"], "--out must end in"),
        (["plain8", "--device", "quantum"], "quantum"),
        (["RUN", "--no-batch-norm"], "requires an untrained network"),
        (["resnet56", "--pretrained"], "--data is required"),
        (["resnet56", "--pretrained", "--data", "digits"], "no classes in common"),
        (["EMPTY"], "holds no|no checkpoint|there is no"),
        (["FILE.onnx"], "no gradients|ONNX"),
        (["FILE.txt"], "FILE.txt"),
    ],
)
def test_errors_have_one_line(
    arguments: list[str],
    says: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE.onnx").write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(100))
    (tmp_path / "FILE.txt").write_text("hello")
    arguments = [str(run) if word == "RUN" else word for word in arguments]
    assert cli.main(["inspect", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert re.search(says, said), said
