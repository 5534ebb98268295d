"""Whether a process that wrote down who it is still lives. A pid alone does not tell: pids are reused."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Any, Final

from opensloth.process import PROC, boot_id, stat_fields, stat_started
from runner.errors import RunnerError

_PARENT: Final = 4 - 3
"""Field 4 of /proc/<pid>/stat, counted from the state (field 3), which follows the name in brackets."""
_SLACK_SECONDS: Final = 5
"""`ps` rounds start times to seconds, and a process writes its file some time after it started."""


def is_alive(record: Mapping[str, Any]) -> bool:
    """Whether the process of `record` still runs. One on another host cannot be asked: it counts as alive."""
    if record.get("host") not in (None, socket.gethostname()):
        return True
    if record.get("boot_id") not in (None, boot_id()):
        return False
    pid = int(record["pid"])
    if PROC.joinpath("self/stat").exists():
        started = stat_started(pid)
        return started is not None and record.get("pid_started") in (None, started)
    started_at = _ps_started(pid)
    return started_at is not None and started_at <= float(record["time"]) + _SLACK_SECONDS


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, nearest first; the ranks are in sessions of their own."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _parents() -> dict[int, int]:
    """Process -> its parent, of all that run."""
    if not PROC.joinpath("self/stat").exists():
        return {int(pid): int(parent) for pid, parent in map(str.split, _ps("-A", "-o", "pid=,ppid=").splitlines())}
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    return {pid: int(fields[_PARENT]) for pid in pids if (fields := stat_fields(pid)) is not None}


def _ps_started(pid: int) -> float | None:
    """Seconds since the epoch at which `pid` started, by `ps`; None when it is gone or a zombie."""
    shown = _ps("-p", str(pid), "-o", "state=,lstart=").split(maxsplit=1)
    if len(shown) < 2 or shown[0].startswith("Z"):
        return None
    return time.mktime(time.strptime(shown[1].strip(), "%a %b %d %H:%M:%S %Y"))


def _ps(*arguments: str) -> str:
    """What `ps` says, in English; "" of a process that is gone.

    Raises RunnerError where there is no ps: taken for dead, a process would be started twice.
    """
    try:
        return subprocess.run(
            ["ps", *arguments], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
        ).stdout
    except FileNotFoundError as error:
        raise RunnerError("processes cannot be looked at: there is no /proc and no `ps`", "install ps") from error
