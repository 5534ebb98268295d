"""Puts a result into a folder of the user's: whole or not at all, and never over something else."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opensloth.fingerprint import folder_sha256
from runner.errors import RunnerError


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `destination` at the end.

    A destination that is empty, or holds the same files already, is fine. Raises RunnerError when it holds others.
    """
    destination = destination.absolute()  # "." has no name
    if destination.exists() and not destination.is_dir():
        raise RunnerError(f"{destination} is a file", "give a folder that is not there yet")
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        yield aside
        _take_place(aside, destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def place_result(source: Path, destination: Path) -> list[Path]:
    """Copy a folder of this machine; returns the files at the destination."""
    with staged(destination) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
        if folder_sha256(aside) != folder_sha256(source):
            raise RunnerError(f"the copy of {source} is not the same", "try again")
    return files_of(destination)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _take_place(aside: Path, destination: Path) -> None:
    if destination.exists() and any(destination.iterdir()):
        if folder_sha256(destination) != folder_sha256(aside):
            raise RunnerError(f"{destination} holds other files", "give a folder that is empty or not there yet")
        return
    if destination.exists():
        destination.rmdir()
    aside.rename(destination)
