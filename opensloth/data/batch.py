"""From rows of documents to the tensors of one micro-batch.

Two layouts. *Flat*: all documents of all rows end to end in one line of T tokens, no padding; positions
restart in each document and offsets say where. It is for models that attend by `opensloth.attention`.
*Padded*: one document a row, padded on the right to the longest; it works for every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opensloth.data.documents import IGNORE, Int32Array


class Documents(Protocol):
    """What holds tokenised documents."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> tuple[Int32Array, Int32Array]:
        """input_ids and labels of document `index`, int32[n] each."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch. B lines of T positions (flat: B = 1), n targets.

    inputs: what the model's forward takes, besides logits_to_keep.
    predictors: int64[n], flattened positions (line * T + column) whose output predicts a target.
    targets: int64[n], the ids to predict.
    tokens: number of real tokens, padding left out.
    """

    inputs: dict[str, Any]
    predictors: Tensor
    targets: Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; to CUDA from pinned memory, without waiting for it."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        inputs = {key: moved(value) if isinstance(value, Tensor) else value for key, value in self.inputs.items()}
        return Batch(inputs, moved(self.predictors), moved(self.targets), self.tokens)


def flat_batch(documents: Documents, indices: npt.NDArray[np.integer]) -> Batch:
    """Documents end to end, in the order given."""
    pairs = [documents.row(int(index)) for index in indices]
    lengths = np.array([len(ids) for ids, _ in pairs], dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32))).astype(np.int32)
    ids = np.concatenate([ids for ids, _ in pairs]).astype(np.int64)
    labels = np.concatenate([labels for _, labels in pairs]).astype(np.int64)
    # No token predicts across a boundary: a document's first token is nobody's target.
    labels[offsets[:-1]] = IGNORE
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    target_at = np.flatnonzero(labels != IGNORE)
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
            "document_offsets": torch.from_numpy(offsets),
            "longest_document": int(lengths.max()),
        },
        predictors=torch.from_numpy(target_at - 1),
        targets=torch.from_numpy(labels[target_at]),
        tokens=len(ids),
    )


def padded_batch(documents: Documents, indices: npt.NDArray[np.integer], pad_id: int) -> Batch:
    """One document a line, padded on the right; the mask goes by length, never by the padding's id."""
    pairs = [documents.row(int(index)) for index in indices]
    longest = max(len(ids) for ids, _ in pairs)
    ids = np.full((len(pairs), longest), pad_id, dtype=np.int64)
    labels = np.full((len(pairs), longest), IGNORE, dtype=np.int64)
    mask = np.zeros((len(pairs), longest), dtype=np.int64)
    for line, (document_ids, document_labels) in enumerate(pairs):
        n = len(document_ids)
        ids[line, :n], labels[line, :n], mask[line, :n] = document_ids, document_labels, 1
    labels[:, 0] = IGNORE
    target_at = np.flatnonzero(labels.reshape(-1) != IGNORE)
    return Batch(
        inputs={"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)},
        predictors=torch.from_numpy(target_at - 1),
        targets=torch.from_numpy(labels.reshape(-1)[target_at]),
        tokens=int(mask.sum()),
    )
