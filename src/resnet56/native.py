"""The network's training step in C, on a processor's matrix unit: kernels/native.c.

PyTorch makes a step of ResNet-56 from hundreds of operations that each read and write whole maps;
here each convolution is one call, forward or backward, with everything around it. Like the
smaller kernel of `fused`, it is compiled where it runs and compared with PyTorch before it is
used, and training goes on without it where it does not fit.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet56.compiler import UnavailableError, compile_here
from resnet56.model import BasicBlock, BottleneckBlock, PadShortcut, ResNet, build

PIXELS, NORM, BLOCK, PLAIN = range(4)  # as in native.c
NONE, SAME, PADDED, PROJECTED = range(4)
TILE = 512  # bfloat16 values
MOST_TOGETHER = 32768  # values of a thread's images at a time: they stay in its caches

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


def native_network(model: ResNet) -> "NativeNetwork":
    """`model` with its training step in C.

    Raises:
        UnavailableError: no compiler, a processor without bf16 vectors, a model that does not
            fit, or a kernel that does not agree with PyTorch.
    """
    library = compile_here("native.c")
    if library.unit() == 0:
        raise UnavailableError("the system keeps the processor's matrix unit back")
    library.scratch.restype = _long
    network = NativeNetwork(model, library)
    _check(library)
    return network


class NativeNetwork(nn.Module):
    """`model` with its training step in C; what does not fit goes through `model` itself.

    Args:
        model: in fp32, its convolutions' weights in channels_last.

    Raises:
        UnavailableError: the model does not fit.
    """

    def __init__(self, model: ResNet, library: ctypes.CDLL) -> None:
        super().__init__()
        self.model = model
        self._library = library
        self.unit = {1: "vectors", 2: "AMX"}[library.unit()]
        self._plans: dict[tuple[int, ...], _Plan] = {}
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        if not all(n.affine and n.track_running_stats and n.momentum is not None for n in norms):
            raise UnavailableError("a batch norm has no weights, statistics or momentum")
        self._counts = [n.num_batches_tracked for n in norms if n.num_batches_tracked is not None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) normalised images -> (N, classes) logits."""
        fits = (
            self.model.training
            and torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and x.shape[0] > 0
            and x.shape[2] % 4 == 0
            and x.shape[3] % 4 == 0
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
        )
        if not fits:
            return self.model(x)  # type: ignore[no-any-return]
        key = (x.shape[0], x.shape[2], x.shape[3], torch.get_num_threads())
        if key not in self._plans:
            self._plans[key] = _Plan(self._library, self.model, *key)
        plan = self._plans[key]
        torch._foreach_add_(self._counts, 1)
        pooled: Tensor = _Features.apply(plan, x, *plan.parameters)
        return self.model.fc(pooled)  # type: ignore[no-any-return]


