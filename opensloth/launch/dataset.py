"""Prepares the dataset in a child, before any process group exists: no collective can time out over it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from opensloth import contract
from opensloth.contract import Cause
from opensloth.events import Events
from opensloth.launch.ending import Ending, killed
from opensloth.launch.part import Part

PROGRESS_SECONDS = 1.0
"""At most one progress event of data preparation in this time."""


def prepare_dataset(part: Part) -> dict[str, Any] | Ending:
    """What `python -m opensloth.data build` answered, else how it ends on this node.

    On several nodes all of them call it at once: the first builds, the others wait for its lock.
    """
    command = [sys.executable, "-m", "opensloth.data", "build", "--config", str(part.settings.config)]
    env = os.environ | {contract.RUN_DIR_ENV: str(part.attempt.run)}  # the cache notes who uses an entry
    with part.launcher_log.open("ab") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, start_new_session=True)
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    answer = _Answer(part.events)
    leave: Ending | None = None
    while child.poll() is None:
        answer.feed(child.stdout.read() or b"")
        leave = leave or part.reason_to_leave("the dataset was prepared")
        if leave:
            os.killpg(child.pid, signal.SIGKILL)  # the cache is built aside: nothing half-done is left in place
            child.wait()
        time.sleep(part.settings.poll_seconds)
    answer.feed(child.stdout.read() or b"")
    child.stdout.close()
    return leave or part.reason_to_leave("the dataset was prepared") or _outcome(answer, child.returncode, part)


def _outcome(answer: _Answer, code: int, part: Part) -> dict[str, Any] | Ending:
    if answer.result is not None and code == 0:
        if not answer.result["reused"]:
            part.events.note(f"dataset prepared: {answer.result['path']}")
        return answer.result
    if answer.error is not None:
        return Ending(answer.error["cause"], answer.error["message"], answer.error.get("hint", ""))
    if code < 0:
        return killed("data preparation", -code, part.memory_limit_hit())
    return Ending(Cause.ERROR, f"data preparation failed with exit code {code}", f"see {part.launcher_log}")


def _parsed(line: bytes) -> dict[str, Any]:
    """An event; whatever else was printed becomes a note."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict) and "event" in record:
        return record
    return {"event": "note", "level": "warning", "message": line.decode(errors="replace")}


class _Answer:
    """Reads the JSON lines of `python -m opensloth.data build`."""

    def __init__(self, events: Events) -> None:
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self._events, self._torn, self._progress_at = events, b"", 0.0

    def feed(self, data: bytes) -> None:
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            record = _parsed(line)
            kind = record.pop("event")
            if kind == "result":
                self.result = record
            elif kind == "error":
                self.error = record
            elif kind == "progress":
                self._progress(record)
            else:
                self._events.emit(kind, **record)

    def _progress(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_SECONDS or record.get("done") == record.get("total"):
            self._progress_at = now
            self._events.emit("progress", **record)
