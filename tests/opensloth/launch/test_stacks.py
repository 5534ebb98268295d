"""Stacks of all nodes are there before a node ends its ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from opensloth import contract
from opensloth.launch import stacks
from opensloth.launch.attempt import Attempt


def save(attempt: Attempt, rank: int) -> None:
    (attempt.folder / contract.RANK_STACKS.format(rank=rank)).write_text(f"rank {rank}: standing\nstate: S\n\n")


def test_the_other_nodes_stacks_are_waited_for(tmp_path: Path) -> None:
    attempt = Attempt.allocate(tmp_path, nodes=2)
    save(attempt, 0)
    later = threading.Timer(0.5, save, (attempt, 1))
    later.start()
    stacks.await_stacks(attempt, ranks=2)
    assert not later.is_alive()
    assert len(stacks.hung_ending(attempt).message.split("; ")) == 2


def test_a_node_that_stands_still_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "OTHERS_SECONDS", 0.3)
    attempt, began = Attempt.allocate(tmp_path, nodes=2), time.monotonic()
    save(attempt, 1)
    stacks.await_stacks(attempt, ranks=2)
    assert 0.3 <= time.monotonic() - began < 5
