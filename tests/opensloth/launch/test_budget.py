"""When another attempt may not start: restarts without progress, one step that kills, training time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from opensloth.contract import Cause
from opensloth.launch.budget import Past, deadline_passed, lost_in_a_row, refusal
from opensloth.launch.history import last_step, past_attempts


def past(*entries: tuple[str | None, int | None]) -> list[Past]:
    """From (cause, checkpoint's step at its start)."""
    return [Past(number, cause, "", step) for number, (cause, step) in enumerate(entries, start=1)]


def refused(attempts: Sequence[Past], step: int | None = None, **limits: float | None) -> str | None:
    ending = refusal(
        attempts,
        step,
        max_restarts=limits.get("restarts", 3),  # type: ignore[arg-type]
        deadline_seconds=limits.get("deadline"),
        last_step=lambda number: None,
    )
    return ending.cause if ending else None


@pytest.mark.parametrize("cost", [None, Cause.KILLED, Cause.HUNG, Cause.PEER_LOST, Cause.VOLUME])
def test_as_many_restarts_as_allowed_and_no_more(cost: str | None) -> None:
    assert refused([]) is None
    assert refused(past(*[(cost, None)] * 3)) is None
    assert refused(past(*[(cost, None)] * 4)) == Cause.BUDGET
    assert refused(past(*[(cost, None)] * 4), restarts=None) is None
    assert refused(past((cost, None)), restarts=0) == Cause.BUDGET


@pytest.mark.parametrize("free", [Cause.TERMINATED, Cause.CANCELLED, Cause.SUPERSEDED])
def test_a_clean_stop_costs_nothing_and_forgives_nothing(free: str) -> None:
    assert refused(past(*[(free, None)] * 9)) is None
    attempts = past((None, None), (free, None), (None, None))
    assert [attempt.number for attempt in lost_in_a_row(attempts, None)] == [1, 3]


def test_a_new_checkpoint_forgives_what_was_lost_before() -> None:
    attempts = past((None, None), (None, None), (None, 5), (None, 5))
    assert [attempt.number for attempt in lost_in_a_row(attempts, 5)] == [3, 4]
    assert lost_in_a_row(attempts, 6) == []
    assert refused(past(*[(None, step) for step in range(0, 60, 5)]), 60) is None


def test_a_final_end_forgives_because_somebody_resumed_by_hand() -> None:
    assert refused(past(*[(None, None)] * 4, (Cause.BUDGET, None))) is None


def test_the_message_tells_the_history() -> None:
    attempts = [Past(1, Cause.KILLED, "rank 1 was killed (SIGKILL)"), Past(2, None)]
    ending = refusal(attempts, None, max_restarts=1, deadline_seconds=None, last_step=lambda _: None)
    assert ending is not None
    assert "attempt 1 killed (rank 1 was killed (SIGKILL)); attempt 2 without an end" in ending.message
    many = refusal(past(*[(None, None)] * 30), None, max_restarts=1, deadline_seconds=None, last_step=lambda _: None)
    assert many is not None
    assert "22 more; attempt 23" in many.message


@pytest.mark.parametrize(
    ("causes", "steps", "expected"),
    [
        ((Cause.KILLED, Cause.KILLED), (7, 7), Cause.OUT_OF_MEMORY),
        ((None, Cause.KILLED), (7, 7), Cause.OUT_OF_MEMORY),
        ((None, None), (7, 7), None),
        ((Cause.KILLED, None), (7, 7), Cause.OUT_OF_MEMORY),
        ((Cause.KILLED, Cause.KILLED), (7, 8), None),
        ((Cause.KILLED, Cause.KILLED), (None, None), None),
        ((Cause.PEER_LOST, Cause.KILLED), (7, 7), None),
        ((Cause.VOLUME, Cause.VOLUME), (7, 7), None),
        ((None, Cause.OUT_OF_MEMORY), (7, 7), None),
    ],
)
def test_killed_twice_at_one_step(
    causes: tuple[str | None, str | None], steps: tuple[int | None, int | None], expected: str | None
) -> None:
    attempts = past((causes[0], None), (causes[1], None))
    ending = refusal(attempts, None, max_restarts=9, deadline_seconds=None, last_step=lambda number: steps[number - 1])
    assert (ending.cause if ending else None) == expected
    if ending:
        assert "killed twice at step 7" in ending.message


@pytest.mark.parametrize(("steps", "final"), [((7, 7, 7), True), ((6, 7, 7), False), ((None, None, None), False)])
def test_launchers_that_vanished_at_one_step_may_have_been_cancelled_by_force(
    steps: tuple[int | None, ...], final: bool
) -> None:
    attempts = past(*[(None, None)] * 3)
    ending = refusal(attempts, None, max_restarts=9, deadline_seconds=None, last_step=lambda number: steps[number - 1])
    assert (ending is not None) is final
    if ending:
        assert "killed three times at step 7 (attempts 1, 2, 3)" in ending.message


def test_the_deadline_is_for_all_attempts_together() -> None:
    attempts = [Past(1, Cause.TERMINATED, train_seconds=40), Past(2, None, train_seconds=60)]
    assert refused(attempts, deadline=101) is None
    assert refused(attempts, deadline=100) == Cause.DEADLINE
    assert deadline_passed(10**9, None) is None


def test_history_is_read_from_the_folder(tmp_path: Path) -> None:
    one, two = (tmp_path / "attempts" / number for number in ("1", "2"))
    one.mkdir(parents=True)
    two.mkdir()
    (one / "started.json").write_text('{"checkpoint_step": 5}')
    (one / "beat.json").write_text('{"beat": 3, "train_seconds": 12.5}')
    end = {"cause": "killed", "message": "m", "hint": "", "exit_code": 143, "time": 1}
    (one / "ended.json").write_text(json.dumps(end))
    expected = [Past(1, "killed", "m", 5, 12.5), Past(2, None)]
    assert past_attempts(tmp_path, before=3) == expected
    assert past_attempts(tmp_path, before=2) == expected[:1]
    steps = [(1, 6), (1, 7), (2, 6)]
    lines = [json.dumps({"event": "step", "attempt": attempt, "step": step}) for attempt, step in steps]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "step", "att')
    assert [last_step(tmp_path, attempt) for attempt in (1, 2, 3)] == [7, 6, None]
