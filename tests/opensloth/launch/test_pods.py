"""Launchers of several nodes as real processes: together they start, train, end, are lost and begin again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from launched import MakePods, Pods, Run

from opensloth.checkpoint import fault_in
from opensloth.pod_log import parse_end, parse_line

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def test_two_nodes_train_as_two_ranks_of_one_and_their_logs_say_all(tmp_path: Path, model: Path) -> None:
    steps = 6
    alone = Run(tmp_path / "alone", model, devices=2, max_steps=steps)
    alone.start()
    run = Pods(tmp_path / "pods", model, max_steps=steps)
    run.start_node(1)
    run.until_true(lambda: "waiting for node 0 to start" in run.out(1).read_text())
    run.start_node(0)
    assert run.codes() == [0, 0], run.said()
    assert alone.wait() == 0
    expected = alone.weights()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.weights().items())
    assert (run.folder / "config.yaml").read_text() == run.config_text
    assert parse_end(run.termination_log(1).read_text()) == ("succeeded", "", "")
    _check_rows(run, steps)
    for node in (0, 1):
        _check_pod_log(run, node)
    # Once more: there is nothing left to do, on any node.
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".out"}
    assert run.finish_all() == [0, 0]
    assert run.out(1).read_text().count("already succeeded") == 1
    assert '"event": "result"' in run.out(1).read_text()
    assert before == {path: path.read_bytes() for path in before}


def _check_rows(run: Run, steps: int) -> None:
    """The ranks see different rows; those of an epoch's steps are all different too."""
    seen: list[int] = []
    for rank in (0, 1):
        lines = (run.folder / "attempts" / "1" / f"rank-{rank}.log").read_text().splitlines()
        said = [line.split() for line in lines if line.startswith("step ") and " rows " in line]
        assert [int(words[1]) for words in said] == list(range(1, steps + 1))
        seen += [int(word) for words in said for word in words[3:]]
    assert len(seen) == len(set(seen))
    assert len(seen) == next(e for e in run.events() if e["event"] == "plan")["rows_per_step"] * steps


def _check_pod_log(run: Pods, node: int) -> None:
    """Every line is headed, and the rank's lines are its file, whole and in order."""
    lines = [parse_line(text) for text in run.out(node).read_text().splitlines()]
    assert all(line is not None for line in lines)
    of_rank = [line for line in lines if line is not None and line.rank == node]
    assert [line.number for line in of_rank] == list(range(len(of_rank)))
    assert [line.text for line in of_rank] == (
        run.folder / "attempts" / "1" / f"rank-{node}.log"
    ).read_text().splitlines()
    own = [line for line in lines if line is not None and line.rank == -1 - node and line.attempt == 1]
    assert [line.number for line in own] == list(range(len(own)))
    assert '"event": "end"' in own[-1].text


def test_a_terminated_worker_stops_all_after_a_checkpoint_and_all_resume(pods: MakePods) -> None:
    run = pods(save_steps=1000, max_steps=30)
    run.start()
    run.until_step(3)
    run.launchers[1].send_signal(signal.SIGTERM)
    assert run.codes() == [143, 143]
    ended = run.attempt("ended.json")
    assert ended["cause"] == "terminated"
    assert fault_in(run.folder / "checkpoints" / f"step-{int(ended['message'].split()[3]):08d}") is None
    assert run.finish_all() == [0, 0]
    assert run.resumed() == [int(ended["message"].split()[3])]
    assert "dataset found in the cache" in run.out(1).read_text()


@pytest.mark.parametrize("lost", [1, 0])
def test_a_pod_that_vanishes_is_replaced_and_a_fresh_attempt_resumes(pods: MakePods, lost: int) -> None:
    run = pods(max_steps=60)
    run.start()
    run.until_step(8)
    run.kill_pod(lost)
    run.start_node(lost)  # what the operator does; it finds its predecessor's place taken
    other = 1 - lost
    assert run.launchers[other].wait(timeout=120) == 143, run.said()
    run.start_node(other)
    assert run.codes() == [0, 0], run.said()
    assert min(run.resumed()) >= 5
    first = run.folder / "attempts" / "1"
    if lost == 1:
        assert run.attempt("ended.json", 1)["cause"] == "peer_lost"
    else:
        assert not (first / "ended.json").exists()


def test_a_place_that_another_pod_holds_is_declared_lost_at_once(pods: MakePods) -> None:
    """The ranks still run: nobody has noticed yet but the successor."""
    run = pods()
    run.start()
    run.until_step(2)
    first = run.launchers[1]
    run.start_node(1)
    assert first.wait(timeout=30) == 143
    assert run.launchers[0].wait(timeout=30) == 143
    assert run.attempt("lost.json")["node"] == 1
    assert run.attempt("ended.json")["cause"] == "peer_lost"
    assert run.ranks() == []


def test_a_users_fault_ends_both_with_the_same_final_code(pods: MakePods) -> None:
    run = pods()
    run.data.write_text("not json\n")
    assert run.finish_all() == [3, 3]
    for node in (0, 1):
        end = parse_end(run.termination_log(node).read_text())
        assert end is not None
        assert end[0] == "data"
        assert "train.jsonl:1" in end[1]


