"""Run a training step as a CUDA graph.

A step of ResNet-56 consists of more than a thousand short kernels. Python takes longer to launch
these kernels than the GPU takes to run them. A CUDA graph records the kernels once and then
launches all of them with one call.
"""

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WARMUP_CALLS = 3  # libraries allocate workspaces and choose algorithms during the first calls


class CUDAGraphs:
    """Runs a function as CUDA graphs, with one graph per combination of input shapes and `variant`.

    The first `WARMUP_CALLS` calls for each combination run the function without a graph.

    Args:
        function: a function that takes tensors on `device` and returns None. It must not wait for
            the device, and it must not keep references to its inputs. A graph replays its kernels
            on the same memory, so all other tensors that the function reads or writes must be
            updated in place between calls.
        device: a CUDA device.
    """

    def __init__(self, function: Callable[..., None], device: torch.device) -> None:
        self.function = function
        self.stream = torch.cuda.Stream(device)
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    def __call__(self, *inputs: Tensor, variant: int | None = None) -> None:
        """Call `function(*inputs, variant)`.

        Args:
            inputs: tensors with any values. The graph reads copies of these tensors.
            variant: an argument that is not a tensor. Each value of `variant` has its own graph.
        """
        # Triton and CUDA graphs use the current device, which can be another GPU.
        with torch.cuda.device(self.stream.device):
            key = (variant, *((tensor.shape, tensor.dtype) for tensor in inputs))
            if key not in self._graphs:
                inputs = tuple(tensor.to(self.stream.device) for tensor in inputs)
                self._calls[key] += 1
                if self._calls[key] <= WARMUP_CALLS:
                    self._warm_up(inputs, variant)
                    return
                self._graphs[key] = self._capture(inputs, variant)
            graph, buffers = self._graphs[key]
            for buffer, tensor in zip(buffers, inputs, strict=True):
                buffer.copy_(tensor)
            graph.replay()

    def _warm_up(self, inputs: tuple[Tensor, ...], variant: int | None) -> None:
        """Run the function on the stream of the graphs, as PyTorch requires before a capture."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.function(*inputs, variant)
        for tensor in inputs:
            tensor.record_stream(self.stream)
        current.wait_stream(self.stream)

    def _capture(
        self, inputs: tuple[Tensor, ...], variant: int | None
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        buffers = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.function(*buffers, variant)
        return graph, buffers
