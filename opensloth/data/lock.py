"""A lock for building one cache entry, by files alone: it works on NFS and between pods.

    <name>.lock                 made with O_EXCL, never changed: who builds, and the token of this builder
    .<name>.<token>.beat        rewritten by the builder every second: a number, and how far it is

A builder is gone when its beat has not changed for `stale_seconds` of the observer's own monotonic clock (no
two machines' clocks are compared), or at once when it ran on this very machine and its process is no more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from opensloth.beat import STALE_SECONDS, Beat, Watch
from opensloth.files import create_json, read_json


@dataclass
class Progress:
    """How far a builder is; `total` None: unknown."""

    done: int = 0
    total: int | None = None


class BuildLock:
    """Held by the one builder of an entry; a thread keeps its beat."""

    def __init__(self, path: Path) -> None:
        """path: `<name>.lock`, in a folder that exists."""
        self._path = path
        self.token = uuid.uuid4().hex[:12]
        self.progress = Progress()
        self._beat_path = beat_path(path, self.token)
        self._beat = Beat(self._beat_path, lambda: {"done": self.progress.done, "total": self.progress.total})

    def try_acquire(self) -> bool:
        """Whether the lock is now held by this object. Raises OSError where the folder is read-only."""
        if self._path.exists():
            return False
        self._beat.write()
        acquired = False
        try:
            acquired = create_json(self._path, {"token": self.token, **_this_process()})
        finally:
            if not acquired:  # somebody else has it, or there is no room for it
                self._beat_path.unlink(missing_ok=True)
        if acquired:
            self._beat.start()
        return acquired

    def release(self) -> None:
        self._beat.stop()
        holder = read_json(self._path)
        if isinstance(holder, dict) and holder.get("token") == self.token:
            self._path.unlink(missing_ok=True)
        self._beat_path.unlink(missing_ok=True)

    def __enter__(self) -> BuildLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LockObserver:
    """Watches somebody else's lock."""

    def __init__(
        self, path: Path, *, stale_seconds: float = STALE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._stale_seconds, self._watch = path, stale_seconds, Watch(clock)

    def look(self) -> Progress | None:
        """How far the builder is; None when there is no builder, or it has gone and its lock was removed."""
        holder = read_json(self._path)
        if holder is None:
            if not self._path.exists():
                return None
            holder = {"token": "torn"}
        beat = read_json(beat_path(self._path, holder["token"])) or {}
        silent = self._watch.unchanged_seconds((holder["token"], beat.get("beat")))
        if silent >= self._stale_seconds or _is_dead_here(holder):
            _break_lock(self._path, holder["token"])
            return None
        return Progress(beat.get("done", 0), beat.get("total"))


def beat_path(lock: Path, token: str) -> Path:
    return lock.with_name(f".{lock.stem}.{token}.beat")


def _break_lock(path: Path, token: str) -> None:
    """Remove the lock of a builder that is gone, and not by mistake that of its successor."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.broken")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # somebody else was quicker
    holder = read_json(aside)
    if isinstance(holder, dict) and holder.get("token") != token:
        with contextlib.suppress(FileExistsError):  # a third one holds it: publishing twice does no harm
            os.link(aside, path)
    aside.unlink()
    beat = beat_path(path, token)
    for left in (beat, *beat.parent.glob(f".{beat.name}.*.tmp")):  # it may have been killed while it wrote its beat
        left.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "pid_started": _started(pid), "machine": _machine(), "time": time.time()}


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process that this machine would show, and does not."""
    if holder.get("machine") != _machine() or not holder.get("pid_started"):
        return False
    return _started(holder["pid"]) != holder["pid_started"]


def _machine() -> str:
    """Names the set of process ids that this process sees: the host's boot and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # not Linux: only the beat counts


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" when there is none (or only its zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def describe_holder(path: Path) -> str:
    """Who holds the lock, for a message."""
    holder = read_json(path)
    if not isinstance(holder, dict):
        return "another process"
    return f"process {holder.get('pid')} on {str(holder.get('machine', '')).split(' ')[0] or 'another machine'}"
