"""Files from this machine to the volume and back, verified at both ends; lost connections are taken up again.

What is said on the way is in opensloth.volume.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

from opensloth.fingerprint import file_sha256, visible_files
from runner.channel import Conversation, LostError, Patience, VolumeError, VolumeSession
from runner.errors import RunnerError
from runner.outgoing import Outgoing
from runner.progress import Meter, Progress
from runner.results import files_of, staged

VOLUME_COMMAND: Final = ("python", "-m", "opensloth.volume")
_WINDOW_BYTES: Final = 32 << 20
"""How much may be on its way: progress is what has arrived, not what was put into buffers."""
_LAST_WORD_SECONDS: Final = 5.0
"""How long an answer may take that was given before the connection broke."""


@dataclass(frozen=True)
class UploadReport:
    """Bytes and seconds of an upload. sent: inputs that were copied; present: those that were there already."""

    sent: tuple[str, ...]
    present: tuple[str, ...]
    sent_bytes: int
    seconds: float


def missing_bytes(volume: VolumeSession, sources: Mapping[str, Path]) -> int:
    """How much `upload` would send. sources: where it goes on the volume -> local file or folder."""
    found = _outgoing(sources)
    there = _have(volume, found)
    partial = {one.input: there[one.input]["partial"] for one in found if not there[one.input]["complete"]}
    return sum(max(0, one.size - partial[one.input]) for one in found if one.input in partial)


def upload(volume: VolumeSession, sources: Mapping[str, Path], progress: Progress) -> UploadReport:
    """Copy what is not there yet; each is whole and verified in its place, or absent.

    Raises RunnerError for a local file that cannot be read (before anything is sent) or that changes meanwhile.
    """
    begin = time.monotonic()
    found = _outgoing(sources)
    there = _have(volume, found)
    sent = [one for one in found if not there[one.input]["complete"]]
    count = sum(_Upload(volume, one, progress).run() for one in sent)
    present = tuple(one.input for one in found if one not in sent)
    for name in present:
        progress({"event": "note", "message": f"{PurePosixPath(name).name} is on the volume already"})
    return UploadReport(tuple(one.input for one in sent), present, count, time.monotonic() - begin)


def _outgoing(sources: Mapping[str, Path]) -> list[Outgoing]:
    return [Outgoing.of(target, path) for target, path in sorted(sources.items())]


def _have(volume: VolumeSession, sources: Sequence[Outgoing]) -> dict[str, dict[str, Any]]:
    """The volume's answers by input."""

    def ask() -> dict[str, dict[str, Any]]:
        names = [one.input for one in sources]
        with Conversation(volume.open([*VOLUME_COMMAND, "have", *names])) as talk:
            return {said["input"]: said for said in (talk.answer() for _ in names)}

    return Patience(say=lambda text: None).keep(ask) if sources else {}


class _Upload:
    """One source on its way."""

    def __init__(self, volume: VolumeSession, source: Outgoing, progress: Progress) -> None:
        self._volume, self._source = volume, source
        self._meter = Meter(f"copying {source.path.name}", source.size, progress)
        self._patience = Patience(self._meter.warn)
        self._sent = 0

    def run(self) -> int:
        """Returns how many bytes were sent. Raises RunnerError."""
        try:
            self._patience.keep(lambda: self._attempt(fresh=False))
        except VolumeError as error:
            if error.kind != "differs":
                raise
            self._source.require_unchanged()
            self._meter.warn(f"{error.message}: copying it anew")
            self._anew()
        self._meter.end()
        return self._sent

    def _anew(self) -> None:
        """Whatever an earlier upload has left. Raises RunnerError when it arrives as something else again."""
        try:
            self._patience.keep(lambda: self._attempt(fresh=True))
        except VolumeError as error:
            if error.kind == "differs":
                self._source.require_unchanged()
            raise

    def _attempt(self, *, fresh: bool) -> None:
        source = self._source
        command = [*VOLUME_COMMAND, "receive", source.input, "--need", str(source.size)]
        command += ["--folder"] * source.path.is_dir() + ["--fresh"] * fresh
        with Conversation(self._volume.open(command)) as talk:
            answer = talk.answer()
            if "ready" not in answer:
                return  # somebody else has completed it
            window = _Window(talk, sum(answer["ready"].values()), self._heard)
            try:
                self._send(talk, window, answer["ready"])
            except LostError:
                window.look(_LAST_WORD_SECONDS)  # it may say why
                if not window.complete:
                    raise
            while not window.complete:
                window.wait()

    def _send(self, talk: Conversation, window: _Window, ready: Mapping[str, int]) -> None:
        """All bytes that are not there, then the word to verify them."""
        for file in self._source.files:
            offset = min(ready.get(file.name, 0), file.size)
            talk.say({"file": file.name, "size": file.size, "offset": offset})
            for chunk in file.chunks(offset):
                if window.complete:
                    return
                talk.send(chunk)
                self._sent += len(chunk)
                window.sent(len(chunk))
        talk.say({"commit": True})

    def _heard(self, there: int) -> None:
        self._patience.got_through()
        self._meter.show(there)


