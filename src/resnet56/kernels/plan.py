"""The calls of kernels/native.c that make a training step, and the memory that they work in."""

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet56.kernels.compiler import UnavailableError
from resnet56.model import BasicBlock, BottleneckBlock, PadShortcut, ResNet

PIXELS, NORM, BLOCK, PLAIN = range(4)  # as in native.c
NONE, SAME, PADDED, PROJECTED = range(4)
MAX_CHANNELS = 256  # as in native.c
MAX_GROUP_VALUES = 32768  # values of a thread's images at a time: they stay in its caches

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in (
            "weight", "bias", "running_mean", "running_var", "mean", "invstd", "scale", "shift",
            "by_g", "by_z", "constant", "weight_grad", "bias_grad",
        )),
        ("momentum", _float),
        ("eps", _float),
    ]  # fmt: skip


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in (
            "images", "height", "width", "in_", "real_in", "out", "kernel", "stride", "take",
            "group", "input", "shortcut", "shortcut_channels",
        )),
        *((name, _pointer) for name in (
            "weight", "weight_grad", "packed", "packed_back", "pixels", "z", "norm", "short_map",
            "short_norm", "x", "result", "result_norm", "g", "g_in",
        )),
        ("skip", _long),
        ("skip_g", _pointer),
        ("skip_take", _long),
        ("skip_channels", _long),
    ]  # fmt: skip


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", _long))


def check_layouts(library: ctypes.CDLL) -> None:
    """UnavailableError unless the library's structs lie in memory as those above do."""
    for mirror in (_Norm, _Conv):
        name = mirror.__name__.removeprefix("_").lower()
        entry = ctypes.pointer(_Field.in_dll(library, f"resnet56_{name}_fields"))
        theirs = {}
        for index in itertools.count():
            if entry[index].name is None:
                break
            theirs[entry[index].name.decode()] = entry[index].offset
        ours = {field.rstrip("_"): getattr(mirror, field).offset for field, *_ in mirror._fields_}
        ours["sizeof"] = ctypes.sizeof(mirror)
        if wrong := sorted(dict(theirs.items() ^ ours.items())):
            raise UnavailableError(
                f"its struct {name} is not the one of plan.py: {', '.join(wrong)} differ"
            )


@dataclass
class _Layer:
    """A convolution, the batch norm behind it, and its result."""

    weights: nn.Conv2d
    statistics: nn.BatchNorm2d
    conv: _Conv
    norm: _Norm
    z: Tensor  # (N, H, W, C)


@dataclass
class _Join:
    """What makes a block's output, and so the next one's input: relu(norm(z) + shortcut)."""

    last: _Layer
    shortcut: int = NONE
    source: Tensor | None = None  # SAME, PADDED: the block's input
    projection: _Layer | None = None


def _follow(before: _Layer, conv: _Conv) -> None:
    """Let `conv` read relu(norm(z)) of the layer before it."""
    conv.input, conv.z = NORM, before.z.data_ptr()
    conv.norm = ctypes.addressof(before.norm)


