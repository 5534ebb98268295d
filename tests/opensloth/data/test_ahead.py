"""Batches that are made while the step before trains."""

from __future__ import annotations

import threading

import pytest

from opensloth.data.ahead import Ahead


def test_the_next_step_is_made_meanwhile_and_none_beyond_the_last() -> None:
    made: list[tuple[int, str]] = []
    second = threading.Event()

    def make(step: int) -> list[int]:
        made.append((step, threading.current_thread().name))
        if step == 1:
            second.set()
        return [step]

    with Ahead(make, total=3) as ahead:
        assert ahead.batches(0) == [0]
        assert second.wait(10), "nothing was made ahead"
        assert [ahead.batches(step) for step in (1, 2)] == [[1], [2]]
    assert [step for step, _ in made] == [0, 1, 2]
    assert [name.startswith("batches") for _, name in made] == [False, True, True]


def test_another_step_than_the_next_is_made_at_once() -> None:
    with Ahead(lambda step: [step], total=10) as ahead:
        assert [ahead.batches(step) for step in (0, 5, 2)] == [[0], [5], [2]]


def test_what_fails_is_raised_where_it_is_asked_for() -> None:
    def make(step: int) -> list[int]:
        if step == 1:
            raise ValueError("row 7")
        return [step]

    with Ahead(make, total=3) as ahead:
        ahead.batches(0)
        with pytest.raises(ValueError, match="row 7"):
            ahead.batches(1)
