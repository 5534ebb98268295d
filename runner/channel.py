"""A command that runs somewhere else, by its two streams, and a conversation with it in lines of JSON.

In reality it is an exec in a helper pod (runner.kube.exec), in tests a process of this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from runner.errors import ClusterError, UnreachableError

SILENCE_SECONDS: Final = 60.0
"""A command at work says something more often than that."""
_ATTEMPTS: Final = 4
"""How often in a row a connection may be lost before anything gets through."""
_PAUSE_SECONDS: Final = 1.0
Answer = TypeVar("Answer")


class LostError(ClusterError):
    """The connection to a running command broke: what it did is not known, and it can be asked again."""


class VolumeError(ClusterError):
    """What the other side says went wrong. kind: a word (see opensloth.volume)."""

    def __init__(self, message: str, hint: str = "", kind: str = "error") -> None:
        super().__init__(message, hint)
        self.kind = kind


class Stream(Protocol):
    """A running command."""

    def send(self, data: bytes) -> None:
        """Write to its stdin. Raises LostError."""
        ...

    def receive(self, timeout: float | None = None) -> bytes | None:
        """Some bytes of its stdout; b"" at the end; None when nothing came within `timeout` seconds.

        Raises LostError.
        """
        ...

    @property
    def stderr(self) -> str:
        """What it has written there so far, the end of it at least."""
        ...

    @property
    def exit_code(self) -> int | None:
        """None while it runs; known once `receive` has answered b""."""
        ...

    def close(self) -> None:
        """Leave it: its stdin ends. Never raises."""
        ...


class VolumeSession(Protocol):
    """Something that runs commands where the volume is."""

    def open(self, command: list[str]) -> Stream: ...


class Conversation:
    """Lines of JSON, and bytes between them. Left on exit.

    Every answer {"error": ...} is raised as VolumeError, every end with an exit code too.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def say(self, message: dict[str, Any]) -> None:
        self._stream.send((json.dumps(message) + "\n").encode())

    def send(self, data: bytes) -> None:
        self._stream.send(data)

    def answer(self) -> dict[str, Any]:
        """The next one; signs of life are left out. Raises LostError when there is none for long."""
        while True:
            line = self._line(SILENCE_SECONDS)
            if line is None:
                raise LostError(f"no sign of life from the volume for {SILENCE_SECONDS:.0f} s", "try again")
            if (said := _parse(line)) is not None:
                return said

    def answers(self, seconds: float = 0.0) -> Iterator[dict[str, Any]]:
        """Those that are there already, or come within so many seconds."""
        end = time.monotonic() + seconds
        while (line := self._line(max(0.0, end - time.monotonic()))) is not None:
            if (said := _parse(line)) is not None:
                yield said

    def read(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, in parts. Raises LostError."""
        while count:
            while not self._buffer:
                self._fill(SILENCE_SECONDS)
            part = bytes(self._buffer[:count])
            del self._buffer[:count]
            count -= len(part)
            yield part

    def _line(self, timeout: float) -> bytes | None:
        """None when there is no whole one within `timeout` seconds."""
        end = time.monotonic() + timeout
        while (at := self._buffer.find(b"\n")) < 0:
            if not self._fill(max(0.0, end - time.monotonic()), patient=False):
                return None
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return line

    def _fill(self, timeout: float, *, patient: bool = True) -> bool:
        """Receive some. patient: that nothing comes is an error."""
        part = self._stream.receive(timeout)
        if part is None and patient:
            raise LostError(f"no bytes came from the volume for {timeout:.0f} s", "try again")
        if part == b"":
            raise self._ended()
        self._buffer += part or b""
        return part is not None

    def _ended(self) -> ClusterError:
        """It ended although an answer was due."""
        said = self._stream.stderr.strip()
        if "No module named opensloth" in said:
            hint = "job.image must be one of this version (docker/train.Dockerfile)"
            return VolumeError(f"the image has no command for the volume: {said.splitlines()[-1]}", hint)
        if said.startswith("error: "):
            message, _, hint = said.removeprefix("error: ").partition("\n  ")
            return VolumeError(message, hint)
        return LostError(f"the command on the volume ended too early (exit code {self._stream.exit_code}): {said}")


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a sign of life. Raises VolumeError for an error."""
    try:
        said: dict[str, Any] = json.loads(line)
    except ValueError as error:
        shown = line[:200].decode(errors="replace")
        raise VolumeError(
            f"the volume's side says what this version does not expect: {shown!r}",
            "job.image must be one of this version (docker/train.Dockerfile)",
        ) from error
    if said.get("kind") == "taken":
        raise LostError(said["error"])  # by an upload that saw no sign of life of this one: it goes on from there
    if "error" in said:
        raise VolumeError(said["error"], said["hint"], said["kind"])
    return None if "busy" in said else said


class Patience:
    """Calls again what has lost its connection, a few times in a row."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._lost = say, 0

    def got_through(self) -> None:
        """Something did: count anew."""
        self._lost = 0

    def keep(self, call: Callable[[], Answer]) -> Answer:
        """Raises the last LostError or UnreachableError."""
        while True:
            try:
                return call()
            except (LostError, UnreachableError) as error:
                self._lost += 1
                if self._lost == _ATTEMPTS:
                    raise
                self._say(f"{error.message}; trying again")
                time.sleep(_PAUSE_SECONDS * self._lost)
