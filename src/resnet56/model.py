"""ResNet for 32x32 images (He et al. 2015, "Deep Residual Learning", section 4.2).

The network consists of a 3x3 convolution, three stages of residual blocks, global average pooling,
and a linear layer. The stages have 16, 32 and 64 filters, and feature maps of size 32x32, 16x16 and
8x8. The plain networks of the paper have the same layers, but no shortcuts.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet56.errors import UsageError
from resnet56.notebook import table

Block = Literal["basic", "bottleneck"]
Shortcut = Literal["A", "B", "none"]

MAX_CLASSES = 1_000_000  # more classes would exhaust memory
WIDTHS = (16, 32, 64)  # number of filters in stages 1 to 3
LAYERS_PER_BLOCK = {"basic": 2, "bottleneck": 3}
EXPANSION = {"basic": 1, "bottleneck": 4}  # ratio of a block's output channels to its width


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1 and without bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)


class NormReLU(Protocol):
    """An implementation of relu(norm(x) + residual)."""

    def __call__(self, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute relu(norm(x) + residual). All tensors have shape (N, C, H, W)."""
        ...


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute relu(norm(x) + residual) with PyTorch operations.

    The addition and the ReLU run in place, because the backward pass does not need the output of
    `norm`.
    """
    out: Tensor = norm(x)
    if residual is not None:
        out += residual
    return F.relu(out, inplace=True)


class PadShortcut(nn.Module):
    """Option A of the paper, without parameters: subsample the input and add zero channels.

    Half of the zero channels precede the input channels, and half follow them. The most widely used
    PyTorch port does the same, so its published weights produce the same outputs.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.channels_before = (channels_out - channels_in) // 2
        self.channels_after = channels_out - channels_in - self.channels_before

    def forward(self, x: Tensor) -> Tensor:
        """Pad `x`: (N, channels_in, H, W) -> (N, channels_out, H/stride, W/stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.channels_before, self.channels_after))


def projection_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Option B of the paper: a 1x1 convolution with batch norm."""
    return nn.Sequential(conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (figure 5 of the paper, left).

    If `shortcut` is None, this is the block of a plain network.
    """

    def __init__(
        self, channels_in: int, width: int, stride: int, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut
        self.norm_relu: NormReLU = norm_relu

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: (N, channels_in, H, W) -> (N, width, H/stride, W/stride)."""
        out = self.norm_relu(self.bn1, self.conv1(x))
        return self.norm_relu(self.bn2, self.conv2(out), _residual(self.shortcut, x))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut (figure 5 of the paper, right).

    The first convolution has `width` filters, and the last has 4 * `width`. The stride applies to
    the 3x3 convolution, as in torchvision. In the paper, the stride applies to the first 1x1
    convolution, which then skips three quarters of the input.
    """

    def __init__(
        self, channels_in: int, width: int, stride: int, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        channels_out = width * EXPANSION["bottleneck"]
        self.conv1 = conv1x1(channels_in, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, channels_out)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = shortcut
        self.norm_relu: NormReLU = norm_relu

    def forward(self, x: Tensor) -> Tensor:
        """Run the block: (N, channels_in, H, W) -> (N, 4 * width, H/stride, W/stride)."""
        out = self.norm_relu(self.bn1, self.conv1(x))
        out = self.norm_relu(self.bn2, self.conv2(out))
        return self.norm_relu(self.bn3, self.conv3(out), _residual(self.shortcut, x))


def _residual(shortcut: nn.Module | None, x: Tensor) -> Tensor | None:
    """Return the output of a block's shortcut, or None if the block has no shortcut."""
    return None if shortcut is None else shortcut(x)


BLOCKS: dict[str, Callable[[int, int, int, nn.Module | None], nn.Module]] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
}


