"""Where a rank stands, said to the launcher of its node with every micro-batch.

The file lies on the node's own disk: a volume that hangs must not silence it, and it costs microseconds. The stacks
that the launcher asks for with STACKS_SIGNAL go into a file beside it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STACKS_SIGNAL: Final = signal.SIGUSR1
_WIDTH: Final = 200


class Kind:
    """What a rank is at."""

    STEP: Final = "step"
    FIRST_STEP: Final = "first-step"
    """Of this process: it may compile."""
    OTHER: Final = "other"
    """It has a length of its own: loading, evaluation, a checkpoint."""


@dataclass(frozen=True)
class Standing:
    """beats: a number that grows with every sign of progress. kind: a word of Kind. doing: the same for people."""

    pid: int
    beats: int
    kind: str
    doing: str


class Pulse:
    """Of one rank. Without a folder nobody listens, and nothing is written."""

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._beats, self._kind, self._doing = 0, Kind.OTHER, "the start"
        self._descriptor: int | None = None
        if folder is not None:
            self._stacks = stacks_file(folder, rank).open("wb")
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
            self._descriptor = os.open(_pulse_file(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
            self.beat()

    def at(self, doing: str) -> None:
        """Something other than a step is begun."""
        self._kind, self._doing = Kind.OTHER, doing
        self.beat()

    def step(self, step: int, *, first: bool) -> None:
        """Step number `step` is begun. first: of this process."""
        self._kind, self._doing = Kind.FIRST_STEP if first else Kind.STEP, f"step {step}"
        self.beat()

    def beat(self) -> None:
        """Say that there is progress."""
        if self._descriptor is None:
            return
        self._beats += 1
        line = f"{os.getpid()} {self._beats} {self._kind} {self._doing}"
        os.pwrite(self._descriptor, line.encode()[:_WIDTH].ljust(_WIDTH), 0)


def read_standing(folder: Path, rank: int) -> Standing | None:
    """None when the rank has not come so far as to say where it stands."""
    try:
        pid, beats, kind, doing = _pulse_file(folder, rank).read_bytes().decode(errors="replace").split(maxsplit=3)
    except (FileNotFoundError, ValueError):
        return None
    return Standing(int(pid), int(beats), kind, doing.rstrip())


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


def _pulse_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.pulse"
