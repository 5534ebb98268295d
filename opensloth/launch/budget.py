"""Whether another attempt may start: restarts without progress, and training time. Pure.

The operator restarts without end, so the count is kept here, from what earlier attempts left in their folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from opensloth.contract import EXIT_CODE_OF_CAUSE, Cause, ExitCode
from opensloth.human import human_duration
from opensloth.launch.ending import Ending

_COSTS = (None, Cause.KILLED, Cause.HUNG, Cause.PEER_LOST, Cause.VOLUME)
"""What an attempt ended with that was lost; None: it has no end, its launcher was killed."""
_MORE_TIME = "the last checkpoint stands: raise job.deadline and submit again to go on from it"
_TIMES = {2: "twice", 3: "three times"}
_SHOWN = 8
"""So many of the lost attempts are told of in the message."""


@dataclass(frozen=True)
class Past:
    """An earlier attempt.

    cause, message: of its end; None: it has none. checkpoint_step: the newest checkpoint when it started (None:
    none). train_seconds: how long its ranks trained.
    """

    number: int
    cause: str | None
    message: str = ""
    checkpoint_step: int | None = None
    train_seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        return self.cause is not None and EXIT_CODE_OF_CAUSE[self.cause] != ExitCode.INFRASTRUCTURE

    def __str__(self) -> str:
        return f"attempt {self.number} " + (f"{self.cause} ({self.message})" if self.cause else "without an end")


def lost_in_a_row(past: Sequence[Past], checkpoint_step: int | None) -> list[Past]:
    """The attempts that cost: lost ones since the last that made progress, or that somebody resumed by hand.

    past: the oldest first. checkpoint_step: the newest checkpoint now.
    """
    lost: list[Past] = []
    steps = [*(attempt.checkpoint_step for attempt in past), checkpoint_step]
    for attempt, next_step in zip(past, steps[1:], strict=True):
        if attempt.is_final or (next_step or 0) > (attempt.checkpoint_step or 0):
            lost = []
        elif attempt.cause in _COSTS:
            lost.append(attempt)
    return lost


def refusal(
    past: Sequence[Past],
    checkpoint_step: int | None,
    *,
    max_restarts: int | None,
    deadline_seconds: float | None,
    last_step: Callable[[int], int | None],
) -> Ending | None:
    """How a new attempt ends before it begins; None: it may begin.

    last_step: the last step that attempt number so-and-so has reported itself, None: it reported none.
    """
    return (
        (max_restarts is not None and _killed_at_one_step(past, last_step))
        or _budget_spent(lost_in_a_row(past, checkpoint_step), max_restarts)
        or deadline_passed(sum(attempt.train_seconds for attempt in past), deadline_seconds)
    )


def deadline_passed(train_seconds: float, deadline_seconds: float | None) -> Ending | None:
    if deadline_seconds is None or train_seconds < deadline_seconds:
        return None
    spent, allowed = human_duration(train_seconds), human_duration(deadline_seconds)
    return Ending(Cause.DEADLINE, f"trained for {spent} of {allowed} (job.deadline)", _MORE_TIME)


def _budget_spent(lost: Sequence[Past], max_restarts: int | None) -> Ending | None:
    if max_restarts is None or len(lost) <= max_restarts:
        return None
    history = "; ".join(map(str, lost[-_SHOWN:]))
    left_out = f"{len(lost) - _SHOWN} more; " if len(lost) > _SHOWN else ""
    return Ending(
        Cause.BUDGET,
        f"{len(lost)} attempts in a row were lost without a new checkpoint, more than {max_restarts} restarts "
        f"(job.max_restarts): {left_out}{history}",
        "resuming it by hand begins a new budget; a smaller training.save_steps loses less",
    )


def _killed_at_one_step(past: Sequence[Past], last_step: Callable[[int], int | None]) -> Ending | None:
    """Killed again after the same step: whatever it is, it will come again.

    Twice is enough where a launcher saw its ranks killed. Attempts without an end may have been cancelled by force or
    preempted as well: of these it takes three. One that has reported no step is no evidence.
    """
    in_a_row = list(takewhile(lambda attempt: attempt.cause in (None, Cause.KILLED), reversed(past)))
    count = 2 if any(attempt.cause == Cause.KILLED for attempt in in_a_row[:2]) else 3
    if len(in_a_row) < count:
        return None
    same = in_a_row[:count][::-1]
    one, *others = (last_step(attempt.number) for attempt in same)
    if one is None or any(other != one for other in others):
        return None
    return Ending(
        Cause.OUT_OF_MEMORY,
        f"killed {_TIMES[count]} at step {one} (attempts {', '.join(str(attempt.number) for attempt in same)}): "
        "most likely out of host memory",
        "raise job.memory, or try a smaller batch or model",
    )
