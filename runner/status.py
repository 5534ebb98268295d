"""What a run's files say about it -> RunStatus. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensloth.contract import Cause
from runner.backend import RunStatus, State
from runner.event_log import Event

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    submitting: whether somebody is starting it right now.
    last_words: the last line that the launcher printed after its last event, a traceback's say; "" when none.
    """

    run: str
    handle: str
    name: str
    folder: str
    submitting: bool
    last_words: str = ""
    final: str | None = None
    """Path of the result, if it is there."""


@dataclass(frozen=True)
class AttemptFacts:
    """The files of one attempt, each None when it is not there."""

    number: int
    started: Record | None
    ended: Record | None
    stop: Record | None
    alive: bool
    """Whether its launcher still runs."""


_STATE_OF_CAUSE = {Cause.SUCCEEDED: State.SUCCEEDED, Cause.CANCELLED: State.CANCELLED}
"""Every other cause is a failure."""


def derive(run: RunFacts, attempts: Sequence[AttemptFacts], events: Sequence[Event]) -> RunStatus:
    """The status of a run.

    attempts: by number; events: the last ones of the latest attempt.
    """
    if not attempts:
        return _without_attempt(run)
    last = attempts[-1]
    state, ending = _state(run, last, events)
    waiting = reason_to_wait(state, events)
    first = attempts[0].started
    return RunStatus(
        run=run.run,
        handle=run.handle,
        name=run.name,
        state=state,
        **progress(state, events),
        attempt=last.number,
        cause=ending.get("cause"),
        reason=ending.get("message") or waiting,
        hint=ending.get("hint") or None,
        exit_code=ending.get("exit_code"),
        started=first["time"] if first else None,
        ended=ending.get("time"),
        folder=run.folder,
        final=run.final if state is State.SUCCEEDED else None,
    )


def progress(state: State, events: Sequence[Event]) -> dict[str, Any]:
    """The fields of RunStatus that the events of an attempt tell."""
    return {
        "phase": _last(events, "phase", "phase"),
        "step": _first_known(_last(events, "step", "step"), _last(events, "resumed", "step")),
        "total_steps": _first_known(_last(events, "step", "total_steps"), _last(events, "plan", "total_steps")),
        "epoch": _last(events, "step", "epoch"),
        "loss": _last(events, "step", "loss"),
        "eval_loss": _last(events, "eval", "loss"),
        "target_tokens_per_second": _last(events, "step", "target_tokens_per_second"),
        "eta": None if state.is_over else _last(events, "step", "eta"),
    }


def has_trained(events: Sequence[Event]) -> bool:
    """Whether the attempt has come as far as training."""
    return any(event["event"] == "step" for event in events) or _last(events, "phase", "phase") == "train"


def _state(run: RunFacts, last: AttemptFacts, events: Sequence[Event]) -> tuple[State, Record]:
    """The state, and what ended.json says or would say."""
    if last.ended is not None:
        return _STATE_OF_CAUSE.get(last.ended["cause"], State.FAILED), last.ended
    if last.started is None and not run.submitting:
        return State.FAILED, {"cause": Cause.KILLED, "message": "the launcher was killed while it started"}
    if last.started is None:
        return State.PENDING, {}
    if not last.alive:
        return _gone(run, last)
    return (State.RUNNING if has_trained(events) else State.PREPARING), {}


def _gone(run: RunFacts, last: AttemptFacts) -> tuple[State, Record]:
    """An attempt whose launcher is gone without a word."""
    if last.stop is not None and last.stop.get("cause") == Cause.CANCELLED:
        return State.CANCELLED, {"cause": Cause.CANCELLED, "message": "cancelled; the launcher was killed"}
    if run.last_words:
        return State.FAILED, {"cause": Cause.ERROR, "message": f"the launcher broke off: {run.last_words}"}
    return State.FAILED, {
        "cause": Cause.KILLED,
        "message": f"the launcher (process {last.started['pid'] if last.started else '?'}) was killed: "
        "it is gone and left no word",
        "hint": "if nobody killed it, the machine restarted or ran out of memory (see `dmesg`)",
    }


def _without_attempt(run: RunFacts) -> RunStatus:
    if run.submitting:
        state, reason = State.PENDING, "waiting for the launcher to start"
    else:
        state, reason = State.FAILED, "the launcher ended before it had started"
    return RunStatus(
        run=run.run,
        handle=run.handle,
        name=run.name,
        state=state,
        reason=f"{reason}: {run.last_words}" if run.last_words and state is State.FAILED else reason,
        cause=Cause.ERROR if state is State.FAILED else None,
        folder=run.folder,
    )


def reason_to_wait(state: State, events: Sequence[Event]) -> str | None:
    """What a run that is being prepared does, from the events of its attempt."""
    if state is State.PENDING:
        return "waiting for the launcher to start"
    if state is not State.PREPARING:
        return None
    phase = _last(events, "phase", "phase")
    doing = {"data": "preparing the dataset", "model": "loading the model"}.get(phase or "", "starting")
    for event in reversed(events):
        if event["event"] == "phase":
            break
        if event["event"] == "progress":
            done, total, unit = event.get("done"), event.get("total"), event.get("unit", "")
            of = f" of {total:,}" if total else ""
            return f"{doing}: {event.get('phase')} {done:,}{of} {unit}".rstrip()
    return doing


def _last(events: Sequence[Event], kind: str, key: str) -> Any:
    """`key` of the last event of `kind`; None when there is none."""
    return next((event.get(key) for event in reversed(events) if event["event"] == kind), None)


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
