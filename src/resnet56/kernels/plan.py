"""The plan of a training step: a sequence of calls to kernels/native.c, and their buffers."""

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet56.kernels.compiler import UnavailableError
from resnet56.model import BasicBlock, BottleneckBlock, PadShortcut, ResNet

# These constants equal those in positions.h.
PIXELS, NORM, BLOCK, PLAIN = range(4)
NONE, IDENTITY, PADDED, PROJECTED = range(4)
MAX_CHANNELS = 256
# A thread processes at most this many values at a time, so that they fit in its caches.
MAX_GROUP_VALUES = 32768

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in (
            "weight", "bias", "running_mean", "running_var", "mean", "invstd", "scale", "shift",
            "g_scale", "z_scale", "constant", "weight_grad", "bias_grad",
        )),
        ("momentum", _float),
        ("eps", _float),
    ]  # fmt: skip


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in (
            "images", "height", "width", "in_", "real_in", "out", "kernel", "stride",
            "input_stride", "group", "input", "shortcut", "shortcut_channels",
        )),
        *((name, _pointer) for name in (
            "weight", "weight_grad", "packed", "packed_back", "pixels", "z", "norm",
            "shortcut_map", "shortcut_norm", "x", "result", "result_norm", "g", "g_in",
        )),
        ("skip", _long),
        ("skip_g", _pointer),
        ("skip_stride", _long),
        ("skip_channels", _long),
    ]  # fmt: skip


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", _long))


def check_layouts(library: ctypes.CDLL) -> None:
    """Compare the struct layouts in the library with those in this module.

    Raises:
        UnavailableError: the fields or offsets of a struct differ.
    """
    for mirror in (_Norm, _Conv):
        name = mirror.__name__.removeprefix("_").lower()
        entry = ctypes.pointer(_Field.in_dll(library, f"resnet56_{name}_fields"))
        offsets = {}
        for index in itertools.count():
            if entry[index].name is None:
                break
            offsets[entry[index].name.decode()] = entry[index].offset
        expected = {
            field.rstrip("_"): getattr(mirror, field).offset for field, *_ in mirror._fields_
        }
        expected["sizeof"] = ctypes.sizeof(mirror)
        if different := sorted(dict(offsets.items() ^ expected.items())):
            raise UnavailableError(
                f"struct {name} differs between C and plan.py: {', '.join(different)}"
            )


@dataclass
class _Layer:
    """A convolution, the batch norm after it, and the output of the convolution."""

    conv_module: nn.Conv2d
    norm_module: nn.BatchNorm2d
    conv: _Conv
    norm: _Norm
    z: Tensor  # (N, H, W, C)


@dataclass
class _BlockOutput:
    """The operands of a block's output, relu(norm(z) + shortcut)."""

    last: _Layer
    shortcut: int = NONE
    source: Tensor | None = None  # the block's input, for IDENTITY and PADDED
    projection: _Layer | None = None


def _read_layer_output(previous: _Layer, conv: _Conv) -> None:
    """Set the input of `conv` to relu(norm(z)) of the previous layer."""
    conv.input, conv.z = NORM, previous.z.data_ptr()
    conv.norm = ctypes.addressof(previous.norm)


