"""The pod's log: every line of this node's ranks and of its launcher, each headed by where it comes from."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from opensloth.launch.attempt import Attempt
from opensloth.pod_log import PodLine, format_line, launcher_rank

POLL_SECONDS = 0.2
_BLOCK_BYTES = 1 << 20


class PodLog:
    """Writes whole lines on stdout, from several threads."""

    def __init__(self, attempt: int, node: int, out: TextIO | None = None) -> None:
        """attempt: 0 before one is joined."""
        self._attempt, self._rank, self._out = attempt, launcher_rank(node), out or sys.stdout
        self._lock = threading.Lock()
        self._said = 0

    def say(self, text: str) -> None:
        """A line of the launcher's own, or more."""
        with self._lock:
            for line in text.split("\n"):
                self._write(self._rank, self._said, line)
                self._said += 1

    def relay(self, rank: int, number: int, text: str) -> None:
        with self._lock:
            self._write(rank, number, text)

    def _write(self, rank: int, number: int, text: str) -> None:
        self._out.write(format_line(PodLine(self._attempt, rank, number, text)) + "\n")
        self._out.flush()


class _Follower:
    """Reads one file on from where it was."""

    def __init__(self, path: Path, say: Callable[[int, str], None]) -> None:
        """say: is given each line and its number."""
        self._path, self._say = path, say
        self._offset, self._number, self._torn = 0, 0, b""

    def read(self, *, to_the_end: bool = False) -> None:
        """Hand on what is new; to_the_end: also a last line that was never finished."""
        while block := self._next_block():
            *lines, self._torn = (self._torn + block).split(b"\n")
            for line in lines:
                self._hand_on(line)
        if to_the_end and self._torn:
            self._hand_on(self._torn)
            self._torn = b""

    def _next_block(self) -> bytes:
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                block = stream.read(_BLOCK_BYTES)
        except OSError:  # not there yet; or the volume hangs, and is asked again
            return b""
        self._offset += len(block)
        return block

    def _hand_on(self, line: bytes) -> None:
        self._say(self._number, line.decode(errors="replace").rstrip("\r"))
        self._number += 1


class Relay:
    """Follows the logs of this node's ranks, and the launcher's own file, from a thread."""

    def __init__(self, log: PodLog, attempt: Attempt, launcher_log: Path) -> None:
        self._log, self._attempt = log, attempt
        self._followers = [_Follower(launcher_log, lambda _, text: log.say(text))]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def follow(self, ranks: Sequence[tuple[int, Path]]) -> None:
        """Also these ranks' logs, which may not be there yet."""
        self._followers += [_Follower(path, self._sayer(rank)) for rank, path in ranks]

    def close(self) -> None:
        """Return when everything that was written has been handed on."""
        self._stopped.set()
        self._thread.join()
        for follower in self._followers:
            follower.read(to_the_end=True)

    def _sayer(self, rank: int) -> Callable[[int, str], None]:
        return lambda number, text: self._log.relay(rank, number, text)

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            for follower in list(self._followers):
                follower.read()