class _Window:
    """What is on its way to the volume: sending waits while that is too much."""

    def __init__(self, talk: Conversation, there: int, heard: Callable[[int], None]) -> None:
        """there: bytes that were on the volume at the start; heard: is told how many are there now."""
        self._talk, self._there, self._heard = talk, there, heard
        self._sent, self._received = 0, 0
        self.complete = False

    def sent(self, count: int) -> None:
        self._sent += count
        self.look()
        while self._sent - self._received > _WINDOW_BYTES and not self.complete:
            self.wait()

    def look(self, seconds: float = 0.0) -> None:
        """Take the answers that are there, or come so soon."""
        for answer in self._talk.answers(seconds):
            self._take(answer)
            if self.complete:
                return

    def wait(self) -> None:
        self._take(self._talk.answer())

    def _take(self, answer: Mapping[str, Any]) -> None:
        if "complete" in answer:
            self.complete = True
        elif "received" in answer:
            self._received = answer["received"]
            self._heard(self._there + self._received)


# --- back ---------------------------------------------------------------------------------------------


def pull(
    volume: VolumeSession, run_path: str, destination: Path, progress: Progress = lambda event: None
) -> list[Path]:
    """Copy a folder of the volume into `destination`, whole or not at all; returns its files.

    run_path: relative to the volume's root. A destination that is empty or holds the same is fine.
    Raises RunnerError when it holds something else, before anything is copied.
    """
    meter = Meter(f"copying {PurePosixPath(run_path).name}", 0, progress)
    patience = Patience(meter.warn)
    listed = patience.keep(lambda: _list(volume, run_path))
    if _holds(destination, listed):
        return files_of(destination)
    meter.total = sum(file.size for file in listed)
    with staged(destination) as aside, _Fetch(volume, run_path, meter, patience) as fetch:
        for file in listed:
            fetch.verified(file, aside / file.name)
    meter.end()
    return files_of(destination)


@dataclass(frozen=True)
class _Listed:
    """A file on the volume. name: relative; size in bytes."""

    name: str
    size: int
    sha256: str


def _list(volume: VolumeSession, run_path: str) -> list[_Listed]:
    found = []
    with Conversation(volume.open([*VOLUME_COMMAND, "list", run_path])) as talk:
        while "file" in (said := talk.answer()):
            name = PurePosixPath(said["file"])
            if name.is_absolute() or ".." in name.parts or not name.parts:
                raise RunnerError(f"the volume lists {said['file']!r}, which is not a file below {run_path}")
            found.append(_Listed(said["file"], said["size"], said["sha256"]))
    return found


def _holds(destination: Path, listed: Sequence[_Listed]) -> bool:
    """Whether it has these files already. Raises RunnerError when it has others."""
    if not destination.is_dir() or not any(destination.iterdir()):
        return False
    names = {name.as_posix(): path for name, path in visible_files(destination)}
    same = set(names) == {file.name for file in listed} and all(
        names[file.name].stat().st_size == file.size and file_sha256(names[file.name]) == file.sha256 for file in listed
    )
    if not same:
        raise RunnerError(f"{destination} holds other files", "give a folder that is empty or not there yet")
    return True


class _Fetch:
    """Files of one folder of the volume, through one command while its connection holds."""

    def __init__(self, volume: VolumeSession, run_path: str, meter: Meter, patience: Patience) -> None:
        self._volume, self._run_path, self._meter, self._patience = volume, run_path, meter, patience
        self._talk: Conversation | None = None
        self._done = 0

    def __enter__(self) -> _Fetch:
        return self

    def __exit__(self, *details: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._talk is not None:
            self._talk.close()
        self._talk = None

    def verified(self, file: _Listed, path: Path) -> None:
        """Raises RunnerError when it arrives differently twice."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            self._patience.keep(lambda: self._fetch(file, path))
            if file_sha256(path) == file.sha256:
                self._done += file.size
                return
            path.unlink()
        raise RunnerError(f"{file.name} does not arrive as it was listed", "does something write to it? Try again")

    def _fetch(self, file: _Listed, path: Path) -> None:
        """What of it is not here yet. Raises LostError, and keeps what has come."""
        try:
            with path.open("ab") as stream:
                self._receive(file, stream)
        except LostError:
            self._leave()
            raise
        except OSError as error:
            hint = "free some space" if error.errno == errno.ENOSPC else ""
            raise RunnerError(f"{path} cannot be written: {error.strerror}", hint) from error

    def _receive(self, file: _Listed, stream: BinaryIO) -> None:
        here = stream.tell()
        talk = self._talk = self._talk or Conversation(self._volume.open([*VOLUME_COMMAND, "send", self._run_path]))
        talk.say({"file": file.name, "offset": here})
        if talk.answer()["size"] != file.size:
            raise RunnerError(f"{file.name} has changed since it was listed", "does something write to it? Try again")
        for part in talk.read(file.size - here):
            stream.write(part)
            here += len(part)
            self._patience.got_through()
            self._meter.show(self._done + here)
