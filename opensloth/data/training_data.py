"""The rows of a run: packed from prepared documents, handed out as micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from opensloth.data.batch import Batch, Documents, flat_batch, padded_batch
from opensloth.data.order import plan_sha256
from opensloth.data.pack import PackPlan, best_fit_decreasing, one_document_a_row


class PreparedDocuments(Documents, Protocol):
    """Prepared documents with what packing needs to know of them.

    lengths, targets: int32[n], tokens and target tokens of each document.
    """

    lengths: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]

    def epoch_documents(self) -> npt.NDArray[np.int64]:
        """int64[m]: the documents of an epoch, repeated or left out by their dataset's weight."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of documents, packed or one document each.

    members: int64[m], the documents that are seen, which `plan` counts from 0.
    packed: batches are flat (`data.batch`); else padded.
    """

    documents: PreparedDocuments
    members: npt.NDArray[np.int64]
    plan: PackPlan
    packed: bool
    capacity: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def tokens(self) -> int:
        return int(self.documents.lengths[self.members].sum())

    @property
    def targets(self) -> int:
        return int(self.documents.targets[self.members].sum())

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.tokens / (len(self) * self.capacity)

    def sha256(self) -> str:
        """Equal for equal rows: what a checkpoint is tied to."""
        return plan_sha256(PackPlan(self.plan.starts, self.members[self.plan.documents]))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.documents.lengths[self.members].max())

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The tensors of some rows, at least one."""
        chosen = self.members[np.concatenate([self.plan.row(int(row)) for row in rows])]
        if self.packed:
            return flat_batch(self.documents, chosen)
        return padded_batch(self.documents, chosen, self.pad_id)


def make_rows(documents: PreparedDocuments, capacity: int, *, packed: bool, pad_id: int) -> Rows:
    """Plan the rows of an epoch, globally and from lengths alone.

    capacity: tokens of a packed row; longer documents are left out (preparation has counted them).
    """
    members = documents.epoch_documents()
    members = members[documents.lengths[members] <= capacity]
    lengths = documents.lengths[members]
    plan = best_fit_decreasing(lengths, capacity) if packed else one_document_a_row(len(members))
    return Rows(documents, members, plan, packed, capacity, pad_id)
