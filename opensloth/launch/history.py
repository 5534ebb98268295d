"""Reads what earlier attempts left in the run folder, for the budget."""

from __future__ import annotations

import json
from pathlib import Path

from opensloth import contract
from opensloth.files import read_json
from opensloth.launch.attempt import Attempt, attempt_numbers
from opensloth.launch.budget import Past


def past_attempts(run: Path, before: int) -> list[Past]:
    """Of attempts older than `before`, the oldest first."""
    return [_past(Attempt(run, number)) for number in attempt_numbers(run) if number < before]


def _past(attempt: Attempt) -> Past:
    ended = attempt.ended()
    started = attempt.read(contract.STARTED_FILE) or {}
    beat = attempt.read(contract.BEAT_FILE) or {}
    return Past(
        number=attempt.number,
        cause=ended.cause if ended else None,
        message=ended.message if ended else "",
        checkpoint_step=started.get("checkpoint_step"),
        train_seconds=float(beat.get("train_seconds", 0.0)),
    )


def last_step(run: Path, attempt: int) -> int | None:
    """The last step that an attempt has reported itself. Reads all events: asked only of killed attempts."""
    found: int | None = None
    try:
        with (run / contract.EVENTS_FILE).open("rb") as lines:
            for line in lines:
                if b'"event": "step"' in line and (step := _step_of(line, attempt)) is not None:
                    found = step
    except FileNotFoundError:
        return None
    return found


def _step_of(line: bytes, attempt: int) -> int | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return int(event["step"]) if event.get("attempt") == attempt else None


def report(run: Path) -> dict[str, object] | None:
    """report.json, which says that the run has succeeded."""
    found = read_json(run / contract.REPORT_FILE)
    return found if isinstance(found, dict) else None