class Plan:
    """The calls that make one step on batches of one shape, and the memory they work in.

    Raises:
        UnavailableError: a block or layer that the kernel does not know.
    """

    def __init__(
        self, library: ctypes.CDLL, model: ResNet, images: int, height: int, width: int,
        threads: int,
    ) -> None:  # fmt: skip
        self.library = library
        self.images = images
        self.threads = threads
        self.turn = 0
        self.layers: list[_Layer] = []  # in the order of the forward pass
        self._kept: list[Any] = []  # what the structures point at

        first = self._layer(model.conv1, model.bn1, height, width)
        first.conv.input = PIXELS
        join = _Join(first)
        blocks: list[list[_Conv]] = []  # each in the order of its gradients
        for stage in (model.stage1, model.stage2, model.stage3):
            for block in stage:
                convs, join, height, width = self._block(block, join, height, width)
                blocks.append(convs)
        self.last = _Conv(images=images, height=height, width=width, in_=join.last.conv.out)
        self._begin_with(join, self.last)
        self._arrange_gradients(first.conv, blocks)
        self._backward = [*(conv for convs in reversed(blocks) for conv in convs), first.conv]
        library.resnet56_scratch_bytes.restype = _long
        scratch = max(library.resnet56_scratch_bytes(ctypes.byref(conv)) for conv in self._backward)
        arena = self._keep(torch.zeros(threads * scratch, dtype=torch.uint8))
        self._threads = _long(threads)
        self._where = _pointer(arena), _long(scratch), self._threads  # the same in every call

    @property
    def parameters(self) -> list[Tensor]:
        """Of each layer the weights, and the scales and shifts of its batch norm."""
        return [
            parameter
            for layer in self.layers
            for parameter in (layer.weights.weight, layer.statistics.weight, layer.statistics.bias)
        ]

    # ---- building ----

    def _block(
        self, block: nn.Module, join: _Join, height: int, width: int
    ) -> tuple[list[_Conv], _Join, int, int]:
        """A block's convolutions in the order of their gradients, what follows, and its size."""
        if not isinstance(block, BasicBlock | BottleneckBlock):
            raise UnavailableError(f"it knows no block {type(block).__name__}")
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, BottleneckBlock):
            pairs.append((block.conv3, block.bn3))
        into = height
        layers: list[_Layer] = []
        for module, norm in pairs:
            layer = self._layer(module, norm, height, width)
            if layers:
                _follow(layers[-1], layer.conv)
            elif block.shortcut is None:  # nothing else reads the block's input
                _follow(join.last, layer.conv)
            else:
                x = self._begin_with(join, layer.conv)
            height, width = height // layer.conv.stride, width // layer.conv.stride
            layers.append(layer)
        head = layers[0].conv
        order = [layer.conv for layer in reversed(layers)]
        link = block.shortcut
        if link is None:
            return order, _Join(layers[-1]), height, width
        if isinstance(link, nn.Identity):
            head.skip = SAME
            return order, _Join(layers[-1], SAME, x), height, width
        if isinstance(link, PadShortcut) and link.stride == 2:
            head.skip, head.skip_take = PADDED, link.stride
            head.skip_channels = layers[-1].conv.out
            return order, _Join(layers[-1], PADDED, x), height, width
        if not isinstance(link, nn.Sequential):
            raise UnavailableError(f"it knows no such shortcut: {link}")
        take = into // height
        projection = self._layer(link[0], link[1], height, width, take=take)
        projection.conv.input, projection.conv.x = PLAIN, x.data_ptr()
        head.skip, head.skip_take = SAME if take == 1 else PROJECTED, take
        order.insert(len(order) - 1, projection.conv)  # before the gradient that it adds to
        return order, _Join(layers[-1], PROJECTED, None, projection), height, width

    def _layer(
        self, module: nn.Module, norm: nn.Module, height: int, width: int, take: int = 1
    ) -> _Layer:
        """A convolution of (height, width) maps, with its own memory.

        The stride of a 1x1 convolution can as well be a choice of its input's pixels: `take`.
        """
        if type(module) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or not norm.affine:
            raise UnavailableError(f"it knows no such layer: {module}, {norm}")
        out, real = module.weight.shape[:2]
        inner, kernel = -(-real // 16) * 16, module.kernel_size[0]
        stride = module.stride[0] // take
        like = nn.Conv2d(
            real, out, kernel, stride=stride * take, padding=kernel // 2, bias=False, device="meta"
        )
        if str(module) != str(like) or any(
            n != 16 and (n % 32 or n > MAX_CHANNELS) for n in (inner, out)
        ):
            raise UnavailableError(f"it knows no such layer: {module}")
        positions = (height + kernel // 2) * (width + kernel // 2)
        group = min(
            8, -(-self.images // self.threads), MAX_GROUP_VALUES // (positions * max(inner, out))
        )
        z = torch.empty(self.images, height // stride, width // stride, out, dtype=torch.bfloat16)
        values = kernel * (kernel + 1) * max(inner, 32) * max(out, 32)  # at most, of the tiles
        structure = _Norm()
        for name in ("mean", "invstd", "scale", "shift", "by_g", "by_z", "constant"):
            setattr(structure, name, self._keep(torch.empty(out, dtype=torch.float32)))
        conv = _Conv(
            images=self.images, height=height, width=width, real_in=real, in_=inner, out=out,
            kernel=kernel, stride=stride, take=take, group=max(1, group), result=self._keep(z),
            packed=self._keep(torch.empty(values, dtype=torch.bfloat16)),
            packed_back=self._keep(torch.empty(values, dtype=torch.bfloat16)),
            result_norm=ctypes.addressof(structure),
        )  # fmt: skip
        self.layers.append(_Layer(module, norm, conv, structure, z))
        return self.layers[-1]

    def _begin_with(self, join: _Join, conv: _Conv) -> Tensor:
        """Let `conv` begin with a block's output, and return that map."""
        x = torch.empty_like(join.last.z)
        conv.input, conv.x, conv.z = BLOCK, self._keep(x), join.last.z.data_ptr()
        conv.norm = ctypes.addressof(join.last.norm)
        conv.shortcut = join.shortcut
        if join.source is not None:
            conv.short_map, conv.shortcut_channels = join.source.data_ptr(), join.source.shape[-1]
        if join.projection is not None:
            conv.short_map = join.projection.z.data_ptr()
            conv.short_norm = ctypes.addressof(join.projection.norm)
        return x

    def _arrange_gradients(self, first: _Conv, blocks: list[list[_Conv]]) -> None:
        """Five maps in turns: no block has more gradients at a time."""
        largest = max(layer.z.numel() for layer in self.layers)
        ring = [self._keep(torch.empty(largest, dtype=torch.bfloat16)) for _ in range(5)]
        turns = itertools.cycle(ring)
        self.last.g_in = behind = next(turns)
        for convs in reversed(blocks):
            at, skipped = behind, behind
            for conv in convs:
                conv.g_in = next(turns)
                if conv.input == PLAIN:
                    conv.g, skipped = behind, conv.g_in
                else:
                    conv.g, at = at, conv.g_in
            convs[-1].skip_g = skipped
            behind = at
        first.g = behind

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    # ---- running ----

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 in channels_last -> (N, C) float32, the last maps' means."""
        self.turn += 1
        self._images = images  # the first layer's gradient reads them again
        self._weights = [
            layer.weights.weight.detach().contiguous(memory_format=torch.channels_last)
            for layer in self.layers
        ]
        for layer, weight in zip(self.layers, self._weights, strict=True):
            layer.conv.weight = weight.data_ptr()
            for name in ("weight", "bias", "running_mean", "running_var"):
                setattr(layer.norm, name, getattr(layer.statistics, name).data_ptr())
            layer.norm.momentum, layer.norm.eps = layer.statistics.momentum, layer.statistics.eps
        self.layers[0].conv.pixels = images.data_ptr()
        for layer in self.layers:
            self._call(self.library.resnet56_forward, layer.conv)
        pooled = torch.empty(self.images, self.last.in_, dtype=torch.float32)
        to = _pointer(pooled.data_ptr())
        self.library.resnet56_pool_forward(ctypes.byref(self.last), to, self._threads)
        return pooled

    def backward(self, pooled_grad: Tensor) -> list[Tensor]:
        """The gradients of `parameters`."""
        grads = []
        for layer, weight in zip(self.layers, self._weights, strict=True):
            grads += [
                torch.empty_like(weight),
                *torch.empty(2, layer.conv.out, dtype=torch.float32),
            ]
            layer.conv.weight_grad, layer.norm.weight_grad, layer.norm.bias_grad = (
                grad.data_ptr() for grad in grads[-3:]
            )
        self._call(self.library.resnet56_pool_backward, self.last, _pointer(pooled_grad.data_ptr()))
        for conv in self._backward:
            self._call(self.library.resnet56_backward, conv)
        return grads

    def _call(self, function: Callable[..., None], conv: _Conv, *more: object) -> None:
        function(ctypes.byref(conv), *more, *self._where)
