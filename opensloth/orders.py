"""Whether this rank has been asked to leave, and why. Looked at once a step; the ranks then agree."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from opensloth import contract
from opensloth.contract import Cause
from opensloth.errors import StopRequested
from opensloth.files import read_json
from opensloth.process import PROC, stat_started

CAUSES: Final = (Cause.SUPERSEDED, Cause.CANCELLED, Cause.DEADLINE, Cause.TERMINATED)
"""What ranks may be asked to leave for; when they differ, the first one named here counts."""


class Orders:
    """Hears of stop.json, of SIGTERM, of a launcher that is gone, and of a newer attempt.

    Entered, it takes SIGTERM for a request, not for the end of the process.
    """

    def __init__(self, attempt: Path | None = None, launcher: int | None = None) -> None:
        """attempt: the attempt's folder. launcher: its process number. None: nobody but SIGTERM asks."""
        self._attempt, self._launcher = attempt, launcher
        self._asked: str | None = None
        self._before: Any = None

    def cause(self) -> str | None:
        """A word of CAUSES, or None to go on."""
        if self._is_superseded():
            return Cause.SUPERSEDED
        if self._attempt is not None and (self._attempt / contract.STOP_FILE).exists():
            asked = (read_json(self._attempt / contract.STOP_FILE) or {}).get("cause")
            return asked if asked in CAUSES else Cause.TERMINATED
        if self._launcher is not None and not _alive(self._launcher):
            return Cause.TERMINATED
        return self._asked

    def fence(self) -> None:
        """Called right before something is put in place of what another attempt may have put there.

        Raises StopRequested when a newer attempt exists: an attempt's number, made by an exclusive mkdir, is the
        token, and only its newest holder may write.
        """
        if self._is_superseded(for_certain=True):
            raise StopRequested(Cause.SUPERSEDED, "a newer attempt has started: this one writes nothing more")

    def _is_superseded(self, *, for_certain: bool = False) -> bool:
        """for_certain: list the folder, which asks an NFS server; for one name its memory may answer for a minute."""
        if self._attempt is None:
            return False
        newer = self._attempt.with_name(str(int(self._attempt.name) + 1))
        if for_certain:
            with suppress(FileNotFoundError):  # the run was deleted: nothing that is written will stay
                return newer.name in os.listdir(newer.parent)
        return newer.exists()

    def __enter__(self) -> Orders:
        try:
            self._before = signal.signal(signal.SIGTERM, self._heed)
        except ValueError:  # not in the main thread: signals are the caller's business
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _heed(self, *_: object) -> None:
        self._asked = Cause.TERMINATED


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    if (PROC / "self/stat").exists():
        return stat_started(pid) is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
