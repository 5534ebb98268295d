"""Who a process is: what tells it from a later one with the same number. Standard library only."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any, Final

PROC: Final = Path("/proc")
_START_TIME: Final = 22 - 3
"""Field 22 of /proc/<pid>/stat, counted from the state (field 3), which follows the name in brackets."""


def identify_self() -> dict[str, Any]:
    """What the launcher writes into started.json, and the runner into its lock."""
    return {
        "pid": os.getpid(),
        "pid_started": stat_started(os.getpid()),
        "boot_id": boot_id(),
        "host": socket.gethostname(),
        "time": time.time(),
    }


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on; None when the process is gone, or without /proc."""
    try:
        text = PROC.joinpath(str(pid), "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def stat_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None when it is gone or a zombie, or without /proc."""
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[_START_TIME])


def boot_id() -> str | None:
    try:
        return PROC.joinpath("sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