class ResNet(nn.Module):
    """The CIFAR network of the paper.

    Args:
        depth: number of layers with weights: 6n + 2 with basic blocks, 9n + 2 with bottleneck
            blocks. Projection shortcuts do not count.
        block: "basic" (two layers) or "bottleneck" (three layers).
        shortcut: type of the shortcuts where the shape changes: "A" (identity padded with zeros) or
            "B" (projection). All other shortcuts are identities. "none" builds a plain network
            without shortcuts.
        classes: number of classes.

    Raises:
        UsageError: the depth is not valid for the block, or the number of classes is out of range.
    """

    def __init__(
        self, depth: int = 56, block: Block = "basic", shortcut: Shortcut = "A", classes: int = 10
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, block)
        if not 2 <= classes <= MAX_CLASSES:
            raise UsageError(f"a network needs 2 to {MAX_CLASSES:,} classes, not {classes:,}")
        self.conv1 = conv3x3(3, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        channels = WIDTHS[0]
        self.stage1, channels = _make_stage(channels, WIDTHS[0], 1, blocks, block, shortcut)
        self.stage2, channels = _make_stage(channels, WIDTHS[1], 2, blocks, block, shortcut)
        self.stage3, channels = _make_stage(channels, WIDTHS[2], 2, blocks, block, shortcut)
        self.fc = nn.Linear(channels, classes)
        self.norm_relu: NormReLU = norm_relu
        self._initialize()

    def _initialize(self) -> None:
        """Initialize the convolutions as in He et al. 2015b, and the classifier from
        N(0, 0.01²)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def set_norm_relu(self, norm_relu: NormReLU) -> None:
        """Set the implementation of relu(norm(x) + residual) in all layers."""
        for module in self.modules():
            if isinstance(module, ResNet | BasicBlock | BottleneckBlock):
                module.norm_relu = norm_relu

    def features(self, x: Tensor) -> Tensor:
        """Compute last-stage features from normalized images: (N, 3, 32, 32) -> (N, C, 8, 8)."""
        x = self.norm_relu(self.bn1, self.conv1(x))
        return self.stage3(self.stage2(self.stage1(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits from normalized images: (N, 3, 32, 32) -> (N, classes)."""
        pooled = self.features(x).mean(dim=(2, 3), dtype=self.fc.weight.dtype)
        return self.fc(pooled)  # type: ignore[no-any-return]

    def explain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits, class activation maps (Zhou et al. 2016) and pooled features.

        The maps are exact, because pooling and the linear layer commute. The logit of a class is
        the mean of its map plus its bias.

        Args:
            x: (N, 3, 32, 32) normalized images.

        Returns:
            Logits (N, classes), class activation maps (N, classes, 8, 8), and features (N, C) after
            global average pooling, which are the input to the classifier.
        """
        features = self.features(x).to(self.fc.weight.dtype)
        maps = F.conv2d(features, self.fc.weight[:, :, None, None])
        pooled = features.mean(dim=(2, 3))
        return self.fc(pooled), maps, pooled


def _make_stage(
    channels: int, width: int, stride: int, blocks: int, block: Block, shortcut: Shortcut
) -> tuple[nn.Sequential, int]:
    """Return a stage and its number of output channels. The stride applies to the first block."""
    channels_out = width * EXPANSION[block]
    stage = nn.Sequential()
    for index in range(blocks):
        first = index == 0
        connection: nn.Module | None = None if shortcut == "none" else nn.Identity()
        if connection is not None and first and (stride != 1 or channels != channels_out):
            make = PadShortcut if shortcut == "A" else projection_shortcut
            connection = make(channels, channels_out, stride)
        stage.append(BLOCKS[block](channels, width, stride if first else 1, connection))
        channels = channels_out
    return stage, channels


def blocks_per_stage(depth: int, block: Block) -> int:
    """Return n, where depth = 6n + 2 for basic blocks and 9n + 2 for bottleneck blocks.

    Raises:
        UsageError: the depth is not of this form.
    """
    step = 3 * LAYERS_PER_BLOCK[block]
    n, remainder = divmod(depth - 2, step)
    if remainder == 0 and n >= 1:
        return n
    below, above = max(n, 1) * step + 2, max(n + 1, 1) * step + 2
    nearest = f"are {below} and {above}" if below != above else f"is {below}"
    raise UsageError(
        f"depth {depth} is not of the form {step}n + 2 for {block} blocks; the nearest {nearest}"
    )


@dataclass(frozen=True)
class Architecture:
    """The architecture that a name such as `resnet56-bottleneck` specifies."""

    depth: int
    block: Block
    shortcut: Shortcut

    @classmethod
    def parse(cls, name: str) -> "Architecture":
        """Parse a name: `resnetD` (basic, A), `resnetD-b` (basic, B), `resnetD-bottleneck` or
        `plainD`.

        Raises:
            UsageError: the name is not of this form, or the depth is not valid for the block.
        """
        pattern = "(resnet|plain)([0-9]{1,4})(-b|-bottleneck)?"
        match = re.fullmatch(pattern, name)
        if match is None:
            # Names of pretrained weights, such as resnet56-cifar100, can include the data set.
            intended = name.lower().removesuffix("-cifar100")
            if re.fullmatch(pattern, intended):
                raise UsageError(f"unknown architecture {name!r}; did you mean {intended}?")
            raise UsageError(
                f"unknown architecture {name!r}; choose resnet56 (basic blocks, "
                "shortcut A), resnet56-b (shortcut B), resnet56-bottleneck, plain56 (no "
                "shortcuts), or another depth"
            )
        family, depth, variant = match.groups()
        if family == "plain" and variant is not None:
            raise UsageError(
                f"unknown architecture {name!r}; plain networks have basic blocks and no "
                f"shortcut; choose plain{depth}"
            )
        block: Block = "bottleneck" if variant == "-bottleneck" else "basic"
        shortcut: Shortcut = "none" if family == "plain" else "A" if variant is None else "B"
        architecture = cls(int(depth), block, shortcut)
        blocks_per_stage(architecture.depth, block)
        return architecture


def build(name: str, *, classes: int = 10, seed: int = 0) -> ResNet:
    """Build a network by name. The initial weights depend only on the arguments.

    Args:
        name: architecture, such as "resnet56" or "plain20". See `Architecture.parse`.
        classes: number of classes.
        seed: seed of the initial weights.

    Raises:
        UsageError: the name, the depth or the number of classes is not valid.
    """
    architecture = Architecture.parse(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ResNet(architecture.depth, architecture.block, architecture.shortcut, classes)


@dataclass(frozen=True)
class Part:
    """A row of a `Description`."""

    name: str
    layers: str  # numbers of the layers, such as "2-19", counted from the input
    blocks: int
    output: tuple[int, ...]  # (C, H, W), or (classes,)
    parameters: int
    macs: int  # multiply-accumulates of convolutions and the linear layer, per image


@dataclass(frozen=True)
class Description:
    """The layers, parameters and operations of a network."""

    arch: str
    depth: int
    block: str
    shortcut: str
    layers_per_block: int
    parts: tuple[Part, ...]
    parameters: int
    macs: int

    def __repr__(self) -> str:
        return (
            f"Description({self.arch}: {self.depth} layers, {self.parameters:,} parameters, "
            f"{self.macs:,} multiply-accumulates)"
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                part.name,
                part.layers,
                part.blocks or "",
                "x".join(map(str, part.output)),
                f"{part.parameters:,}",
                f"{part.macs:,}",
            )
            for part in self.parts
        ]
        total = ("total", self.depth, "", "", f"{self.parameters:,}", f"{self.macs:,}")
        columns = ("part", "layers", "blocks", "output", "parameters", "MACs")
        return table([*rows, total], columns=columns, caption=self.arch)


@functools.cache
def describe(name: str, classes: int = 10) -> Description:
    """Count the layers, parameters and multiply-accumulates of a network and its parts."""
    architecture = Architecture.parse(name)
    with torch.device("meta"):  # the meta device computes only shapes
        model = ResNet(architecture.depth, architecture.block, architecture.shortcut, classes)
        image = torch.empty(1, 3, 32, 32)
    macs = dict.fromkeys(model.modules(), 0)
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def record(module: nn.Module, _: object, output: Tensor) -> None:
        shapes[module] = tuple(output.shape[1:])
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs[module] = module.weight.numel() * output[0, 0].numel()

    for module in model.modules():
        module.register_forward_hook(record)
    model(image)

    layers_per_block = LAYERS_PER_BLOCK[architecture.block]
    parts, counted = [], 0
    groups: tuple[tuple[str, int, tuple[nn.Module, ...]], ...] = (
        ("conv1", 1, (model.bn1, model.conv1)),
        *((f"stage{i}", 0, (getattr(model, f"stage{i}"),)) for i in (1, 2, 3)),
        ("fc", 1, (model.fc,)),
    )
    for part, layers, modules in groups:
        blocks = len(modules[0]) if isinstance(modules[0], nn.Sequential) else 0
        layers = layers or blocks * layers_per_block
        first, counted = counted + 1, counted + layers
        parts.append(
            Part(
                name=part,
                layers=f"{first}-{counted}" if layers > 1 else f"{first}",
                blocks=blocks,
                output=shapes[modules[0]],
                parameters=sum(p.numel() for m in modules for p in m.parameters()),
                macs=sum(macs[m] for top in modules for m in top.modules()),
            )
        )
    return Description(
        arch=name,
        depth=architecture.depth,
        block=architecture.block,
        shortcut=architecture.shortcut,
        layers_per_block=layers_per_block,
        parts=tuple(parts),
        parameters=sum(part.parameters for part in parts),
        macs=sum(part.macs for part in parts),
    )
