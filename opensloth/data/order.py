"""The order in which rows are seen: one global list, the same for every rank count and after every resume.

Step s of a run belongs to epoch s // steps_per_epoch; an epoch is a permutation of all rows drawn from
(seed, epoch) alone. So the position in the data is the step number, and nothing else needs to be stored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opensloth.arithmetic import BatchShape
from opensloth.data.pack import PackPlan

Int64Array = npt.NDArray[np.int64]


def epoch_order(rows: int, seed: int, epoch: int, *, shuffle: bool) -> Int64Array:
    """int64[rows]: the rows of one epoch. Shuffled because packing leaves them sorted by length."""
    if not shuffle:
        return np.arange(rows, dtype=np.int64)
    return np.random.default_rng((seed, epoch)).permutation(rows)


def plan_sha256(plan: PackPlan) -> str:
    """Hex hash of a packing plan: equal hashes mean equal rows."""
    digest = hashlib.sha256(np.ascontiguousarray(plan.starts).tobytes())
    digest.update(np.ascontiguousarray(plan.documents).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class RowOrder:
    """Which rows make up which step.

    rows: rows of an epoch.
    drop_last: leave out an epoch's last step when it is short.
    """

    rows: int
    shape: BatchShape
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.rows, self.shape.rows_per_step)
        return whole if self.drop_last else whole + bool(rest)

    def step_rows(self, step: int) -> Int64Array:
        """The rows of the whole step over all ranks, step from 0; shorter at the end of an epoch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.rows, self.seed, epoch, shuffle=self.shuffle)
        size = self.shape.rows_per_step
        return order[index * size : (index + 1) * size]

    def micro_batches(self, step: int, rank: int) -> list[Int64Array]:
        """The rows of each micro-batch of one rank: `accumulation` arrays, the last ones possibly empty.

        Micro-batch m of the step is split among the ranks, so that the rows of a step, and with them the
        gradient, do not depend on how many ranks share them.
        """
        rows = self.step_rows(step)
        each = self.shape.per_device
        first = [(micro * self.shape.world + rank) * each for micro in range(self.shape.accumulation)]
        return [rows[begin : begin + each] for begin in first]
