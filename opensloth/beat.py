"""A sign of life through a file, between machines whose clocks nobody compares.

Whoever lives rewrites a file with a number that grows; whoever watches counts, by its own monotonic clock, for
how long the number has not changed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from opensloth.files import write_json

BEAT_SECONDS: Final = 1.0
STALE_SECONDS: Final = 60.0


class Beat:
    """Rewrites `path` every second, from a thread, until it is stopped."""

    def __init__(self, path: Path, fields: Callable[[], dict[str, Any]], seconds: float = BEAT_SECONDS) -> None:
        """fields: what the file says besides the number."""
        self._path, self._fields, self._seconds = path, fields, seconds
        self._stopped = threading.Event()
        self._number = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def write(self) -> None:
        """Write the next number now. Raises OSError."""
        write_json(self._path, {"beat": self._number, **self._fields()})
        self._number += 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            with contextlib.suppress(OSError):  # a full disk: whoever does the work meets the same and reports it
                self.write()


class Watch:
    """For how long something has not changed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: Any = None
        self._changed_at = clock()

    def unchanged_seconds(self, value: Any) -> float:
        if value != self._seen:
            self._seen, self._changed_at = value, self._clock()
        return self._clock() - self._changed_at