class _Features(torch.autograd.Function):
    """Images to the mean of the last maps, and back to the gradients of the parameters."""

    @staticmethod
    def forward(ctx: Any, plan: "_Plan", images: Tensor, *parameters: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.images = images.contiguous(memory_format=torch.channels_last)
        pooled = plan.forward(ctx.images)
        ctx.turn = plan.turn
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.plan.turn:
            raise RuntimeError("another batch went forward since: its maps have taken the place")
        return None, None, *ctx.plan.backward(grad.float().contiguous())


@dataclass
class _Join:
    """What makes a block's output, and so the next one's input: relu(norm(z) + shortcut)."""

    z: Tensor
    norm: _Norm
    shortcut: int = NONE
    short_map: Tensor | None = None
    short_norm: _Norm | None = None
    short_channels: int = 0


class _Plan:
    """The calls that make one step on batches of one shape, and the memory they work in."""

    def __init__(
        self, library: ctypes.CDLL, model: ResNet, images: int, height: int, width: int,
        threads: int,
    ) -> None:  # fmt: skip
        self.library = library
        self.images = images
        self.threads = threads
        self.turn = 0
        self.parameters: list[Tensor] = []
        self._kept: list[Any] = []  # what the structures point into
        self._weights: list[tuple[_Conv, nn.Conv2d]] = []
        self._norms: list[tuple[_Norm, nn.BatchNorm2d]] = []
        self._forward: list[_Conv] = []
        backward: list[list[_Conv]] = []  # block by block, in the order of their gradients

        first = self._conv(model.conv1, model.bn1, height, width)
        first.input = PIXELS
        self._forward.append(first)
        join = _Join(self._map_of(first), first.result_norm_)
        for stage in (model.stage1, model.stage2, model.stage3):
            for block in stage:
                made, join, height, width = self._block(block, join, height, width)
                backward.append(made)
        self.last = _Conv(images=images, height=height, width=width, in_=join.z.shape[-1])
        self._join(self.last, join)
        self._arrange_gradients(first, backward)
        self._backward = [conv for made in reversed(backward) for conv in made] + [first]
        self._scratch = max(library.scratch(ctypes.byref(c)) for c in self._forward)
        self._arena = torch.zeros(threads * self._scratch, dtype=torch.uint8)
        self._counted = [c for c, _ in self._weights]

    # ---- building ----

    def _block(
        self, block: nn.Module, join: _Join, height: int, width: int
    ) -> tuple[list[_Conv], _Join, int, int]:
        """The convolutions of a block, the join behind it, and its output's size."""
        assert isinstance(block, BasicBlock | BottleneckBlock)
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, BottleneckBlock):
            pairs.append((block.conv3, block.bn3))
        into = (height, width)
        convs: list[_Conv] = []
        for number, (module, norm) in enumerate(pairs):
            conv = self._conv(module, norm, height, width)
            if number == 0:
                self._join(conv, join)
            else:
                before = convs[-1]
                conv.input, conv.z, conv.norm = NORM, before.result, before.result_norm
                conv.norm_ = before.result_norm_
            height, width = height // conv.stride, width // conv.stride
            convs.append(conv)
            self._forward.append(conv)
        head = convs[0]
        after = _Join(self._map_of(convs[-1]), convs[-1].result_norm_)
        order = list(reversed(convs))
        link = block.shortcut
        if isinstance(link, nn.Identity):
            after.shortcut, after.short_map = SAME, head.x_
            head.skip = SAME
        elif isinstance(link, PadShortcut):
            after.shortcut, after.short_map = PADDED, head.x_
            after.short_channels = head.in_
            head.skip, head.skip_take, head.skip_channels = PADDED, link.stride, convs[-1].out
        elif isinstance(link, nn.Sequential):
            take = into[0] // height
            projection = self._conv(link[0], link[1], height, width, take=take)
            projection.input = PLAIN
            projection.x = head.x
            self._forward.append(projection)
            after.shortcut, after.short_map = PROJECTED, self._map_of(projection)
            after.short_norm = projection.result_norm_
            head.skip, head.skip_take = SAME if take == 1 else PROJECTED, take
            order.insert(len(order) - 1, projection)
        else:
            raise UnavailableError(f"it knows no shortcut {type(link).__name__}")
        return order, after, height, width

    def _conv(
        self, module: nn.Module, norm: nn.Module, height: int, width: int, take: int = 1
    ) -> _Conv:
        """A convolution of (height, width) maps, with its own result and tiles of weights.

        A stride of 1x1 convolutions can as well be a choice of its input's pixels: `take`.
        """
        assert isinstance(module, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        out, real = module.weight.shape[:2]
        kernel, stride = module.kernel_size[0], module.stride[0] // take
        conv = _Conv(
            images=self.images, height=height, width=width, real_in=real, in_=-(-real // 16) * 16,
            out=out, kernel=kernel, stride=stride, take=take,
        )  # fmt: skip
        if out % 16 or (conv.in_ > 16 and conv.in_ % 32) or (out > 16 and out % 32):
            raise UnavailableError(f"it knows no convolution of {real} to {out} channels")
        pad = kernel // 2
        span = (height + pad) * (width + pad)
        most = max(1, -(-self.images // self.threads))
        conv.group = max(1, min(8, most, MOST_TOGETHER // (span * max(conv.in_, out))))
        for name in ("packed", "packed_back"):
            tiles = kernel * ((kernel + 1) // 2) * max(conv.in_, 32) // 16 * max(out, 32) // 16
            setattr(conv, name, self._keep(torch.empty(2 * tiles * TILE, dtype=torch.bfloat16)))
        result = torch.empty(
            self.images, height // stride, width // stride, out, dtype=torch.bfloat16
        )
        conv.result, conv.result_map = self._keep(result), result
        structure = _Norm(momentum=norm.momentum, eps=norm.eps)
        for name in ("mean", "invstd", "scale", "shift", "by_g", "by_z", "constant"):
            setattr(structure, name, self._keep(torch.empty(out)))
        conv.result_norm, conv.result_norm_ = ctypes.addressof(structure), structure
        self._weights.append((conv, module))
        self._norms.append((structure, norm))
        self.parameters += [module.weight, norm.weight, norm.bias]
        self._kept += [conv, structure]
        return conv

    def _join(self, conv: _Conv, join: _Join) -> None:
        """Let `conv` begin with a block's output, which gets its own map."""
        conv.input, conv.z, conv.norm = BLOCK, join.z.data_ptr(), ctypes.addressof(join.norm)
        conv.shortcut, conv.shortcut_channels = join.shortcut, join.short_channels
        conv.short_map = join.short_map.data_ptr() if join.short_map is not None else None
        conv.short_norm = ctypes.addressof(join.short_norm) if join.short_norm else None
        x = torch.empty_like(join.z)
        conv.x, conv.x_ = self._keep(x), x

    def _arrange_gradients(self, first: _Conv, blocks: list[list[_Conv]]) -> None:
        """Five maps in turns: no block has more gradients at a time."""
        largest = max(c.result_map.numel() for c, _ in self._weights)
        ring = [self._keep(torch.empty(largest, dtype=torch.bfloat16)) for _ in range(5)]
        turn = iter(ring * (len(self._weights) + 1))
        self.last.g_in = gradient = next(turn)
        for convs in reversed(blocks):
            at, other = gradient, gradient
            for conv in convs:
                conv.g_in = next(turn)
                if conv.input == PLAIN:
                    conv.g, other = gradient, conv.g_in
                else:
                    conv.g, at = at, conv.g_in
            convs[-1].skip_g = other
            gradient = at
        first.g = gradient

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    @staticmethod
    def _map_of(conv: _Conv) -> Tensor:
        result: Tensor = conv.result_map
        return result

    # ---- running ----

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 in channels_last -> (N, C) float32, the last maps' means."""
        self.turn += 1
        for conv, module in self._weights:
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            conv.weight_, conv.weight = weight, weight.data_ptr()
        for structure, norm in self._norms:
            for name in ("weight", "bias", "running_mean", "running_var"):
                setattr(structure, name, getattr(norm, name).data_ptr())
        self._forward[0].pixels = images.data_ptr()
        arena, size = self._arena.data_ptr(), self._scratch
        for conv in self._forward:
            self.library.forward(ctypes.byref(conv), _pointer(arena), _long(size))
        pooled = torch.empty(self.images, self.last.in_)
        self.library.pool_forward(ctypes.byref(self.last), _pointer(pooled.data_ptr()))
        return pooled

    def backward(self, pooled_grad: Tensor) -> list[Tensor]:
        """The gradients of `parameters`."""
        grads = [torch.empty_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        for index, (conv, _) in enumerate(self._weights):
            if not grads[3 * index].is_contiguous(memory_format=torch.channels_last):
                grads[3 * index] = grads[3 * index].contiguous(memory_format=torch.channels_last)
            conv.weight_grad = grads[3 * index].data_ptr()
            conv.result_norm_.weight_grad = grads[3 * index + 1].data_ptr()
            conv.result_norm_.bias_grad = grads[3 * index + 2].data_ptr()
        self.library.pool_backward(ctypes.byref(self.last), _pointer(pooled_grad.data_ptr()))
        arena, size = self._arena.data_ptr(), self._scratch
        for conv in self._backward:
            self.library.backward(ctypes.byref(conv), _pointer(arena), _long(size))
        return grads


def _check(library: ctypes.CDLL) -> None:
    """Compare small networks with PyTorch before anything is trained."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 16, 16, generator=generator)
    for arch in ("resnet8", "resnet8-b", "resnet11-bottleneck"):
        results = []
        for native in (False, True):
            model = build(arch).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            network = NativeNetwork(model, library) if native else model
            with torch.autocast("cpu", torch.bfloat16, enabled=native):
                logits = network(images).float()
            logits.square().sum().backward()
            results.append([logits, *(p.grad for p in model.parameters())])
        for number, (theirs, mine) in enumerate(zip(*results, strict=True)):
            distance = (mine - theirs).norm() / theirs.norm()
            # bf16 turns some ReLUs on or off, and gradients are far from smooth in that.
            if not distance < (0.5 if number else 0.02):  # a NaN is no agreement
                raise UnavailableError("it does not agree with PyTorch on this machine")