def test_a_loss_that_is_not_finite_ends_both(pods: MakePods) -> None:
    run = pods(learning_rate=1e30, warmup_steps=0, max_grad_norm=0)
    assert run.finish_all() == [4, 4]


def test_a_node_that_does_not_start_in_time_is_named(pods: MakePods) -> None:
    run = pods(env={"OSLO_START_TIMEOUT_SECONDS": "15"})
    run.start_node(0)
    assert run.launchers[0].wait(timeout=60) == 8
    ended = run.attempt("ended.json")
    assert ended["cause"] == "start_timeout"
    assert "node 1 of 2 did not start within 15s" in ended["message"]
    assert "waiting for node 1 of 2 to start" in run.out(0).read_text()


def test_a_late_worker_joins_and_a_silent_master_is_left(pods: MakePods) -> None:
    run = pods(max_steps=4, env={"OSLO_STALE_SECONDS": "3"})
    run.start_node(0)
    run.until_true(lambda: "waiting for node 1" in run.out(0).read_text())
    run.kill_pod(0)
    run.start_node(1)
    run.until_true(lambda: "which is not heard of in attempt 1" in run.out(1).read_text())
    run.start_node(0)
    assert run.codes() == [0, 0], run.said()
    assert {path.name for path in (run.folder / "attempts" / "2").glob("joined-*")} == {"joined-1.json"}


def test_terminated_before_the_ranks_exist(pods: MakePods) -> None:
    run = pods()
    run.start_node(1)
    run.until_true(lambda: "waiting for node 0" in run.out(1).read_text())
    begin = time.monotonic()
    run.launchers[1].send_signal(signal.SIGTERM)
    assert run.launchers[1].wait(timeout=10) == 143
    assert time.monotonic() - begin < 3
    assert not (run.folder / "attempts" / "1").exists()


def test_a_newer_attempt_stops_the_older_which_writes_nothing_more(pods: MakePods) -> None:
    run = pods(save_steps=1)
    run.start()
    run.until_step(5)
    (run.folder / "attempts" / "2").mkdir()
    time.sleep(0.5)  # a step that has begun ends
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert run.codes() == [143, 143]
    assert run.attempt("ended.json", 1)["cause"] == "superseded"
    assert sorted(path.name for path in (run.folder / "checkpoints").glob("step-*")) == [
        name for name in kept if name.startswith("step-")
    ]
    assert not (run.folder / "report.json").exists()


def test_the_deadline_counts_over_attempts_and_saves(pods: MakePods) -> None:
    run = pods(nodes=1, save_steps=1000, max_steps=50_000, env={"OSLO_DEADLINE_SECONDS": "900"})
    run.start()
    run.until_step(2)
    run.launchers[0].send_signal(signal.SIGTERM)
    assert run.codes() == [143]
    assert run.attempt("beat.json", 1)["train_seconds"] > 1
    run.env["OSLO_DEADLINE_SECONDS"] = str(run.attempt("beat.json", 1)["train_seconds"] + 9)
    assert run.finish_all() == [6]
    ended = run.attempt("ended.json")
    assert ended["cause"] == "deadline"
    assert "(job.deadline)" in ended["message"]
    assert fault_in(run.folder / "checkpoints" / f"step-{int(ended['message'].split()[3]):08d}") is None
    assert run.finish_all() == [6]
    assert not list((run.folder / "attempts" / "3").glob("rank-*")), "it is over before it begins"


def test_a_budget_that_is_spent_is_final_and_tells_the_history(pods: MakePods) -> None:
    run = pods(nodes=1, env={"OSLO_MAX_RESTARTS": "1"})
    for number in (1, 2):
        folder = run.folder / "attempts" / str(number)
        folder.mkdir(parents=True)
        (folder / "started.json").write_text("{}")
    assert run.finish_all() == [7]
    message = run.attempt("ended.json")["message"]
    assert "2 attempts in a row" in message
    assert "attempt 1 without an end; attempt 2 without an end" in message


def test_killed_at_one_step_is_out_of_memory(pods: MakePods) -> None:
    run = pods(nodes=1)
    for number in (1, 2, 3):
        (run.folder / "attempts" / str(number)).mkdir(parents=True)
    events = [{"event": "step", "step": 7, "attempt": number, "rank": 0, "time": 0} for number in (1, 2, 3)]
    (run.folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run.finish_all() == [5]
    assert "killed three times at step 7" in run.attempt("ended.json")["message"]


def test_one_torchrun_that_is_killed_ends_both_in_infrastructure(pods: MakePods) -> None:
    run = pods()
    run.start()
    run.until_step(2)
    for process in run.torchruns(1):
        os.kill(process, signal.SIGKILL)
    assert run.codes() == [143, 143]
    ended = run.attempt("ended.json")
    assert ended["cause"] == "killed", run.said()
    assert "torchrun was killed (SIGKILL)" in ended["message"]
