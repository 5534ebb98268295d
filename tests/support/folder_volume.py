"""A volume that is a folder of this machine: commands run as real processes, and faults happen to them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from runner.channel import LostError

STALE_SECONDS = 2.0
"""A beat comes every second."""


class ProcessStream:
    """See runner.channel.Stream."""

    def __init__(self, command: list[str], root: Path) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env={**os.environ, "OSLO_ROOT": str(root), "OSLO_STALE_SECONDS": str(STALE_SECONDS)},
        )
        self.sent = 0
        self.received = 0
        self.before_send: Callable[[ProcessStream], None] = lambda stream: None
        self.after_receive: Callable[[ProcessStream], None] = lambda stream: None

    def send(self, data: bytes) -> None:
        self.before_send(self)
        view = memoryview(data)
        try:
            while view:
                count = self.process.stdin.write(view)
                view = view[count:]
                self.sent += count
        except BrokenPipeError as error:
            raise LostError("the pipe broke") from error

    def receive(self, timeout: float | None = None) -> bytes | None:
        readable, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not readable:
            return None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        self.received += len(data)
        self.after_receive(self)
        if not data and self.process.wait(10) == -signal.SIGKILL:
            raise LostError("the process was killed")
        return data

    @property
    def stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def close(self) -> None:
        if not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)
        self._errors.close()

    def kill(self) -> None:
        self.process.kill()


class FolderVolume:
    """See runner.channel.VolumeSession. opened: is told of every command's stream, and can make faults happen."""

    def __init__(self, root: Path, opened: Callable[[str, ProcessStream], None] = lambda verb, stream: None) -> None:
        self.root = root
        self.commands: list[list[str]] = []
        self._opened = opened

    def open(self, command: list[str]) -> ProcessStream:
        assert command[:3] == ["python", "-m", "opensloth.volume"]
        self.commands.append(command[3:])
        stream = ProcessStream([sys.executable, *command[1:]], self.root)
        self._opened(command[3], stream)
        return stream

    @property
    def verbs(self) -> list[str]:
        return [command[0] for command in self.commands]
