"""Notices ranks that make no progress, by this launcher's own clock.

Nobody of this node has made any for longer than the limit: the floor, ten times the longest pause within a step that
was seen so far, and twice the longest step, because a rank that has few rows in a step waits for the others. What has
a length of its own (loading, the first step, evaluation, a checkpoint) may take six times the floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opensloth.pulse import Kind, Standing, read_standing

HUNG_SECONDS: Final = 600.0
"""The floor; well below ddp_timeout (1800 s), which ends those that wait for a hung rank and cannot name it."""
_OTHER_THAN_STEPS: Final = 6
_PAUSES: Final = 10
_STEPS: Final = 2
_LOOK_SECONDS: Final = 10.0
"""A look counts for at most so much: a launcher that was frozen together with its ranks must not blame them."""


@dataclass(frozen=True)
class Stall:
    """seconds: since the rank's last sign of progress. doing: what it was at, for people."""

    rank: int
    seconds: float
    doing: str


class Watchdog:
    """Over the ranks of one node; is to look every second or so."""

    def __init__(
        self, folder: Path, ranks: range, floor_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """folder: where the ranks say where they stand (`opensloth.pulse`)."""
        self.folder, self.ranks = folder, ranks
        self._floor, self._clock = floor_seconds, clock
        self._looked_at = clock()
        self._paces = {rank: _Pace() for rank in ranks}

    def look(self) -> Stall | None:
        """The rank that has made no progress for the longest, when all have made none for too long."""
        now = self._clock()
        passed, self._looked_at = min(now - self._looked_at, _LOOK_SECONDS), now
        for rank, pace in self._paces.items():
            pace.look(read_standing(self.folder, rank), passed)
        if not all(pace.unchanged > self._limit(pace) for pace in self._paces.values()):
            return None
        rank, pace = max(self._paces.items(), key=lambda entry: entry[1].unchanged)
        return Stall(rank, pace.unchanged, pace.seen.doing if pace.seen else "the start")

    def _limit(self, pace: _Pace) -> float:
        in_step = pace.seen is not None and pace.seen.kind == Kind.STEP
        floor = self._floor if in_step else _OTHER_THAN_STEPS * self._floor
        paces = self._paces.values()
        return max(floor, _PAUSES * max(p.longest_pause for p in paces), _STEPS * max(p.longest_step for p in paces))


class _Pace:
    """Of one rank, in seconds. unchanged: since it was last seen to move. longest_pause: of those, within steps."""

    def __init__(self) -> None:
        self.seen: Standing | None = None
        self.unchanged, self.longest_pause, self.longest_step = 0.0, 0.0, 0.0
        self._in_step = 0.0

    def look(self, standing: Standing | None, passed: float) -> None:
        before, self.seen = self.seen, standing
        self.unchanged += passed
        self._in_step += passed
        if standing == before:
            return
        if before is not None and before.kind == Kind.STEP:
            self.longest_pause = max(self.longest_pause, self.unchanged)
        if before is not None and standing is not None and before.doing != standing.doing:
            if before.kind != Kind.OTHER:
                self.longest_step = max(self.longest_step, self._in_step)
            self._in_step = 0.0
        self.unchanged = 0.0
