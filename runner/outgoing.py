"""What is to be sent: a local file or folder, all of it known to be readable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from opensloth.fingerprint import source_sha256, visible_files
from runner.errors import RunnerError

_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class OutgoingFile:
    """name: relative to the source, "" when the source is a file. size in bytes."""

    name: str
    path: Path
    size: int

    @classmethod
    def of(cls, name: str, path: Path) -> OutgoingFile:
        """Raises RunnerError when it cannot be read."""
        try:
            with path.open("rb"):
                return cls(name, path, path.stat().st_size)
        except OSError as error:
            raise RunnerError(f"{path} cannot be read: {error.strerror}", "nothing was copied") from error

    def chunks(self, offset: int) -> Iterator[bytes]:
        """Its bytes from `offset` on. Raises RunnerError when there are fewer than there were."""
        left = self.size - offset
        try:
            with self.path.open("rb") as stream:
                stream.seek(offset)
                while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise RunnerError(f"{self.path} cannot be read any more: {error.strerror}") from error
        if left:
            raise _changed(self.path)


@dataclass(frozen=True)
class Outgoing:
    """One source, and which input it becomes."""

    input: str
    """SHA256/NAME."""
    path: Path
    files: tuple[OutgoingFile, ...]

    @classmethod
    def of(cls, target: str, path: Path) -> Outgoing:
        """target: where it goes on the volume, .../SHA256/NAME. Raises RunnerError when a file cannot be read."""
        found = [(name.as_posix(), file) for name, file in visible_files(path)] if path.is_dir() else [("", path)]
        place = PurePosixPath(target)
        return cls(f"{place.parent.name}/{place.name}", path, tuple(OutgoingFile.of(*one) for one in found))

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def require_unchanged(self) -> None:
        """Raises RunnerError when it is no longer what its hash was taken of."""
        if source_sha256(self.path) != self.input.partition("/")[0]:
            raise _changed(self.path)


def _changed(path: Path) -> RunnerError:
    return RunnerError(f"{path} changed while it was being copied", "submit again once nothing writes to it")
