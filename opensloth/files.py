"""Files that are whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` with `data`; a reader sees the old bytes or the new, never a part."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def create_json(path: Path, value: Any) -> bool:
    """Write `path` unless it exists (O_EXCL by way of a link); say whether this call made it."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    write_json(aside, value)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


def read_json(path: Path) -> Any | None:
    """The file's value; None when it does not exist or is torn."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """fsync every file and folder below `path`, for files that a library wrote."""
    for found in sorted(path.rglob("*")):
        if found.is_dir():
            sync_folder(found)
        else:
            with found.open("rb+") as stream:
                os.fsync(stream.fileno())
    sync_folder(path)
