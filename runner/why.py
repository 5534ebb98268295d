"""Why a run stands as it does: one sentence, what bears witness to it, and what to do next. Pure.

`status`, `wait`, `--follow` and `oslo why` end with the same sentence and the same next command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

from opensloth.contract import ATTEMPTS_DIR, EXIT_CODE_OF_CAUSE, Cause, ExitCode
from runner.backend import CLUSTER_SCHEME, AttemptRecord, Findings, RunStatus, State

EVIDENCE_LINES: Final = 7
_LINE_LENGTH: Final = 320
_EARLIER: Final = 3
"""So many attempts before the last are told of."""
_PASSING: Final = {cause for cause, code in EXIT_CODE_OF_CAUSE.items() if code == ExitCode.INFRASTRUCTURE}
_GO_ON: Final = {*_PASSING, Cause.BUDGET, Cause.START_TIMEOUT}
"""After these a resumed run may come further, with nothing changed."""


@dataclass(frozen=True)
class Why:
    """What `oslo why` answers; `-o json` has these keys."""

    run: str
    handle: str
    state: State
    cause: str | None
    """As in `status`."""
    sentence: str
    """The first cause; of a run that goes on, what it does or waits for."""
    evidence: list[str]
    """What bears witness to it, the most telling first; a handful of sentences."""
    hint: str | None
    """What to do, as a sentence."""
    next: str
    """The command that comes next."""
    attempts: list[AttemptRecord]
    """The latest, the oldest first; empty: none, or the volume was not read (a run that waits needs no reading)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(findings: Findings) -> Why:
    status = findings.status
    told = sentence(status)
    lines = [_short(line) for line in _evidence(findings)]
    return Why(
        run=status.run,
        handle=status.handle,
        state=status.state,
        cause=status.cause,
        sentence=told,
        evidence=list(dict.fromkeys(line for line in lines if line not in told))[:EVIDENCE_LINES],
        hint=status.hint,
        next=next_command(status, deleted=findings.deleted)[0],
        attempts=list(findings.attempts),
    )


def text(why: Why, findings: Findings) -> str:
    """For people."""
    then = next_step(findings.status, deleted=findings.deleted)
    return "\n".join([why.sentence, *(f"  {line}" for line in why.evidence), f"next: {then}"])


# --- the sentence, and what comes next ----------------------------------------------------------------


def sentence(status: RunStatus) -> str:
    """Where the run stands, and why."""
    match status.state:
        case State.FAILED:
            return f"{status.handle} failed ({status.cause}): {status.reason or 'no reason was given'}"
        case State.SUCCEEDED:
            return f"{status.handle} has succeeded{_steps(status, ' after {step} steps')}"
        case State.CANCELLED:
            reason = f": {status.reason}" if status.reason else _steps(status, " at step {step} of {total}")
            return f"{status.handle} was cancelled{reason}".replace("was cancelled: cancelled", "was cancelled")
        case State.RUNNING:
            doing = [_steps(status, "step {step} of {total}"), status.reason or ""]
            return f"{status.handle} is running: {', '.join(filter(None, doing)) or 'no step is known yet'}"
    return f"{status.handle} is {status.state}: {status.reason or 'it has just been made'}"


def _steps(status: RunStatus, words: str) -> str:
    if status.step is None:
        return ""
    return words.format(step=status.step, total=status.total_steps or "?")


def next_step(status: RunStatus, *, deleted: bool = False) -> str:
    """The hint of who failed or waits, and the command that comes next. deleted: as in Findings."""
    command = "   ".join(next_command(status, deleted=deleted))
    return f"{status.hint}\n  {command}" if status.hint else command


def next_command(status: RunStatus, *, deleted: bool = False) -> tuple[str, str]:
    """(a command that works, what it does). deleted: as in Findings."""
    handle, on_cluster = status.handle, status.handle.startswith(CLUSTER_SCHEME)
    match status.state:
        case State.SUCCEEDED:
            return f"oslo pull {handle}", "copies the result here, and says how to use it"
        case State.CANCELLED | State.FAILED if deleted:
            return f"oslo logs {handle}", "shows the log; oslo submit FILE goes on from the last checkpoint"
        case State.CANCELLED:
            return f"oslo resume {handle}", "goes on from the last checkpoint"
        case State.FAILED if status.cause in _GO_ON:
            return f"oslo resume {handle}", "goes on from the last checkpoint"
        case State.FAILED:
            return f"oslo logs {handle}", "shows the log"
        case State.PENDING if on_cluster:
            return f"oslo status -w {handle}", "watches it; oslo cancel takes its pods away"
    return f"oslo logs -f {handle}", "follows it"


# --- the evidence -------------------------------------------------------------------------------------


def _evidence(findings: Findings) -> Iterator[str]:
    """The attempts' files come first where the run has come to train; what else was seen, where it waits."""
    attempts = list(_of_attempts(findings))
    if findings.status.state is State.PENDING:
        yield from (*findings.seen, *attempts)
    else:
        yield from (*attempts, *findings.seen)


def _of_attempts(findings: Findings) -> Iterator[str]:
    if not findings.attempts or findings.status.state is State.SUCCEEDED:
        return
    *earlier, last = findings.attempts
    yield from _of_last(last, findings.status)
    yield from (_of_earlier(attempt) for attempt in reversed(earlier[-_EARLIER:]))


def _of_last(attempt: AttemptRecord, status: RunStatus) -> Iterator[str]:
    """Who said what, who stood where; and where it began, if that was not at the beginning."""
    head = f"attempt {attempt.number}"
    for (cause, message), words in groupby(attempt.words, key=lambda word: (word.cause, word.message)):
        who = _names(word.who for word in words)
        yield f"{head}, {who}: {cause}" + ("" if message in (status.reason or "") else f": {message}")
    yield from _standing(attempt)
    if attempt.cause is None and attempt.message:
        yield f"{head}: {attempt.message}"
    if attempt.checkpoint_step is not None:
        yield f"{head} went on from step {attempt.checkpoint_step}"
    if status.state is State.FAILED and status.folder:
        yield f"its files: {status.folder}/{ATTEMPTS_DIR}/{attempt.number}"


def _of_earlier(attempt: AttemptRecord) -> str:
    began = f" (from step {attempt.checkpoint_step})" if attempt.checkpoint_step is not None else ""
    where = "; ".join(_standing(attempt))
    return f"attempt {attempt.number}{began}: {_ending(attempt)}" + (f"; {where}" if where else "")


def _ending(attempt: AttemptRecord) -> str:
    message = attempt.message or ""
    if attempt.cause is None:
        return message or "its launcher was killed: it has no end"
    return message if message.startswith(attempt.cause) else f"{attempt.cause}: {message}"


def _standing(attempt: AttemptRecord) -> Iterator[str]:
    """Ranks that stood at the same place together: the one that hangs stands alone."""
    places: dict[str, list[str]] = {}
    for rank, place in attempt.stood.items():
        places.setdefault(place, []).append(f"rank {rank}")
    for place, ranks in sorted(places.items(), key=lambda entry: len(entry[1])):
        yield f"attempt {attempt.number}: {_names(ranks)} stood at {place}"


def _names(who: Iterable[str]) -> str:
    """`rank 1`; `ranks 0, 2, 3`."""
    names = list(who)
    kinds = {name.partition(" ")[0] for name in names}
    if len(names) == 1 or len(kinds) > 1:
        return ", ".join(names)
    return f"{kinds.pop()}s " + ", ".join(name.partition(" ")[2] for name in names)


def _short(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= _LINE_LENGTH else line[: _LINE_LENGTH - 3] + "..."
