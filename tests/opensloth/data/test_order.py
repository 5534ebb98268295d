"""The global order of rows: the same whoever shares the work."""

from __future__ import annotations

import numpy as np
import pytest

from opensloth.arithmetic import BatchShape
from opensloth.data.order import RowOrder

ROWS, PER_STEP = 41, 8


def order(per_device: int, accumulation: int, world: int, **options: bool) -> RowOrder:
    return RowOrder(ROWS, BatchShape(per_device, accumulation, world), seed=7, **options)


def rows_of(plan: RowOrder, step: int) -> list[int]:
    """The rows that the ranks take together, in no order."""
    ranks = range(plan.shape.world)
    return sorted(int(row) for rank in ranks for micro in plan.micro_batches(step, rank) for row in micro)


@pytest.mark.parametrize("split", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (2, 1, 4)])
def test_every_split_sees_the_same_rows_in_every_step(split: tuple[int, int, int]) -> None:
    reference = order(8, 1, 1)
    for step in range(2 * reference.steps_per_epoch):
        assert rows_of(order(*split), step) == sorted(reference.step_rows(step).tolist())


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order() -> None:
    plan = order(2, 2, 2)
    epochs = [
        np.concatenate([plan.step_rows(epoch * plan.steps_per_epoch + s) for s in range(plan.steps_per_epoch)])
        for epoch in range(2)
    ]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(ROWS))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_last_step_is_short_or_dropped() -> None:
    assert len(order(8, 1, 1).step_rows(5)) == ROWS % PER_STEP
    assert order(8, 1, 1, drop_last=True).steps_per_epoch == ROWS // PER_STEP


def test_sequential() -> None:
    assert order(8, 1, 1, shuffle=False).step_rows(1).tolist() == list(range(8, 16))
