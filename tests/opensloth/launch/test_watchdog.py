"""When ranks count as hung, and what is said of where they stand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from opensloth.contract import Cause
from opensloth.launch.attempt import Attempt
from opensloth.launch.stacks import hung_ending, save_stacks
from opensloth.launch.watchdog import Watchdog
from opensloth.pulse import Kind, Pulse, read_standing

FLOOR = 600.0


class Machine:
    """Ranks that say where they stand, and a watchdog with a clock of its own that looks every second."""

    def __init__(self, folder: Path, ranks: int = 1) -> None:
        self.folder, self.now = folder, 0.0
        self.watchdog = Watchdog(folder, range(ranks), FLOOR, lambda: self.now)
        self.beats = 0

    def says(self, doing: str, kind: str = Kind.STEP, rank: int = 0) -> None:
        self.beats += 1
        (self.folder / f"rank-{rank}.pulse").write_text(f"7 {self.beats} {kind} {doing}")

    def seconds_to_stall(self, at_most: int = 20_000) -> float | None:
        begin = self.now
        while self.now - begin < at_most:
            self.now += 1
            if self.watchdog.look():
                return self.now - begin
        return None

    def passes(self, seconds: int) -> None:
        assert self.seconds_to_stall(seconds) is None


def test_a_rank_says_where_it_stands(tmp_path: Path) -> None:
    assert read_standing(tmp_path, 3) is None
    pulse = Pulse(tmp_path, 3)
    beats = []
    for say in (lambda: pulse.at("evaluation"), lambda: pulse.step(9, first=True), lambda: pulse.step(10, first=False)):
        say()
        said = read_standing(tmp_path, 3)
        assert said is not None
        beats.append((said.beats, said.kind, said.doing))
    pulse.beat()
    assert beats == [(2, "other", "evaluation"), (3, "first-step", "step 9"), (4, "step", "step 10")]
    assert read_standing(tmp_path, 3) != said
    Pulse().at("nobody listens")


@pytest.mark.parametrize(
    ("kind", "seconds"), [(Kind.STEP, FLOOR), (Kind.FIRST_STEP, 6 * FLOOR), (Kind.OTHER, 6 * FLOOR), (None, 6 * FLOOR)]
)
def test_what_has_a_length_of_its_own_may_take_longer_than_a_step(
    tmp_path: Path, kind: str | None, seconds: float
) -> None:
    machine = Machine(tmp_path)
    if kind:
        machine.says("something", kind)
    assert machine.seconds_to_stall() == pytest.approx(seconds, abs=2)


def test_a_slow_run_is_not_hung(tmp_path: Path) -> None:
    """Micro-batches of three minutes, in one step of an hour; the next step has none here and waits for the others."""
    machine = Machine(tmp_path)
    for _ in range(20):
        machine.says("step 2")
        machine.passes(180)
    machine.says("step 3")
    assert machine.seconds_to_stall() == pytest.approx(2 * 3600, abs=30)


def test_one_rank_that_waits_while_another_goes_on_is_not_hung(tmp_path: Path) -> None:
    machine = Machine(tmp_path, ranks=2)
    machine.says("step 2", rank=1)
    for _ in range(30):
        machine.says("step 2", rank=0)
        machine.passes(60)
    stalled = machine.seconds_to_stall()
    assert stalled == pytest.approx(FLOOR, abs=62)
    stall = machine.watchdog.look()
    assert stall is not None
    assert (stall.rank, stall.doing) == (1, "step 2"), "the one that stood still first"


def test_a_launcher_that_was_frozen_together_with_its_ranks_does_not_blame_them(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.says("step 2")
    machine.passes(10)
    machine.now += 9 * 3600
    assert machine.watchdog.look() is None
    machine.says("step 3")
    machine.passes(500)


def test_a_process_that_is_no_rank_any_more_is_left_alone(tmp_path: Path) -> None:
    """The signal would end it."""
    attempt = Attempt.allocate(tmp_path, 1)
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "rank-0.pulse").write_text(f"{other.pid} 7 step step 4")
        save_stacks(attempt, range(2), tmp_path)
        assert other.poll() is None
        other.kill()
    for rank in (0, 1):
        said = (attempt.folder / f"rank-{rank}.stacks").read_text()
        assert said == f"rank {rank}: it has not begun, or has left\nstate: gone\n\n"


HEAD = "rank {rank}: process 7, step 4\nstate: {state}\n\n"
WAITS = """Thread 0x00007f01 (most recent call first):
  File "/x/threading.py", line 331 in wait

Current thread 0x00007f02 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3023 in all_reduce
  File "/x/opensloth/dist.py", line 83 in sum_over_ranks
  File "/x/opensloth/trainer.py", line 155 in train
"""
STANDS = """Thread 0x00007f02 (most recent call first):
  File "/x/lib/python3.11/threading.py", line 331 in wait
  File "/x/opensloth/orders.py", line 44 in cause
"""


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (
            [("S", WAITS), ("S", STANDS)],
            "no progress for 11m00s at step 4: rank 1 stands at python3.11/threading.py:331 in wait, called at "
            "opensloth/orders.py:44 in cause; 1 other waits for it",
        ),
        ([("T", WAITS), ("S", WAITS), ("S", WAITS)], "rank 0 was stopped by a signal and stands at "),
        ([("S", WAITS), ("D wait_on_page", "")], "rank 1 is stuck in the kernel; 1 other waits for it"),
        ([("S", WAITS), ("gone", "")], "rank 1 has not begun, or has left; 1 other waits for it"),
        ([("S", WAITS)] * 2, ": 2 ranks wait for others"),
        ([("S", STANDS)] * 6, "; 2 more stand still"),
        ([], "no rank could be looked at"),
    ],
)
def test_who_stands_where(tmp_path: Path, ranks: list[tuple[str, str]], said: str) -> None:
    attempt = Attempt.allocate(tmp_path, 1)
    attempt.declare_hung(0, 1, 660.0, "step 4")
    for rank, (state, stack) in enumerate(ranks):
        (attempt.folder / f"rank-{rank}.stacks").write_text(HEAD.format(rank=rank, state=state) + stack)
    assert "nothing was heard" not in hung_ending(attempt).message
    assert hung_ending(attempt, [2, 3]).message.endswith("nothing was heard of node 2, 3")
    ending = hung_ending(attempt)
    assert (ending.cause, ending.exit_code) == (Cause.HUNG, 143)
    assert said in ending.message
    assert f"{attempt.folder}/rank-*.stacks" in ending.hint
