"""Packing: against a textbook implementation, and the properties that training leans on."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensloth.data.pack import best_fit_decreasing, one_document_a_row


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Room used in each row by best fit decreasing, one document at a time."""
    used: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, tokens in enumerate(used) if tokens + length <= capacity]
        if fitting:
            used[max(fitting, key=lambda row: used[row])] += length
        else:
            used.append(length)
    return sorted(used)


@given(st.data(), st.integers(1, 60))
def test_it_is_best_fit_decreasing(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    plan = best_fit_decreasing(np.array(lengths, dtype=np.int32), capacity)
    used = [sum(lengths[i] for i in plan.row(row)) for row in range(len(plan))]
    assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
    assert sorted(used) == textbook(lengths, capacity)


def test_a_million_documents_fill_their_rows_in_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(350), 0.8, 1_000_000).clip(16, 4096).astype(np.int32)
    started = time.monotonic()
    plan = best_fit_decreasing(lengths, 4096)
    assert time.monotonic() - started < 5
    assert lengths.sum() / (len(plan) * 4096) > 0.999


@pytest.mark.parametrize("lengths", [[5], [0]])
def test_lengths_outside_the_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be 1 to 4"):
        best_fit_decreasing(np.array(lengths), 4)


def test_one_document_a_row() -> None:
    plan = one_document_a_row(3)
    assert [plan.row(row).tolist() for row in range(len(plan))] == [[0], [1], [2]]