class Plan:
    """The calls of a training step and their buffers, for one batch shape.

    Raises:
        UnavailableError: the model contains a block or layer that the kernel does not support.
    """

    def __init__(
        self, library: ctypes.CDLL, model: ResNet, images: int, height: int, width: int,
        threads: int,
    ) -> None:  # fmt: skip
        self.library = library
        self.images = images
        self.threads = threads
        self.generation = 0  # number of forward passes so far
        self.layers: list[_Layer] = []  # layers in the order of the forward pass
        self._buffers: list[Any] = []  # the structs contain addresses of these tensors

        first = self._layer(model.conv1, model.bn1, height, width)
        first.conv.input = PIXELS
        previous = _BlockOutput(first)
        blocks: list[list[_Conv]] = []  # each block in the order of the backward pass
        for stage in (model.stage1, model.stage2, model.stage3):
            for block in stage:
                convs, previous, height, width = self._block(block, previous, height, width)
                blocks.append(convs)
        self.last = _Conv(images=images, height=height, width=width, in_=previous.last.conv.out)
        self._read_block_output(previous, self.last)
        self._assign_gradient_buffers(first.conv, blocks)
        self._backward = [*(conv for convs in reversed(blocks) for conv in convs), first.conv]
        library.resnet56_scratch_bytes.restype = _long
        scratch = max(library.resnet56_scratch_bytes(ctypes.byref(conv)) for conv in self._backward)
        arena = self._address(torch.zeros(threads * scratch, dtype=torch.uint8))
        self._threads = _long(threads)
        # `_run` passes these as the last arguments of each kernel call.
        self._scratch = _pointer(arena), _long(scratch), self._threads

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of each layer: convolution weight, batch norm weight, batch norm bias."""
        return [
            parameter
            for layer in self.layers
            for parameter in (
                layer.conv_module.weight,
                layer.norm_module.weight,
                layer.norm_module.bias,
            )
        ]

    # ---- building ----

    def _block(
        self, block: nn.Module, previous: _BlockOutput, height: int, width: int
    ) -> tuple[list[_Conv], _BlockOutput, int, int]:
        """Add a block.

        Returns:
            The convolutions in the order of the backward pass, the output, and the height and the
            width of the output.
        """
        if not isinstance(block, BasicBlock | BottleneckBlock):
            raise UnavailableError(f"unsupported block: {type(block).__name__}")
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, BottleneckBlock):
            pairs.append((block.conv3, block.bn3))
        input_height = height
        layers: list[_Layer] = []
        for module, norm in pairs:
            layer = self._layer(module, norm, height, width)
            if layers:
                _read_layer_output(layers[-1], layer.conv)
            elif block.shortcut is None:  # no shortcut reads the block's input
                _read_layer_output(previous.last, layer.conv)
            else:
                x = self._read_block_output(previous, layer.conv)
            height, width = height // layer.conv.stride, width // layer.conv.stride
            layers.append(layer)
        head = layers[0].conv
        order = [layer.conv for layer in reversed(layers)]
        shortcut = block.shortcut
        if shortcut is None:
            return order, _BlockOutput(layers[-1]), height, width
        if isinstance(shortcut, nn.Identity):
            head.skip = IDENTITY
            return order, _BlockOutput(layers[-1], IDENTITY, x), height, width
        if isinstance(shortcut, PadShortcut) and shortcut.stride == 2:
            head.skip, head.skip_stride = PADDED, shortcut.stride
            head.skip_channels = layers[-1].conv.out
            return order, _BlockOutput(layers[-1], PADDED, x), height, width
        if not isinstance(shortcut, nn.Sequential):
            raise UnavailableError(f"unsupported shortcut: {shortcut}")
        input_stride = input_height // height
        projection = self._layer(shortcut[0], shortcut[1], height, width, input_stride=input_stride)
        projection.conv.input, projection.conv.x = PLAIN, x.data_ptr()
        head.skip, head.skip_stride = IDENTITY if input_stride == 1 else PROJECTED, input_stride
        # The first convolution of the block is the last in `order`. It adds the gradient of the
        # projection.
        order.insert(len(order) - 1, projection.conv)
        return order, _BlockOutput(layers[-1], PROJECTED, None, projection), height, width

    def _layer(
        self, module: nn.Module, norm: nn.Module, height: int, width: int, input_stride: int = 1
    ) -> _Layer:
        """Describe a convolution of (height, width) feature maps, and allocate its buffers.

        A 1x1 convolution with a stride reads every `input_stride`-th pixel of its input. In this
        case, pass the height and width of the output.
        """
        if type(module) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or not norm.affine:
            raise UnavailableError(f"unsupported layer: {module}, {norm}")
        out, in_channels = module.weight.shape[:2]
        padded, kernel = -(-in_channels // 16) * 16, module.kernel_size[0]
        stride = module.stride[0] // input_stride
        supported = nn.Conv2d(
            in_channels, out, kernel, stride=stride * input_stride, padding=kernel // 2,
            bias=False, device="meta",
        )  # fmt: skip
        if str(module) != str(supported) or any(
            n != 16 and (n % 32 or n > MAX_CHANNELS) for n in (padded, out)
        ):
            raise UnavailableError(f"unsupported layer: {module}")
        positions = (height + kernel // 2) * (width + kernel // 2)
        group = min(
            8, -(-self.images // self.threads), MAX_GROUP_VALUES // (positions * max(padded, out))
        )
        z = torch.empty(self.images, height // stride, width // stride, out, dtype=torch.bfloat16)
        # This is an upper bound on the size of the tiles.
        values = kernel * (kernel + 1) * max(padded, 32) * max(out, 32)
        norm_struct = _Norm()
        for name in ("mean", "invstd", "scale", "shift", "g_scale", "z_scale", "constant"):
            setattr(norm_struct, name, self._address(torch.empty(out, dtype=torch.float32)))
        conv = _Conv(
            images=self.images, height=height, width=width, real_in=in_channels, in_=padded,
            out=out, kernel=kernel, stride=stride, input_stride=input_stride, group=max(1, group),
            result=self._address(z),
            packed=self._address(torch.empty(values, dtype=torch.bfloat16)),
            packed_back=self._address(torch.empty(values, dtype=torch.bfloat16)),
            result_norm=ctypes.addressof(norm_struct),
        )  # fmt: skip
        self.layers.append(_Layer(module, norm, conv, norm_struct, z))
        return self.layers[-1]

    def _read_block_output(self, previous: _BlockOutput, conv: _Conv) -> Tensor:
        """Set the input of `conv` to a block's output. Return the output's feature map."""
        x = torch.empty_like(previous.last.z)
        conv.input, conv.x, conv.z = BLOCK, self._address(x), previous.last.z.data_ptr()
        conv.norm = ctypes.addressof(previous.last.norm)
        conv.shortcut = previous.shortcut
        if previous.source is not None:
            conv.shortcut_map = previous.source.data_ptr()
            conv.shortcut_channels = previous.source.shape[-1]
        if previous.projection is not None:
            conv.shortcut_map = previous.projection.z.data_ptr()
            conv.shortcut_norm = ctypes.addressof(previous.projection.norm)
        return x

    def _assign_gradient_buffers(self, first: _Conv, blocks: list[list[_Conv]]) -> None:
        """Assign the gradients to five buffers in rotation. A block uses at most five at a time."""
        largest = max(layer.z.numel() for layer in self.layers)
        buffers = itertools.cycle(
            [self._address(torch.empty(largest, dtype=torch.bfloat16)) for _ in range(5)]
        )
        self.last.g_in = output_grad = next(buffers)
        for convs in reversed(blocks):
            grad, shortcut_grad = output_grad, output_grad
            for conv in convs:
                conv.g_in = next(buffers)
                if conv.input == PLAIN:
                    conv.g, shortcut_grad = output_grad, conv.g_in
                else:
                    conv.g, grad = grad, conv.g_in
            convs[-1].skip_g = shortcut_grad
            output_grad = grad
        first.g = output_grad

    def _address(self, tensor: Tensor) -> int:
        """Return the address of `tensor`, and keep the tensor alive."""
        self._buffers.append(tensor)
        return tensor.data_ptr()

    # ---- running ----

    def forward(self, images: Tensor) -> Tensor:
        """Compute pooled features: (N, 3, H, W) float32 in channels_last -> (N, C) float32."""
        self.generation += 1
        self._images = images  # keep the images for the backward pass of the first layer
        self._weights = [
            layer.conv_module.weight.detach().contiguous(memory_format=torch.channels_last)
            for layer in self.layers
        ]
        for layer, weight in zip(self.layers, self._weights, strict=True):
            layer.conv.weight = weight.data_ptr()
            for name in ("weight", "bias", "running_mean", "running_var"):
                setattr(layer.norm, name, getattr(layer.norm_module, name).data_ptr())
            layer.norm.momentum, layer.norm.eps = layer.norm_module.momentum, layer.norm_module.eps
        self.layers[0].conv.pixels = images.data_ptr()
        for layer in self.layers:
            self._run(self.library.resnet56_forward, layer.conv)
        pooled = torch.empty(self.images, self.last.in_, dtype=torch.float32)
        self.library.resnet56_pool_forward(
            ctypes.byref(self.last), _pointer(pooled.data_ptr()), self._threads
        )
        return pooled

    def backward(self, pooled_grad: Tensor) -> list[Tensor]:
        """Return the gradients of `parameters`, in the same order."""
        grads = []
        for layer, weight in zip(self.layers, self._weights, strict=True):
            grads += [
                torch.empty_like(weight),
                *torch.empty(2, layer.conv.out, dtype=torch.float32),
            ]
            layer.conv.weight_grad, layer.norm.weight_grad, layer.norm.bias_grad = (
                grad.data_ptr() for grad in grads[-3:]
            )
        self._run(self.library.resnet56_pool_backward, self.last, _pointer(pooled_grad.data_ptr()))
        for conv in self._backward:
            self._run(self.library.resnet56_backward, conv)
        return grads

    def _run(self, function: Callable[..., None], conv: _Conv, *arguments: object) -> None:
        function(ctypes.byref(conv), *arguments, *self._scratch)
