"""Shows how far a copy is: events as opensloth.event_lines renders them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from opensloth.human import human_bytes, human_duration

Progress = Callable[[Mapping[str, Any]], None]
"""Is told events."""
_SHOW_SECONDS: Final = 1.0
_MIB: Final = 1 << 20


class Meter:
    """Progress once a second, in MiB."""

    def __init__(self, phase: str, total: int, progress: Progress) -> None:
        """phase: what is done, `copying train.jsonl`; total: bytes."""
        self._phase, self.total, self._progress = phase, total, progress
        self._begin = self._shown = time.monotonic()

    def show(self, done: int) -> None:
        """done: bytes."""
        if (now := time.monotonic()) - self._shown >= _SHOW_SECONDS:
            self._shown = now
            counts = {"done": done // _MIB, "total": self.total // _MIB, "unit": "MiB"}
            self._progress({"event": "progress", "phase": self._phase, **counts})

    def warn(self, message: str) -> None:
        self._progress({"event": "note", "level": "warning", "message": message})

    def end(self) -> None:
        took = human_duration(time.monotonic() - self._begin)
        self._progress({"event": "note", "message": f"{self._phase}: {human_bytes(self.total)} in {took}, verified"})
