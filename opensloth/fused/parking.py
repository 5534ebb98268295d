"""What layers keep for the backward pass, in host memory meanwhile: copied beside the work of other layers."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

_LEAVING = 2
"""Layers whose copies may be under way; then the oldest is waited for, so that its memory can be used again."""


class Parking:
    """A place for what each layer keeps. On the CPU tensors stay where they are."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        """tokens: for which there is room from the first batch on."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tokens = tokens
        self._host: dict[int, list[Tensor]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._coming: dict[int, tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = {}
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def put(self, layer: int, tensors: tuple[Tensor, ...]) -> None:
        """Copy them away; they must not be written any more."""
        self._kept[layer] = tensors
        if self._stream is None:
            return
        host = self._kept[layer] = self._places(layer, tensors)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for place, tensor in zip(host, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
            self._leaving.append((self._stream.record_event(), tensors))
        while len(self._leaving) > _LEAVING:
            self._wait_for_oldest()

    def fetch(self, layer: int) -> None:
        """Begin to bring a layer's tensors back."""
        kept = self._kept.pop(layer)
        if self._stream is None:
            self._coming[layer] = kept, None
            return
        while self._leaving:
            self._wait_for_oldest()
        rooms = tuple(torch.empty(host.shape, dtype=host.dtype, device=self._stream.device) for host in kept)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for room, host in zip(rooms, kept, strict=True):
                room.copy_(host, non_blocking=True)
            self._coming[layer] = rooms, self._stream.record_event()

    def take(self, layer: int) -> tuple[Tensor, ...]:
        """The tensors that `fetch` has brought."""
        tensors, arrived = self._coming.pop(layer)
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
        return tensors

    def _places(self, layer: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In one piece for all batches that are not longer; an outgrown one stays, as a captured graph may use it."""
        rooms = self._host.setdefault(layer, [])
        needed = sum(tensor.numel() for tensor in tensors)
        if not rooms or rooms[-1].numel() < needed:
            size = needed // len(tensors[0]) * max(len(tensors[0]), self._tokens)
            rooms.append(torch.empty(size, dtype=tensors[0].dtype, pin_memory=self._stream is not None))
        parts = rooms[-1][:needed].split([tensor.numel() for tensor in tensors])
        return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))

    def _wait_for_oldest(self) -> None:
        copied, _ = self._leaving.popleft()
        torch.cuda.current_stream().wait_event(copied)
