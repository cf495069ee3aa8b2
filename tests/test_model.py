"""Networks match the paper, a widely used implementation, and a functional reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnet56.errors import UsageError
from resnet56.model import Architecture, PadShortcut, ResNet, blocks_per_stage, build, describe

SMALL = ["resnet14", "resnet14-b", "resnet20-bottleneck", "plain14"]  # two blocks per stage
LAYERS = {"": 2, "-b": 2, "-bottleneck": 3}  # convolutions per block


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def suffix(name: str) -> str:
    return name.removeprefix("resnet").removeprefix("plain").lstrip("0123456789")


# The numbers of the paper


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet56", 853_018),
        ("resnet56-b", 855_770),
        ("resnet56-bottleneck", 591_322),
        ("plain56", 853_018),
    ],
)
def test_resnet56_has_the_published_number_of_parameters(name: str, count: int) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == count
    assert describe(name).parameters == count


@pytest.mark.parametrize(
    ("depth", "millions", "digits"),
    [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1)],
)
def test_parameters_match_table_6_of_the_paper(depth: int, millions: float, digits: int) -> None:
    assert round(describe(f"resnet{depth}").parameters / 1e6, digits) == millions


@pytest.mark.parametrize(
    "name", ["resnet56", "resnet56-b", "resnet56-bottleneck", "resnet8", "plain56"]
)
def test_multiply_accumulates_are_half_the_flops_of_pytorch(name: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(name)(torch.empty(1, 3, 32, 32))
    counts = counter.get_flop_counts()
    description = describe(name)
    assert counter.get_total_flops() == 2 * description.macs
    for part in description.parts:
        assert sum(counts[f"ResNet.{part.name}"].values()) == 2 * part.macs


@pytest.mark.parametrize(
    ("name", "blocks", "widths"),
    [
        ("resnet56", 9, (16, 32, 64)),
        ("resnet56-b", 9, (16, 32, 64)),
        ("resnet56-bottleneck", 6, (64, 128, 256)),
        ("plain56", 9, (16, 32, 64)),
    ],
)
def test_stages_have_the_layers_and_sizes_of_the_paper(
    name: str, blocks: int, widths: tuple[int, ...]
) -> None:
    one, two, three = widths
    parts = describe(name).parts
    assert [(part.name, part.layers, part.blocks, part.output) for part in parts] == [
        ("conv1", "1", 0, (16, 32, 32)),
        ("stage1", "2-19", blocks, (one, 32, 32)),
        ("stage2", "20-37", blocks, (two, 16, 16)),
        ("stage3", "38-55", blocks, (three, 8, 8)),
        ("fc", "56", 0, (10,)),
    ]
    # Projections do not count as weighted layers.
    weighted = [
        key
        for key, module in build(name).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in key
    ]
    assert len(weighted) == 56


@pytest.mark.parametrize("depth", [8, 20, 56, 110])
def test_a_plain_network_has_the_weights_of_the_residual_one(depth: int) -> None:
    """The names, initial weights, parameters and multiply-accumulates are equal."""
    plain, residual = describe(f"plain{depth}"), describe(f"resnet{depth}")
    assert plain.shortcut == "none"
    assert plain.parts == residual.parts
    plain_state = build(f"plain{depth}", seed=3).state_dict()
    residual_state = build(f"resnet{depth}", seed=3).state_dict()
    assert list(plain_state) == list(residual_state)
    assert all(torch.equal(plain_state[key], residual_state[key]) for key in plain_state)


def test_a_description_depends_on_the_number_of_classes() -> None:
    assert describe("resnet20", classes=100).parts[-1].parameters == 64 * 100 + 100
    assert describe("resnet20", classes=100).parts[-1].output == (100,)


# Names and depths


@pytest.mark.parametrize(
    ("depth", "block", "nearest"),
    [
        (57, "basic", (56, 62)),
        (55, "basic", (50, 56)),
        (110, "bottleneck", (110,)),
        (56, "basic", (56,)),
        (50, "bottleneck", (47, 56)),
        (57, "bottleneck", (56, 65)),
        (-4, "basic", (8,)),
        (2, "basic", (8,)),
        (7, "basic", (8,)),
        (2, "bottleneck", (11,)),
        (10, "bottleneck", (11,)),
    ],
)
def test_an_invalid_depth_is_rejected_with_the_nearest_valid_ones(
    depth: int, block: Any, nearest: tuple[int, ...]
) -> None:
    step = {"basic": 6, "bottleneck": 9}[block]
    if nearest == (depth,):
        assert step * blocks_per_stage(depth, block) + 2 == depth
        return
    with pytest.raises(UsageError) as caught:
        ResNet(depth, block)
    message = str(caught.value)
    assert message.startswith(f"depth {depth} is not of the form {step}n + 2")
    assert message.endswith(" and ".join(map(str, nearest)))


@pytest.mark.parametrize(
    "name",
    [
        *("", "resnet", "resnet-56", "resnet56-c", "vgg16", "resnet56\n"),
        *("plain", "plain56-c", "plain56\n"),
    ],
)
def test_an_unknown_name_is_rejected_with_the_known_names(name: str) -> None:
    with pytest.raises(UsageError, match="resnet56-bottleneck") as caught:
        build(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "intended"),
    [
        ("ResNet56", "resnet56"),
        ("resnet56-B", "resnet56-b"),
        ("Plain56", "plain56"),
        ("resnet56-cifar100", "resnet56"),
    ],
)
def test_a_name_with_other_case_or_a_data_set_is_rejected_with_the_architecture(
    name: str, intended: str
) -> None:
    with pytest.raises(UsageError, match=rf"did you mean {intended}\?$"):
        build(name)


@pytest.mark.parametrize("name", ["plain56-b", "plain56-bottleneck", "plain57-bottleneck"])
def test_a_plain_network_with_another_block_is_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="basic blocks and no shortcut; choose plain5[67]$"):
        describe(name)


def test_an_invalid_plain_depth_is_rejected() -> None:
    with pytest.raises(UsageError, match="the nearest are 56 and 62"):
        build("plain57")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain56", (56, "basic", "none")),
        ("resnet56", (56, "basic", "A")),
        ("resnet110-b", (110, "basic", "B")),
        ("resnet29-bottleneck", (29, "bottleneck", "B")),
    ],
)
def test_a_name_determines_depth_block_and_shortcut(name: str, expected: tuple[Any, ...]) -> None:
    architecture = Architecture.parse(name)
    assert (architecture.depth, architecture.block, architecture.shortcut) == expected


@pytest.mark.parametrize("classes", [-1, 0, 1, 1_000_001, 10**20])
def test_an_invalid_number_of_classes_is_rejected(classes: int) -> None:
    with pytest.raises(UsageError, match="2 to 1,000,000 classes"):
        build("resnet8", classes=classes)


@pytest.mark.parametrize("classes", [2, 100])
def test_logits_have_one_entry_per_image_and_class(classes: int) -> None:
    assert build("resnet8", classes=classes)(images(3)).shape == (3, classes)


# Forward pass


@pytest.mark.parametrize(("channels_in", "planes"), [(16, 32), (32, 64)])
def test_shortcut_a_matches_the_port(channels_in: int, planes: int) -> None:
    x = torch.randn(2, channels_in, 16, 16, generator=torch.Generator().manual_seed(1))
    port = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
    assert torch.equal(PadShortcut(channels_in, planes, 2)(x), port)


def functional_forward(weights: dict[str, Tensor], x: Tensor, name: str, blocks: int) -> Tensor:
    """Compute the network of section 4.2 of the paper, without modules, in evaluation mode."""

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (weights[f"{norm}.{key}"][:, None, None] for key in keys)
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    layers = LAYERS[suffix(name)]
    x = conv_norm(x, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            prefix = f"stage{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = x
            for layer in range(1, layers + 1):
                step = stride if layer == layers - 1 else 1  # on the first 3x3 convolution
                out = conv_norm(out, f"{prefix}.conv{layer}", f"{prefix}.bn{layer}", step)
                out = out.relu() if layer < layers else out
            if f"{prefix}.shortcut.0.weight" in weights:
                x = conv_norm(x, f"{prefix}.shortcut.0", f"{prefix}.shortcut.1", stride)
            elif name.startswith("plain"):
                x = torch.zeros_like(out)
            elif stride == 2:
                quarter = out.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = (out + x).relu()
    return x.mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("name", SMALL)
def test_the_forward_pass_matches_a_functional_reference(name: str) -> None:
    model = build(name, seed=3).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            # Replace the initial values of batch norm, so that every parameter matters.
            if tensor.ndim == 1:
                tensor.copy_(torch.rand(len(tensor), generator=generator) + 0.5)
        x = images().double()
        expected = functional_forward(model.state_dict(), x, name, blocks=2)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", SMALL[:3])
def test_a_block_with_a_zero_last_norm_applies_only_shortcut_and_relu(name: str) -> None:
    model = build(name)
    last = f"bn{LAYERS[suffix(name)]}"
    checked = 0
    for stage in (model.stage1, model.stage2, model.stage3):
        channels = 16
        for block in stage:
            nn.init.zeros_(getattr(block, last).weight)
            nn.init.zeros_(getattr(block, last).bias)
            channels = block.conv1.in_channels
            x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(2))
            if block.conv1.stride == (2, 2) and "-" not in name:
                half = channels // 2
                expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half)).relu()
            elif isinstance(block.shortcut, nn.Sequential):
                continue  # a projection is not the identity
            else:
                expected = x.relu()
            assert torch.equal(block(x), expected)
            checked += 1
    assert checked == {"resnet14": 6, "resnet14-b": 4, "resnet20-bottleneck": 3}[name]


@pytest.mark.parametrize("name", SMALL)
def test_the_names_of_the_weights_do_not_change(name: str) -> None:
    layers = LAYERS[suffix(name)]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{key}" for key in norm)]
    for stage in (1, 2, 3):
        for block in (0, 1):
            prefix = f"stage{stage}.{block}"
            for layer in range(1, layers + 1):
                expected += [f"{prefix}.conv{layer}.weight"]
                expected += [f"{prefix}.bn{layer}.{key}" for key in norm]
            changes_shape = stage > 1 or name.endswith("-bottleneck")
            if "-" in name and block == 0 and changes_shape:
                expected += [f"{prefix}.shortcut.0.weight"]
                expected += [f"{prefix}.shortcut.1.{key}" for key in norm]
    expected += ["fc.weight", "fc.bias"]
    assert list(build(name).state_dict()) == expected


# Weights


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = build("resnet8", seed=5).state_dict()
    torch.manual_seed(2)
    again, other = build("resnet8", seed=5).state_dict(), build("resnet8", seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    kernels = [key for key in first if first[key].ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in kernels)


def test_building_does_not_change_the_random_state() -> None:
    before = torch.get_rng_state()
    build("resnet8", seed=7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["resnet20", "resnet20-b", "resnet20-bottleneck"])
def test_convolutions_have_the_initial_deviation_of_he_et_al(name: str) -> None:
    for key, module in build(name).named_modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            error = 5 / math.sqrt(
                2 * module.weight.numel()
            )  # five standard errors of the sample standard deviation
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=error), key


def test_norms_start_as_identity_and_the_classifier_near_zero() -> None:
    model = build("resnet20")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert not model.fc.bias.detach().any()
    assert float(model.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    model = build(name)
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
        assert bool(parameter.grad.isfinite().all()), key
