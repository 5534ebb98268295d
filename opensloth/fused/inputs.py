"""The tensors of one batch in shapes that come again: what is over is filled with tokens that count for nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensloth.data.batch import Batch
from opensloth.data.documents import IGNORE
from opensloth.fused.operations import LongDocuments, tiles_of

TOKENS = 256
"""Steps in which the number of tokens grows, and the least of the steps of targets and tiles."""
NEARLY = 15 / 16
"""From this part of a full batch on, a batch is filled up: of many lengths each would need blocks of memory that no
longer batch can use again."""
ROOM_STEP = 512
"""Steps in which a long document's places grow, as lengths have to come again.

A multiple of 128: with 64 keys over, cuDNN's way back has been seen to give NaN on Hopper where a row's scores are far
below zero (pytorch/pytorch#196678).
"""


@dataclass(frozen=True)
class Inputs:
    """ids, positions: int64 [T]. tiles: int32 [n, 3]. predictors, targets: int64 [m]. scale: float32 scalar.

    offsets: where documents begin, and T. long_lengths, long_rows, long_places: as `LongDocuments` has them, empty
    where no document is long.
    """

    ids: Tensor
    positions: Tensor
    tiles: Tensor
    predictors: Tensor
    targets: Tensor
    scale: Tensor
    offsets: list[int]
    long_lengths: tuple[int, ...]
    long_rows: Tensor
    long_places: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Equal for inputs that are computed by the same launches."""
        return len(self.ids), len(self.tiles), len(self.targets), *self.long_lengths

    @property
    def long(self) -> LongDocuments | None:
        return LongDocuments(self.long_lengths, self.long_rows, self.long_places) if self.long_lengths else None

    def to(self, device: torch.device) -> Inputs:
        """A copy on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def copy_(self, other: Inputs) -> None:
        """Take over the values of `other`, which has the same shape."""
        for name, tensor in self._tensors():
            tensor.copy_(getattr(other, name), non_blocking=True)

    def pinned(self) -> Inputs:
        """A copy that a GPU fetches without waiting."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors()}
        return dataclasses.replace(self, **changed)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]


def inputs_of(batch: Batch, scale: float, full: int = 0, *, long: int = 0) -> Inputs:
    """batch: flat, on the CPU. scale: what the gradient of the sum of losses is multiplied with. full: tokens of a full
    batch; 0: none is known. long: tokens of a document from which on it is long; 0: none is.

    Padding is one more document without targets. The row's last token predicts nothing, so that predictors
    without a target may point there.
    """
    offsets = batch.inputs["document_offsets"].tolist()
    tokens = padded_tokens(offsets[-1], full)
    over = tokens - offsets[-1]
    bounds = [(begin, end) for begin, end in itertools.pairwise(offsets) if long and end - begin >= long]
    if over:
        offsets = [*offsets, tokens]
    tiles = tiles_of(np.array(offsets))
    tiles = tiles[np.isin(tiles[:, 1], [begin for begin, _ in bounds], invert=True)]
    long_documents = long_documents_of(bounds, tokens)
    targets = _up(len(batch.targets), max(TOKENS, tokens // 16))
    return Inputs(
        ids=_filled(batch.inputs["input_ids"][0], tokens, 0),
        positions=torch.cat((batch.inputs["position_ids"][0], torch.arange(over))),
        tiles=torch.from_numpy(np.pad(tiles, ((0, _up(len(tiles), TOKENS // 4) - len(tiles)), (0, 0)))),
        predictors=_filled(batch.predictors, targets, tokens - 1),
        targets=_filled(batch.targets, targets, IGNORE),
        scale=torch.tensor(scale, dtype=torch.float32),
        offsets=offsets,
        long_lengths=long_documents.lengths,
        long_rows=long_documents.rows,
        long_places=long_documents.places,
    )


def long_documents_of(bounds: Iterable[tuple[int, int]], tokens: int) -> LongDocuments:
    """Of those that begin and end there, among so many tokens; on the CPU. Without any, all is empty."""
    with_room = sorted((_up(end - begin, ROOM_STEP), begin, end) for begin, end in bounds)
    lengths = tuple(length for length, *_ in with_room)
    rows, places = torch.full((sum(lengths),), -1), torch.full((tokens if lengths else 0,), -1)
    at = 0
    for length, begin, end in with_room:
        rows[at : at + end - begin] = torch.arange(begin, end)
        places[begin:end] = torch.arange(at, at + end - begin)
        at += length
    return LongDocuments(lengths, rows, places)


def padded_tokens(tokens: int, full: int = 0) -> int:
    """How many positions are computed for so many tokens. full: as in `inputs_of`."""
    return _up(full if NEARLY * full <= tokens <= full else tokens, TOKENS)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _filled(values: Tensor, length: int, value: int) -> Tensor:
    return torch.cat((values, values.new_full((length - len(values),), value)))
