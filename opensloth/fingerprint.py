"""Content hashes of data sources, from bytes alone: the same on a laptop and in a pod. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePath

CHUNK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def visible_files(path: Path) -> Iterator[tuple[PurePath, Path]]:
    """(name relative to the folder, path) of the files below it, sorted, hidden ones left out: what its hash is of."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
            yield name, file


def folder_sha256(path: Path) -> str:
    """Hex SHA-256 of a folder: of the sorted relative names and the hashes of its visible files."""
    digest = hashlib.sha256()
    for name, file in visible_files(path):
        digest.update(f"{name.as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def source_sha256(path: Path) -> str:
    """Hex SHA-256 of a file or of a folder.

    Raises FileNotFoundError when there is neither.
    """
    return folder_sha256(path) if path.is_dir() else file_sha256(path)
