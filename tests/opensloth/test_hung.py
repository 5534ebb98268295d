"""A rank that makes no progress is noticed; the stacks of all ranks are saved, and the run can go on. About 3 min."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from launched import MakePods, Run, with_faults
from measured import at_most

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(240)]
HUNG_SECONDS = 10
"""Six times as much for the start, which a busy machine needs."""
NOTICED = "seconds to notice a hung rank, above the limit"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def hanging(how: str, *, rank: int = 1, step: int = 8) -> dict[str, str]:
    fault = {"how": how, "rank": rank, "step": step}
    return {"OSLO_HUNG_SECONDS": str(HUNG_SECONDS)} | with_faults(hang=fault)


def seconds_after_last_step(run: Run) -> float:
    steps = [event["time"] for event in run.events() if event["event"] == "step" and event["attempt"] == 1]
    return float(run.attempt("ended.json", 1)["time"]) - max(steps)


@pytest.mark.parametrize("how", ["a lock", "an endless loop", "native code that holds the interpreter"])
def test_a_hung_rank_is_named_with_its_place(tmp_path: Path, model: Path, how: str) -> None:
    run = Run(tmp_path, model, devices=2)
    run.env = hanging(how)
    assert run.finish() == 143, run.said()
    ended = run.attempt("ended.json")
    assert ended["cause"] == "hung", ended
    assert "at step 8: rank 1 stands at faults/sitecustomize.py:" in ended["message"]
    assert "in stand_still, called at opensloth/trainer.py:" in ended["message"]
    assert ended["message"].endswith("; 1 other waits for it")
    at_most(NOTICED, seconds_after_last_step(run) - HUNG_SECONDS, 10)
    stacks = [(run.folder / "attempts" / "1" / f"rank-{rank}.stacks").read_text() for rank in (0, 1)]
    assert "rank 1: process " in stacks[1]
    assert "all_reduce" in stacks[0]
    assert "in stand_still" in stacks[1]
    assert run.ranks() == []


def test_a_rank_that_waits_for_a_file_for_ever_costs_the_steps_since_the_checkpoint(
    tmp_path: Path, model: Path
) -> None:
    whole = Run(tmp_path / "whole", model, max_steps=12)
    assert whole.finish() == 0
    run = Run(tmp_path / "hung", model, max_steps=12)
    run.env = hanging("a pipe that nobody writes to", rank=0)
    assert run.finish() == 143, run.said()
    assert "at step 8: rank 0 stands at faults/sitecustomize.py:" in run.attempt("ended.json")["message"]
    assert run.finish() == 0, run.said()
    assert [event["step"] for event in run.events() if event["event"] == "resumed"] == [5]
    expected = whole.weights()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.weights().items())


def test_a_rank_that_was_stopped_is_named(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, devices=2)
    run.env = {"OSLO_HUNG_SECONDS": str(HUNG_SECONDS)}
    run.start()
    run.until_step(3)
    os.kill(run.ranks()[0], signal.SIGSTOP)
    assert run.wait() == 143
    ended = run.attempt("ended.json")
    assert ended["cause"] == "hung"
    assert "was stopped by a signal and stands at " in ended["message"]
    assert run.ranks() == []


def test_on_two_nodes_the_stacks_of_both_are_saved_and_both_end(pods: MakePods) -> None:
    run = pods(max_steps=12, env=hanging("a lock"))
    run.start()
    assert run.codes() == [143, 143], run.said()
    ended = run.attempt("ended.json")
    assert ended["cause"] == "hung"
    assert "rank 1 stands at faults/sitecustomize.py:" in ended["message"]
    assert ended["message"].endswith("; 1 other waits for it")
    for node in (0, 1):
        stack = (run.folder / "attempts" / "1" / f"rank-{node}.stacks").read_text()
        assert ("in stand_still" if node == 1 else "all_reduce") in stack
        assert '"cause": "hung"' in run.out(node).read_text()
    assert run.finish_all() == [0, 0], run.said()
    assert run.resumed() == [5]


def test_a_node_that_stands_still_as_a_whole_is_noticed_by_the_others(pods: MakePods) -> None:
    run = pods(env={"OSLO_HUNG_SECONDS": str(HUNG_SECONDS)})
    run.start()
    run.until_step(3)
    for process in (run.launchers[1].pid, *run.torchruns(1), *run.ranks(1)):
        os.kill(process, signal.SIGSTOP)
    assert run.launchers[0].wait(timeout=120) == 143, run.said()
    ended = run.attempt("ended.json")
    assert ended["cause"] == "hung"
    assert ended["message"].endswith(": 1 rank waits for others; nothing was heard of node 1")


def test_a_slow_checkpoint_is_not_taken_for_a_hang(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, devices=2, max_steps=8)
    run.env = {"OSLO_HUNG_SECONDS": str(HUNG_SECONDS)} | with_faults(save_seconds=2 * HUNG_SECONDS)
    assert run.finish() == 0, run.said()
    saved = [event for event in run.events() if event["event"] == "checkpoint"]
    assert [event["step"] for event in saved] == [5]
    assert saved[0]["seconds"] > 2 * HUNG_SECONDS


def test_hung_again_and_again_spends_the_budget(pods: MakePods) -> None:
    run = pods(nodes=1, save_steps=1000, env=hanging("a lock", rank=0, step=2) | {"OSLO_MAX_RESTARTS": "0"})
    assert run.finish_all() == [143], run.said()
    assert run.finish_all() == [7]
    assert "attempt 1 hung (no progress for " in run.attempt("ended.json")["message"]
