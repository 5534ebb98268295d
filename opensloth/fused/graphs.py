"""Whole batches in one launch: the thousand kernels of a batch captured once, and replayed with new inputs.

Python takes as long to launch the kernels of a small model as the GPU takes to run them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opensloth.fused.inputs import Inputs

MOST = 24
"""Captured shapes; the batches of others are launched kernel by kernel."""


class Graphs:
    """Runs a function of `Inputs` that only launches kernels; on CUDA a shape that comes again is captured."""

    def __init__(self, run: Callable[[Inputs], Tensor], device: torch.device) -> None:
        """run: returns a scalar. Whatever else it writes stays in one place."""
        self._run, self._device = run, device
        self._captured: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, inputs: Inputs) -> Tensor:
        """inputs: on the CPU. Returns what `run` does."""
        shape = inputs.shape
        if shape not in self._captured and not self._may_capture(shape):
            self._seen.add(shape)
            return self._run(inputs.to(self._device))
        if shape not in self._captured:
            self._captured[shape] = self._capture(inputs)
        graph, static, result = self._captured[shape]
        static.copy_(inputs)
        graph.replay()
        return result.clone()  # the next graph may use the same memory

    def _may_capture(self, shape: tuple[int, ...]) -> bool:
        """The first batch of a shape is run as it is: it compiles kernels, and may be the only one."""
        return self._pool is not None and shape in self._seen and len(self._captured) < MOST

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, Tensor]:
        static, graph = inputs.to(self._device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's own memory takes the place of what was used without it
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._run(static)
        return graph, static, result
