"""A leg in a process of its own: its progress reaches the screen at once, its time is limited.

The child prints lines with `say` and `answer`; all else that it writes goes to a log only.
"""

# ruff: noqa: T201 (a child's lines are read by its parent, the parent's by a person)

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

PROGRESS, ANSWER = "@progress ", "@answer "
GRACE_SECONDS = 15
EVERY = 25
"""Steps between two lines of progress."""
SHOWN_CHARACTERS = 1500


class LegError(Exception):
    """Its process failed; what it wrote last."""


class UnfinishedError(Exception):
    """Its time was up; how far it came."""


def say(text: str) -> None:
    print(f"{PROGRESS}{text}", flush=True)


def worth_saying(step: int) -> bool:
    return step == 1 or step % EVERY == 0


def answer(value: dict[str, Any]) -> None:
    print(f"{ANSWER}{json.dumps(value)}", flush=True)


def run(command: list[str], environment: dict[str, str], label: str, log: Path, limit: float) -> dict[str, Any]:
    """The child's answer. label: before each line of its progress. limit: seconds.

    Raises LegError with the end of what it wrote, UnfinishedError with its last progress.
    """
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    over = threading.Event()
    timer = threading.Timer(limit, _end, (child, over))
    timer.start()
    last, found = "nothing", None
    try:
        assert child.stdout is not None
        with log.open("wb") as kept:
            for line in child.stdout:
                text = line.decode(errors="replace").rstrip("\n")
                if text.startswith(ANSWER):
                    found = json.loads(text.removeprefix(ANSWER))
                elif text.startswith(PROGRESS):
                    last = text.removeprefix(PROGRESS)
                    print(f"{label}: {time.monotonic() - began:5.1f} s  {last}", flush=True)
                else:
                    kept.write(line)
                    kept.flush()
        code = child.wait()
    finally:
        timer.cancel()
        _end(child, threading.Event())
    if found is not None and not code:
        return dict(found)
    if over.is_set():
        raise UnfinishedError(f"not finished in {limit:.0f} s at: {last}")
    end = log.read_text(errors="replace")[-SHOWN_CHARACTERS:]
    raise LegError(f"exit code {code} after: {last}; {log} ends:\n{end}")


def _end(child: subprocess.Popen[bytes], over: threading.Event) -> None:
    """Ask its whole session to leave, which a launcher passes on to its ranks; then make what is left of it."""
    if child.poll() is None:
        over.set()
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
