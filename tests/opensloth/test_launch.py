"""The launcher as a process: what it writes, how it classifies an end, and that nothing breaks when it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launched import STEPS, Run, row

from opensloth.checkpoint import fault_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def test_two_ranks_to_a_finished_run(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, devices=2, max_steps=6)
    assert run.finish() == 0
    assert run.attempt("ended.json")["cause"] == "succeeded"
    kinds = [event["event"] for event in run.events()]
    assert kinds[0] == "phase"
    assert kinds[-1] == "end"
    assert {"plan", "step", "checkpoint", "result"} <= set(kinds)
    report = json.loads((run.folder / "report.json").read_text())
    assert report["steps"] == 6
    assert Path(report["final"]) == run.folder / "final"
    uses = [json.loads(path.read_text()) for path in (tmp_path / "cache" / ".uses").glob("*/*")]
    assert uses == [{"run": str(run.folder)}], "pruning must not take what a run uses"
    assert run.weights()


def test_a_killed_rank_is_named_and_the_run_goes_on_where_it_was(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, devices=2)
    run.start()
    run.until_step(12)
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.wait() == 143
    ended = run.attempt("ended.json")
    assert ended["cause"] == "killed"
    assert "was killed (SIGKILL)" in ended["message"]
    assert "out of memory" in ended["hint"]
    assert run.ranks() == []
    assert run.finish() == 0
    assert next(e for e in run.events() if e["event"] == "resumed")["step"] >= 10


@pytest.mark.parametrize("how", ["stop file", "SIGTERM to the launcher", "SIGTERM to a rank", "SIGINT"])
def test_a_request_to_stop_saves_the_step_it_stops_at(tmp_path: Path, model: Path, how: str) -> None:
    run = Run(tmp_path, model, devices=2, save_steps=1000)
    run.data.write_text("".join(row(i) for i in range(120)))
    run.start()
    run.until_step(3)
    if how == "stop file":
        (run.folder / "attempts" / "1" / "stop.json").write_text('{"cause": "cancelled", "time": 0}')
    elif how == "SIGTERM to a rank":
        os.kill(run.ranks()[1], signal.SIGTERM)
    else:
        assert run.process is not None
        run.process.send_signal(signal.SIGINT if how == "SIGINT" else signal.SIGTERM)
    assert run.wait() == 143
    ended = run.attempt("ended.json")
    assert ended["cause"] == ("cancelled" if how == "stop file" else "terminated")
    stopped_after = int(ended["message"].split()[3])
    kept = run.folder / "checkpoints" / f"step-{stopped_after:08d}"
    assert fault_in(kept) is None


def test_ranks_that_lose_their_launcher_stop(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model)
    run.start()
    run.until_step(3)
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 60
    while run.ranks():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (run.folder / "attempts" / "1" / "ended.json").exists()
    assert max(e["step"] for e in run.events() if e["event"] == "step") < STEPS


@pytest.mark.parametrize(
    ("spoil", "code", "cause", "said"),
    [
        (lambda run: run.data.write_text("not json\n"), 3, "data", "train.jsonl:1"),
        (lambda run: run.data.write_text(""), 3, "data", "train.jsonl"),
        (lambda run: (run.folder / "config.yaml").write_text("{}"), 2, "config", "missing"),
    ],
)
def test_a_users_fault_is_final_and_says_what(
    tmp_path: Path, model: Path, spoil: Callable[[Run], object], code: int, cause: str, said: str
) -> None:
    run = Run(tmp_path, model)
    spoil(run)
    assert run.finish() == code
    ended = run.attempt("ended.json")
    assert (ended["cause"], ended["exit_code"]) == (cause, code)
    assert said in ended["message"]


def test_a_loss_that_is_not_finite_is_final(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path, model, learning_rate=1e30, warmup_steps=0, max_grad_norm=0)
    assert run.finish() == 4
    ended = run.attempt("ended.json")
    assert ended["cause"] == "non_finite"
    assert "gradient norm" in ended["message"]
    assert "learning_rate" in ended["hint"]


@pytest.mark.timeout(900)
def test_killed_at_ten_random_points_it_still_ends_as_an_uninterrupted_run(tmp_path: Path, model: Path) -> None:
    """kill -9 and Ctrl-C, in preparation and in training; every resumed step is above zero, nothing is corrupt."""
    whole = Run(tmp_path / "whole", model, rows=400)
    assert whole.finish() == 0
    seed = random.randrange(1_000_000)
    dice = random.Random(seed)
    run = Run(tmp_path / "cut", model, rows=400)
    stops = [dice.uniform(0.05, 4.0) for _ in range(3)]  # seconds: while the dataset is prepared
    steps = sorted(dice.randrange(6, STEPS - 10) for _ in range(7))
    for seconds in stops:
        run.start()
        time.sleep(seconds)
        _interrupt(run, dice)
    for step in steps:
        run.start()
        run.until(_resumed_past(run, step))
        _interrupt(run, dice)
    assert run.finish() == 0, f"seed {seed}"
    resumed = [event["step"] for event in run.events() if event["event"] == "resumed"]
    assert len(resumed) >= len(steps) - 1, f"seed {seed}: {resumed}"
    assert min(resumed) > 0, f"seed {seed}"
    expected = whole.weights()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.weights().items()), f"seed {seed}"


def _resumed_past(run: Run, step: int) -> Callable[[list[dict[str, Any]]], bool]:
    """Whether the newest attempt has made a step, and the run has come to `step`."""
    seen = len(run.events())

    def passed(events: list[dict[str, Any]]) -> bool:
        return any(event["event"] == "step" and event["step"] >= step for event in events[seen:])

    return passed


def _interrupt(run: Run, dice: random.Random) -> None:
    assert run.process is not None
    number = dice.choice([signal.SIGKILL, signal.SIGINT])
    victim = dice.choice([run.process.pid, *run.ranks()]) if number == signal.SIGKILL else run.process.pid
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        run.process.kill()
    run.process.wait(timeout=180)
