"""Events: what a run says of itself while it runs, one JSON object a line.

Each event goes to the run folder's events.jsonl and, behind `contract.EVENT_PREFIX`, to stdout, so that it
can be read from a pod's log as well. Kinds and their fields (times in seconds since the epoch, durations in
seconds, memory in bytes):

    phase       phase: data | model | train | done
    progress    phase, done, total (null: unknown), unit
    check       check: packing, cosine, norm_ratio (of gradients, packed against alone), remembered, seconds
    note        level: info | warning, message
    plan        rows, documents, tokens, target_tokens, rows_per_step, steps_per_epoch, total_steps, ...
    engine      engine: fused | torch, reason
    resumed     step, checkpoint
    step        step, total_steps, epoch, loss, learning_rate, grad_norm, target_tokens, tokens,
                target_tokens_per_second, tokens_per_second, memory, padding, data_wait, mfu, eta
    eval        step, loss, target_tokens, seconds
    checkpoint  step, path, seconds
    result      final, steps, loss, eval_loss, target_tokens, seconds
    end         cause, exit_code, message, hint

Every event also has `event` (its kind), `time`, `seq` (from 0, per writer), `rank` (-1: the launcher) and `attempt`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensloth.contract import EVENT_PREFIX
from opensloth.event_lines import render_event


class Events:
    """Writes events as whole lines: one write call each, so that a reader meets at most one torn line."""

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        attempt: int,
        for_people: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """path: events.jsonl. for_people: say a readable line, not the event itself. say: None: print it."""
        self._rank, self._attempt, self._for_people, self._seq = rank, attempt, for_people, 0
        self._say = say or _print
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if _is_torn(path):  # the volume was full, or the machine went away: what comes must not be lost with it
            os.write(self._descriptor, b"\n")

    def emit(self, event: str, /, **fields: Any) -> None:
        """Write one event; numbers that are not finite become null."""
        record = {"event": event, "time": round(time.time(), 3), "seq": self._seq}
        record |= {"rank": self._rank, "attempt": self._attempt}
        record |= {key: finite(value) for key, value in fields.items()}
        self._seq += 1
        line = json.dumps(record, allow_nan=False, ensure_ascii=False)
        _write_all(self._descriptor, (line + "\n").encode())
        self._say(render_event(record) if self._for_people else f"{EVENT_PREFIX}{line}")

    def note(self, message: str, level: str = "info") -> None:
        self.emit("note", level=level, message=message)

    def warn(self, message: str) -> None:
        self.note(message, level="warning")

    def close(self) -> None:
        os.close(self._descriptor)


class NullEvents(Events):
    """Says nothing: for ranks above 0."""

    def __init__(self) -> None:
        """No file is opened."""

    def emit(self, event: str, /, **fields: Any) -> None:
        """Drop the event."""

    def close(self) -> None:
        """Nothing to close."""


def _is_torn(path: Path) -> bool:
    """Whether its last line has no end."""
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        return stream.read() not in (b"", b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    """One call, but on a volume that is nearly full; there the next one says why."""
    while data:
        data = data[os.write(descriptor, data) :]


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def finite(value: Any) -> Any:
    """The value; None when it is a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
