"""Layer inputs that wait for the backward pass in host memory, copied beside the work of other layers."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

_LEAVING = 2
"""Inputs whose copies may be under way; then the oldest is waited for, so that its memory can be used again."""


class Parking:
    """A place for each layer's input. On the CPU inputs stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: dict[tuple[int, torch.Size], Tensor] = {}
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._kept: dict[int, Tensor] = {}

    def put(self, layer: int, x: Tensor) -> None:
        """Copy x away; it must not be written any more."""
        self._kept[layer] = x
        if self._stream is None:
            return
        host = self._kept[layer] = self._host_for(layer, x)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
            self._leaving.append((self._stream.record_event(), x))
        while len(self._leaving) > _LEAVING:
            self._wait_for_oldest()

    def fetch(self, layer: int) -> None:
        """Begin to bring a layer's input back."""
        kept = self._kept.pop(layer)
        if self._stream is None:
            self._coming[layer] = kept, None
            return
        while self._leaving:
            self._wait_for_oldest()
        x = torch.empty(kept.shape, dtype=kept.dtype, device=self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            x.copy_(kept, non_blocking=True)
            self._coming[layer] = x, self._stream.record_event()

    def take(self, layer: int) -> Tensor:
        """The input that `fetch` has brought."""
        x, arrived = self._coming.pop(layer)
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
        return x

    def _host_for(self, layer: int, x: Tensor) -> Tensor:
        """Allocated once: a captured graph goes on using it."""
        key = (layer, x.shape)
        if key not in self._host:
            self._host[key] = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return self._host[key]

    def _wait_for_oldest(self) -> None:
        copied, _ = self._leaving.popleft()
        torch.cuda.current_stream().wait_event(copied)
