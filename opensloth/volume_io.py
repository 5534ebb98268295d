"""What commands on the volume share: JSON lines on stdout, confined paths, the system's errors as sentences."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

from opensloth.errors import ExplainedError
from opensloth.human import human_bytes

NOT_FOUND: Final = 102
"""Exit code: as the command line's."""
_ALIVE_SECONDS: Final = 5.0
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_writing: Final = threading.Lock()


class VolumeError(ExplainedError):
    """kind: a word that the other side can act on."""

    def __init__(self, message: str, hint: str = "", kind: str = "error", exit_code: int = 1) -> None:
        super().__init__(message, hint)
        self.kind, self.exit_code = kind, exit_code


def emit(answer: dict[str, Any]) -> None:
    """One line. That nobody reads any more is no reason to stop what is nearly done."""
    line = (json.dumps(answer) + "\n").encode()
    with _writing:
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            _discard_output()


def _discard_output() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


@contextmanager
def alive(doing: str) -> Iterator[None]:
    """Say every few seconds that this process is at work: whoever waits takes a long silence for a lost connection."""
    done = threading.Event()

    def say() -> None:
        while not done.wait(_ALIVE_SECONDS):
            emit({"busy": doing})

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def confined(root: Path, text: str) -> Path:
    """The path below `root` that a relative path names. Raises VolumeError where it would leave it."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise VolumeError(f"{text!r} is not a path below {root}", kind="usage", exit_code=2)
    found = root / path
    if not found.resolve().is_relative_to(root.resolve()):
        raise VolumeError(f"{found} leads out of {root} by a symbolic link", kind="usage", exit_code=2)
    return found


def explain(error: OSError, root: Path) -> VolumeError:
    """An error of the system as a sentence with what to do next."""
    path = Path(str(error.filename)) if error.filename else root
    if error.errno in _FULL:
        free = human_bytes(shutil.disk_usage(root).free)
        hint = "free some: oslo delete RUN --files; what was copied stays, and is gone on from"
        return VolumeError(f"no space is left on the volume at {root} ({free} free)", hint, kind="full")
    if error.errno in _FORBIDDEN:
        where = nearest_existing(path)
        hint = "the volume must be writable by uid or gid 1000 (k8s/README.md)"
        return VolumeError(f"{path} cannot be written or read: {error.strerror}: {_owned(where)}", hint)
    if isinstance(error, FileNotFoundError):
        return VolumeError(f"{path} does not exist", kind="missing", exit_code=NOT_FOUND)
    return VolumeError(f"{path}: {error.strerror or error}")


def nearest_existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def _owned(path: Path) -> str:
    found = path.lstat()
    owner = f"{path} belongs to uid {found.st_uid}, gid {found.st_gid}, mode {stat.filemode(found.st_mode)}"
    return f"{owner}; this process is uid {os.geteuid()}, gid {os.getegid()}"
