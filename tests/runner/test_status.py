"""Files of a run -> its state."""

from __future__ import annotations

from typing import Any

import pytest

from opensloth.contract import Cause
from runner.backend import State
from runner.status import AttemptFacts, RunFacts, derive

STARTED = {"pid": 7, "time": 100.0}


def facts(**changes: Any) -> RunFacts:
    values = {"run": "a-12345678", "handle": "local://a-12345678", "name": "a", "folder": "/r", "submitting": False}
    return RunFacts(**values | changes)


def attempt(number: int = 1, **changes: Any) -> AttemptFacts:
    values: dict[str, Any] = {"started": STARTED, "ended": None, "stop": None, "alive": True}
    return AttemptFacts(number, **values | changes)


def ended(cause: str, **more: Any) -> dict[str, Any]:
    return {"cause": cause, "exit_code": 1, "message": "why", "hint": "what next", "time": 160.0} | more


STEP = {"event": "step", "step": 12, "total_steps": 60, "loss": 1.5, "eta": 80.0, "target_tokens_per_second": 99.0}


@pytest.mark.parametrize(
    ("attempts", "events", "submitting", "state", "cause"),
    [
        ([], [], True, State.PENDING, None),
        ([], [], False, State.FAILED, Cause.ERROR),
        ([attempt(started=None, alive=False)], [], True, State.PENDING, None),
        ([attempt(started=None, alive=False)], [], False, State.FAILED, Cause.KILLED),
        ([attempt()], [], False, State.PREPARING, None),
        ([attempt()], [{"event": "phase", "phase": "data"}], False, State.PREPARING, None),
        ([attempt()], [{"event": "phase", "phase": "model"}], False, State.PREPARING, None),
        ([attempt()], [{"event": "phase", "phase": "train"}], False, State.RUNNING, None),
        ([attempt()], [STEP], False, State.RUNNING, None),
        ([attempt(alive=False)], [STEP], False, State.FAILED, Cause.KILLED),
        ([attempt(alive=False, stop={"cause": Cause.CANCELLED})], [STEP], False, State.CANCELLED, Cause.CANCELLED),
        ([attempt(alive=False, stop={"cause": Cause.TERMINATED})], [STEP], False, State.FAILED, Cause.KILLED),
        ([attempt(ended=ended(Cause.SUCCEEDED))], [STEP], False, State.SUCCEEDED, Cause.SUCCEEDED),
        ([attempt(ended=ended(Cause.CANCELLED))], [STEP], False, State.CANCELLED, Cause.CANCELLED),
        ([attempt(ended=ended(Cause.DATA))], [], False, State.FAILED, Cause.DATA),
        ([attempt(ended=ended(Cause.TERMINATED))], [STEP], False, State.FAILED, Cause.TERMINATED),
        ([attempt(ended=ended(Cause.DATA)), attempt(2)], [STEP], False, State.RUNNING, None),
    ],
)
def test_states(
    attempts: list[AttemptFacts], events: list[dict[str, Any]], submitting: bool, state: State, cause: str | None
) -> None:
    status = derive(facts(submitting=submitting), attempts, events)
    assert (status.state, status.cause) == (state, cause)
    assert state is not State.FAILED or status.reason


def test_numbers_come_from_the_last_events() -> None:
    events = [{**STEP, "step": 11}, {"event": "eval", "loss": 1.25}, STEP, {"event": "checkpoint", "step": 12}]
    status = derive(facts(), [attempt(), attempt(3)], events)
    assert (status.step, status.total_steps, status.loss, status.eval_loss, status.eta) == (12, 60, 1.5, 1.25, 80.0)
    assert (status.attempt, status.started) == (3, 100.0)


def test_a_run_that_is_over_has_no_eta_and_only_success_has_a_result() -> None:
    failed = derive(facts(final="/r/final"), [attempt(ended=ended(Cause.ERROR))], [STEP])
    assert (failed.eta, failed.final, failed.reason, failed.hint, failed.ended) == (
        None,
        None,
        "why",
        "what next",
        160.0,
    )
    succeeded = derive(facts(final="/r/final"), [attempt(ended=ended(Cause.SUCCEEDED))], [STEP])
    assert succeeded.final == "/r/final"


def test_says_what_it_waits_for() -> None:
    progress = {"event": "progress", "phase": "tokenise", "done": 1200, "total": 5000, "unit": "rows"}
    status = derive(facts(), [attempt()], [{"event": "phase", "phase": "data"}, progress])
    assert status.reason == "preparing the dataset: tokenise 1,200 of 5,000 rows"
    status = derive(facts(), [attempt()], [progress, {"event": "phase", "phase": "model"}])
    assert status.reason == "loading the model"


def test_a_launcher_that_broke_off_is_quoted() -> None:
    status = derive(facts(last_words="OSError: no space left"), [attempt(alive=False)], [STEP])
    assert (status.cause, status.reason) == (Cause.ERROR, "the launcher broke off: OSError: no space left")


def test_a_launcher_that_never_started_is_quoted() -> None:
    status = derive(facts(last_words="ModuleNotFoundError: no torch"), [], [])
    assert status.reason == "the launcher ended before it had started: ModuleNotFoundError: no torch"
