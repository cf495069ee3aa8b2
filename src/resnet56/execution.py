"""Execution modes: implementations of the training step, and which of them a machine supports."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from resnet56.errors import UsageError, option
from resnet56.kernels.compiler import UnavailableError
from resnet56.kernels.fused import fused_norm_relu
from resnet56.kernels.native import native_network
from resnet56.model import ResNet
from resnet56.recipe import Execution
from resnet56.runtime import DTYPES, Precision


@dataclass(frozen=True)
class PreparedModel:
    """The module for the forward pass, and its execution mode."""

    module: nn.Module
    execution: Execution
    reason: str = ""  # the reason why a faster mode is not available
    remedy: str = ""  # how the user can make the faster mode available
    cuda_graphs: bool = False  # whether to run the training step as a CUDA graph


@dataclass(frozen=True)
class _Request:
    """The arguments of `prepare_model`."""

    model: nn.Module
    execution: str
    precision: Precision
    builtin: bool
    graph_step: bool

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def prepare_model(
    model: nn.Module,
    execution: str,
    precision: Precision,
    *,
    builtin: bool = True,
    graph_step: bool = True,
) -> PreparedModel:
    """Prepare a model for an execution mode. All modes agree to within rounding error.

    Args:
        model: the model on its device. Fused execution changes the model in place.
        execution: the `execution` field of a recipe. `auto` never selects `torch.compile`, which
            takes about a minute to compile and is faster only in long runs.
        precision: precision of the forward pass.
        builtin: whether the model is a network from `build`. The kernels support no other models.
        graph_step: whether the loss and the optimizer can be captured in a CUDA graph. A custom
            part may wait for the device, and AdamW has not been tested.

    Raises:
        UsageError: the execution mode is not available on this machine.
    """
    request = _Request(model, execution, precision, builtin, graph_step)
    if execution == "compiled":
        return _compiled(request)
    # Each device has two modes that are faster than eager execution.
    automatic = ("native", "cuda-graph" if request.device.type == "cuda" else "fused")
    reasons: list[str] = []
    remedy = ""
    for mode in automatic if execution == "auto" else (execution,):
        if mode in _PREPARERS:
            try:
                prepared = _PREPARERS[mode](request)
                return replace(prepared, reason="; ".join(reasons), remedy=remedy)
            except UnavailableError as error:
                reasons.append(f"{mode} execution is not available: {error}")
                remedy = error.remedy
    if execution in _PREPARERS:
        raise UsageError(f"{reasons[0]}; use {option('execution', 'auto')}")
    return PreparedModel(model, "eager", "; ".join(reasons), remedy)


def _native(request: _Request) -> PreparedModel:
    """Use Triton kernels in a CUDA graph on a CUDA device, and C kernels on a CPU."""
    model = _builtin_model(request)
    on_gpu = request.device.type == "cuda"
    if on_gpu:
        _require_graph(request)
    else:
        _require_cpu(request)
    if request.precision != "bf16":
        raise UnavailableError(f"it requires bf16, not {request.precision}")
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise UnavailableError("it does not support frozen layers")
    if not on_gpu:
        network = native_network(model)
        return PreparedModel(network, "native")
    try:
        from resnet56.kernels.triton_network import triton_network
    except ImportError:
        raise UnavailableError("Triton is not installed") from None
    return PreparedModel(triton_network(model), "native", cuda_graphs=True)


def _fused(request: _Request) -> PreparedModel:
    model = _builtin_model(request)
    _require_cpu(request)
    if request.precision == "fp16":
        raise UnavailableError("it does not support fp16")
    model.set_norm_relu(fused_norm_relu(DTYPES[request.precision]))
    return PreparedModel(model, "fused")


def _cuda_graph(request: _Request) -> PreparedModel:
    model = _builtin_model(request)
    _require_graph(request)
    return PreparedModel(model, "cuda-graph", cuda_graphs=True)


_PREPARERS: dict[str, Callable[[_Request], PreparedModel]] = {
    "native": _native,
    "fused": _fused,
    "cuda-graph": _cuda_graph,
}


def _compiled(request: _Request) -> PreparedModel:
    """Use `torch.compile`, and a CUDA graph if possible."""
    model = request.model
    try:
        torch.compile(torch.sin)(torch.ones(2, device=request.device))
    except Exception as error:  # errors of Dynamo and Inductor have no common base class
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"torch.compile does not work on this machine: {message}; use "
            f"{option('execution', 'eager')}"
        ) from None
    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    try:
        return replace(_cuda_graph(request), module=compiled, execution="compiled")
    except UnavailableError:
        return PreparedModel(compiled, "compiled")


def _builtin_model(request: _Request) -> ResNet:
    if not request.builtin:
        raise UnavailableError("it does not support custom models")
    assert isinstance(request.model, ResNet)
    return request.model


def _require_cpu(request: _Request) -> None:
    if request.device.type != "cpu":
        raise UnavailableError("the kernels do not support this device")


def _require_graph(request: _Request) -> None:
    """Raise UnavailableError if a training step cannot run as a CUDA graph."""
    if request.device.type != "cuda":
        raise UnavailableError("it requires a CUDA device")
    if request.precision == "fp16":
        raise UnavailableError("it does not support fp16")
    if not request.graph_step:
        raise UnavailableError("it supports only SGD and built-in losses")
