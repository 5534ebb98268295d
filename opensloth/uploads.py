"""Inputs that come from another machine: received aside, verified, then put in place under their content's hash.

    inputs/<sha256>/<name>                     a file or folder, whole and verified, or absent
    inputs/.<sha256>.<token>.partial/          of one upload: `content`, and a beat while somebody writes to it

Every upload writes to a partial of its own, so that two of the same content cannot harm each other: the first to
end wins, and the other notices. One that was broken off is taken over, by a rename, by whoever comes next.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from opensloth import contract
from opensloth.beat import Beat, Watch
from opensloth.files import read_json, sync_folder, sync_tree
from opensloth.fingerprint import source_sha256, visible_files
from opensloth.volume_io import VolumeError, confined

STALE_SECONDS: Final = 15.0
"""An upload whose beat has not changed for so long is over; it writes one a second."""
CONTENT: Final = "content"
_BEAT: Final = "beat.json"
_CHUNK_BYTES: Final = 1 << 20
_PARSED: Final = re.compile(r"([0-9a-f]{64})/([^/\0]+)")
_PLACE_ATTEMPTS: Final = 5


@dataclass(frozen=True)
class Input:
    """One input: `<sha256>/<name>` below the root's inputs/."""

    root: Path
    sha256: str
    name: str

    @classmethod
    def parse(cls, root: Path, text: str) -> Input:
        found = _PARSED.fullmatch(text)
        if found is None or found[2] in (".", ".."):
            raise VolumeError(f"{text!r} is not SHA256/NAME", kind="usage", exit_code=2)
        return cls(root, found[1], found[2])

    @property
    def folder(self) -> Path:
        return confined(self.root, contract.INPUTS_DIR)

    @property
    def place(self) -> Path:
        return self.folder / self.sha256 / self.name

    def is_complete(self) -> bool:
        return os.path.lexists(self.place)

    def adopt(self) -> bool:
        """Put it in place by links where the same content is there under another name; whether it is there now."""
        parent = self.place.parent
        others = sorted(path for path in parent.glob("*") if not path.is_symlink()) if parent.is_dir() else []
        if not others:
            return False
        aside = self.folder / f".{self.sha256}.{uuid.uuid4().hex[:12]}.new"
        try:
            if others[0].is_dir():
                shutil.copytree(others[0], aside, copy_function=os.link)
            else:
                os.link(others[0], aside)
            aside.rename(self.place)
        except (OSError, shutil.Error):
            _remove(aside)  # no links here, or another upload was first
        return self.is_complete()

    def partials(self) -> list[Path]:
        """All that were begun, the largest first."""
        found = [(content_bytes(path), path) for path in self.folder.glob(f".{self.sha256}.*.partial")]
        return [path for _, path in sorted(found, reverse=True)]

    def renew(self) -> None:
        """Let pruning know that somebody is about to use it."""
        files = [self.place] if self.place.is_file() else [path for _, path in visible_files(self.place)]
        with suppress(OSError):  # of another user: it is as old as it is
            for path in files[:1]:
                os.utime(path)


