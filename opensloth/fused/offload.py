"""What layers keep for the backward pass, in host memory meanwhile: copied beside the work of other layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pieces = Sequence[tuple[Tensor, ...]]
"""What one layer keeps, in the order in which its way back needs it. All tensors of one type."""


class Offload:
    """A place for what each layer keeps. On the CPU tensors stay where they are."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        """tokens: for which there is room from the first batch on."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tokens = tokens
        self._host: dict[int, list[Tensor]] = {}
        self._leaving: tuple[torch.cuda.Event, Pieces] | None = None
        self._coming: dict[tuple[int, int], tuple[tuple[Tensor, ...], torch.cuda.Event | None]] = {}
        self._kept: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def put(self, layer: int, pieces: Pieces) -> None:
        """Copy them away; they must not be written any more.

        The layer's before are waited for, so that their memory can be used again.
        """
        if self._stream is None:
            self._kept |= {(layer, i): piece for i, piece in enumerate(pieces)}
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for i, (piece, places) in enumerate(zip(pieces, self._places(layer, pieces), strict=True)):
                self._kept[layer, i] = places
                for tensor, place in zip(piece, places, strict=True):
                    place.copy_(tensor, non_blocking=True)
            leaving = self._stream.record_event(), pieces
        self.settle()
        self._leaving = leaving

    def settle(self) -> None:
        """Wait until all have left: their memory can be used."""
        if self._leaving is not None:
            torch.cuda.current_stream(self._device).wait_event(self._leaving[0])
            self._leaving = None

    def fetch(self, layer: int, piece: int) -> None:
        """Begin to bring a piece back. All must have left."""
        kept = self._kept.pop((layer, piece))
        if self._stream is None:
            self._coming[layer, piece] = kept, None
            return
        rooms = tuple(torch.empty(host.shape, dtype=host.dtype, device=self._device) for host in kept)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for room, host in zip(rooms, kept, strict=True):
                room.copy_(host, non_blocking=True)
            self._coming[layer, piece] = rooms, self._stream.record_event()

    def take(self, layer: int, piece: int) -> tuple[Tensor, ...]:
        """The tensors that `fetch` has brought."""
        tensors, arrived = self._coming.pop((layer, piece))
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensors

    def _places(self, layer: int, pieces: Pieces) -> list[tuple[Tensor, ...]]:
        """In one block, as each is rounded up to a power of two, and for all batches that are not longer.

        An outgrown one stays, as a captured graph may use it: graphs are not captured anew for a batch that outgrows it
        but is shorter than an evaluation's.
        """
        tensors = [tensor for piece in pieces for tensor in piece]
        sizes, tokens = [tensor.numel() for tensor in tensors], len(tensors[0])
        blocks = self._host.setdefault(layer, [])
        if not blocks or blocks[-1].numel() < sum(sizes):
            size = sum(sizes) // tokens * max(tokens, self._tokens)
            blocks.append(torch.empty(size, dtype=tensors[0].dtype, pin_memory=self._stream is not None))
        parts = iter(blocks[-1][: sum(sizes)].split(sizes))
        return [tuple(next(parts).view(tensor.shape) for tensor in piece) for piece in pieces]
