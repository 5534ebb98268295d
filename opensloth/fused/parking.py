"""What layers keep for the backward pass, in host memory meanwhile: copied beside the work of other layers."""

from __future__ import annotations

import os
from collections import deque

import torch
from torch import Tensor

from opensloth.launch import machine

_LEAVING = 2
"""Layers whose copies may be under way; then the oldest is waited for, so that its memory can be used again."""

_SHARE = 4
"""All of a node's processes together take one part in so many of its memory."""


def has_room(size: int) -> bool:
    """Whether so many bytes of host memory are this process's to take, as far as that is known."""
    usable = machine.usable_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return usable is None or size * processes * _SHARE <= usable


class Parking:
    """A place for what each layer keeps. On the CPU tensors stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: dict[tuple[int, int], Tensor] = {}
        self._leaving: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._coming: dict[int, tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = {}
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def put(self, layer: int, tensors: tuple[Tensor, ...]) -> None:
        """Copy them away; they must not be written any more."""
        self._kept[layer] = tensors
        if self._stream is None:
            return
        host = self._kept[layer] = tuple(self._host_for(layer, i, tensor) for i, tensor in enumerate(tensors))
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

    def _host_for(self, layer: int, index: int, tensor: Tensor) -> Tensor:
        """Allocated once, and anew for the longest batch so far only: a captured graph goes on using it."""
        room = self._host.get((layer, index))
        if room is None or room.numel() < tensor.numel():
            pinned = self._stream is not None
            room = self._host[layer, index] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=pinned)
        return room[: tensor.numel()].view(tensor.shape)

    def _wait_for_oldest(self) -> None:
        copied, _ = self._leaving.popleft()
        torch.cuda.current_stream().wait_event(copied)