class Partial:
    """What this process receives of an input."""

    def __init__(self, wanted: Input) -> None:
        self._input = wanted
        self.token = uuid.uuid4().hex[:12]
        self.folder = wanted.folder / f".{wanted.sha256}.{self.token}.partial"
        self.content = self.folder / CONTENT
        self._beat = Beat(self.folder / _BEAT, lambda: {"token": self.token})

    def claim(self, *, fresh: bool, stale_seconds: float = STALE_SECONDS) -> None:
        """Take over the largest that nobody writes to, or begin one. fresh: begin one in any case."""
        self._input.folder.mkdir(parents=True, exist_ok=True)
        for found in [] if fresh else _abandoned(self._input.partials(), stale_seconds):
            with suppress(FileNotFoundError):  # somebody else was quicker
                found.rename(self.folder)
                self._beat.write()
                self._beat.start()
                return
        aside = self.folder.with_suffix(".new")  # without a beat it would look abandoned
        aside.mkdir()
        self._beat = Beat(aside / _BEAT, lambda: {"token": self.token})
        self._beat.write()
        aside.rename(self.folder)
        self._beat = Beat(self.folder / _BEAT, lambda: {"token": self.token})
        self._beat.start()

    def sizes(self) -> dict[str, int]:
        """Bytes received by file; a single file is named ""."""
        return {name: path.stat().st_size for name, path in _contents(self.content)}

    def receive(self, stream: BinaryIO, name: str, size: int, offset: int, received: Callable[[int], None]) -> None:
        """Read a file's bytes from `offset` to `size`. received: is told of every few.

        Raises EOFError when the stream ends before, VolumeError when another upload has taken this one over.
        """
        path = confined(self.content, name) if name else self.content
        self._require()
        descriptor = self._open(path)
        with os.fdopen(descriptor, "wb") as file:
            if os.fstat(descriptor).st_size < offset:
                raise VolumeError(f"{name or self._input.name} has fewer than {offset} bytes here", kind="usage")
            file.truncate(offset)
            file.seek(offset)
            for chunk in _read(stream, size - offset):
                self._require()
                file.write(chunk)
                received(len(chunk))
            file.flush()
            os.fsync(descriptor)

    def _open(self, path: Path) -> int:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            self.discard()  # what was begun came of a folder that changed under its sender
            raise VolumeError(f"what had arrived of {self._input.name} does not fit", kind="differs") from error

    def make_folder(self) -> None:
        self.content.mkdir(exist_ok=True)

    def commit(self) -> None:
        """Verify and put in place. Raises VolumeError (kind `differs`), and forgets it, when its hash is another."""
        found = source_sha256(self.content)
        if found != self._input.sha256:
            self.discard()
            what = f"what arrived as {self._input.name} is not what was announced"
            raise VolumeError(f"{what}: sha256 {found}, not {self._input.sha256}", "submit it again", "differs")
        if self.content.is_dir():
            sync_tree(self.content)
        self._take_place()
        self.discard()
        for other in _abandoned(self._input.partials(), 0.0):
            shutil.rmtree(other, ignore_errors=True)

    def release(self) -> None:
        """Leave it to whoever goes on with it."""
        self._beat.stop()
        (self.folder / _BEAT).unlink(missing_ok=True)

    def discard(self) -> None:
        self._beat.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_place(self) -> None:
        place = self._input.place
        for _ in range(_PLACE_ATTEMPTS):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.content.rename(place)
            except FileNotFoundError:
                self._require()
                continue  # pruning has removed the old folder of that content
            except OSError:
                if not self._input.is_complete():  # else: another upload of the same content was first
                    raise
            sync_folder(place.parent)
            sync_folder(self._input.folder)
            return
        raise VolumeError(f"{place.parent} vanishes as soon as it is made", "is something else clearing the volume?")

    def _require(self) -> None:
        if not self.folder.is_dir():
            raise VolumeError(f"another upload of {self._input.name} has taken this one over", kind="taken")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def content_bytes(partial: Path) -> int:
    """How much a partial holds."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for _, path in _contents(partial / CONTENT))
    return 0


def _contents(content: Path) -> Iterator[tuple[str, Path]]:
    if content.is_file():
        yield "", content
    else:
        yield from ((name.as_posix(), path) for name, path in visible_files(content))


def _abandoned(partials: list[Path], stale_seconds: float) -> Iterator[Path]:
    """Those without a beat, then those whose beat has not changed for so long; 0: only the first."""
    beating = [path for path in partials if (path / _BEAT).exists()]
    yield from (path for path in partials if path not in beating)
    watches = {path: Watch() for path in beating if stale_seconds > 0}
    first = {path: read_json(path / _BEAT) for path in watches}
    while watches:
        for path in list(watches):
            beat = read_json(path / _BEAT)
            if beat is not None and beat != first[path]:
                del watches[path]  # it lives
            elif beat is None or watches[path].unchanged_seconds(str(beat)) >= stale_seconds:
                del watches[path]
                yield path
        time.sleep(0.1)


def _read(stream: BinaryIO, count: int) -> Iterator[bytes]:
    """Exactly so many bytes, in parts. Raises EOFError when there are fewer."""
    while count:
        chunk = stream.read(min(count, _CHUNK_BYTES))
        if not chunk:
            raise EOFError
        count -= len(chunk)
        yield chunk
