"""Whole batches in one launch: the thousand kernels of a batch captured once, and replayed with new inputs.

Python takes as long to launch the kernels of a small model as the GPU takes to run them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensloth.fused.inputs import Inputs

MOST = 24
"""Captured shapes; the batches of others are launched kernel by kernel."""


@dataclass(frozen=True)
class _Pool:
    """What torch.cuda.use_mem_pool reads of a MemPool.

    A MemPool that is collected while another one is in use ends the process: its end empties the cache, and torch 2.11
    asserts that nobody allocates from a pool then (synchronize_and_free_events).
    """

    id: Any


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for every stream that it has worked on.

    So of one device only one `Graphs` may hold captures: in newer torch the end of a graph clears its workspace.
    """
    return torch.cuda.Stream(device)


class Graphs:
    """Runs functions of `Inputs` that only launch kernels; on CUDA a shape that comes again is captured.

    What is launched without a graph uses the graphs' memory, on their stream: nothing of that size is held beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = {}
        self._seen: set[tuple[int, ...]] = set()
        self._most = (0, 0, 0)

    def replayed(self, run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """What `run` returns, a scalar. inputs: on the CPU.

        run: the same one every time; whatever it writes besides stays in one place.
        """
        self._make_room(inputs)
        shape = inputs.shape
        if shape not in self._captured and not self._may_capture(shape):
            self._seen.add(shape)
            return self.launched(run, inputs)
        if shape not in self._captured:
            self._captured[shape] = self._capture(run, inputs)
        graph, static, result = self._captured[shape]
        static.copy_(inputs)
        graph.replay()
        return result.clone()  # the next graph may use the same memory

    def launched(self, run: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """The same, kernel by kernel."""
        self._make_room(inputs)
        if self._device.type != "cuda":
            return run(inputs.to(self._device))
        with self._own_memory():
            result = run(inputs.to(self._device))
        return result.clone()

    def _make_room(self, inputs: Inputs) -> None:
        """Before the longest batch so far, of those of one length that with the most of long documents, and of these
        that of the most targets: the blocks of shorter ones are of little use to it, so they are given back. Shorter
        ones of more targets find room in its blocks.

        Within a pool torch looks for room nowhere else, so what is cached outside is given back too.
        """
        size = len(inputs.ids), sum(inputs.long_lengths), len(inputs.targets)
        if size <= self._most:
            return
        if self._device.type == "cuda":
            self._captured.clear()
            self._begin_pool()
        self._most = size

    def _begin_pool(self) -> None:
        torch.cuda.synchronize(self._device)
        self._pool, self._anchor = _Pool(torch.cuda.graph_pool_handle()), torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        with torch.cuda.graph(self._anchor, pool=self._pool.id, stream=_stream(self._device)):
            torch.zeros(1, device=self._device)  # while there is a graph of it, the pool keeps its memory

    def _may_capture(self, shape: tuple[int, ...]) -> bool:
        """The first batch of a shape is run as it is: it compiles kernels, and may be the only one."""
        return self._device.type == "cuda" and shape in self._seen and len(self._captured) < MOST

    def _capture(self, run: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, Tensor]:
        static, graph = inputs.to(self._device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool.id, stream=_stream(self._device)):
            result = run(static)
        return graph, static, result

    @contextlib.contextmanager
    def _own_memory(self) -> Iterator[None]:
        """Blocks of memory belong to the stream that asked for them, so the stream is the captures' too."""
        outer, own = torch.cuda.current_stream(self._device), _stream(self._device)
        own.wait_stream(outer)
        try:
            with torch.cuda.stream(own), torch.cuda.use_mem_pool(self._pool, self._device):  # type: ignore[arg-type]
                yield
        finally:
            outer.wait_stream(own)
