"""The dataset cache: `<cache>/<key>/`, each entry whole or absent, named by the hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensloth.contract import RUN_DIR_ENV
from opensloth.data.prepared import FOOTER_FILE
from opensloth.errors import DataError
from opensloth.files import create_json, read_json, sync_folder, sync_tree, write_json
from opensloth.fingerprint import file_sha256

FORMAT_VERSION = 2
"""Of the files in an entry. Another version is not read."""

USES_DIR = ".uses"
_KEY_DIGITS = 64


@dataclass(frozen=True)
class Entry:
    """One entry as `oslo data ls` shows it. size in bytes, created in seconds since the epoch."""

    key: str
    path: Path
    name: str
    documents: int
    tokens: int
    size: int
    created: float
    used_by: tuple[str, ...]
    """Run folders that have used it and still exist."""
    last_used: float


def key_of(parts: Mapping[str, Any]) -> str:
    """The key of an entry that `parts`, a JSON value, decide."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def read_entry(folder: Path) -> dict[str, Any] | None:
    """The footer of a whole entry, None when there is no entry or it is torn.

    Checks the footer's own hash and the files' sizes, not their contents (`damaged_files`).
    """
    footer = _sealed_footer(folder)
    if footer is None:
        return None
    for name, expected in footer["files"].items():
        try:
            if (folder / name).stat().st_size != expected["size"]:
                return None
        except OSError:
            return None
    return footer


def sealed(footer: Mapping[str, Any]) -> dict[str, Any]:
    """The footer with its format and its own hash, which tells when a part of it has changed."""
    whole = {**footer, "format": FORMAT_VERSION}
    return {**whole, "sha256": key_of(whole)}


def _sealed_footer(folder: Path) -> dict[str, Any] | None:
    footer = read_json(folder / FOOTER_FILE)
    if not isinstance(footer, dict) or footer.get("format") != FORMAT_VERSION:
        return None
    rest = {name: value for name, value in footer.items() if name != "sha256"}
    return footer if sealed(rest) == footer else None


def finish_entry(aside: Path, final: Path, footer: Mapping[str, Any]) -> dict[str, Any]:
    """Write the footer of a folder whose files are complete, and give it its final name.

    When another builder was quicker, its entry stays and `aside` is removed. Returns the entry's footer.
    """
    files = {
        file.relative_to(aside).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(aside.rglob("*"))
        if file.is_file()
    }
    whole = sealed({**footer, "files": files})
    sync_tree(aside)
    write_json(aside / FOOTER_FILE, whole)
    there = read_entry(final)
    if there is None:
        if final.exists():
            remove_folder(final)
        try:
            aside.rename(final)
            sync_folder(final.parent)
            return whole
        except OSError:  # not empty: published between the two lines above
            there = read_entry(final)
            if there is None:
                raise
    remove_folder(aside)
    return there


def remove_folder(folder: Path) -> None:
    """Remove a folder; nobody sees it half removed under its name."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.removed")
    try:
        folder.rename(hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(cache: Path, key: str, keep: str) -> None:
    """Remove what killed builders of this entry left behind. keep: the token of the living one."""
    for pattern in (f".{key}.*.building", f".{key}.*.removed"):
        for found in cache.glob(pattern):
            if keep not in found.name:
                shutil.rmtree(found, ignore_errors=True)
    for beat in cache.glob(f".{key}.*.beat"):
        if keep not in beat.name:
            beat.unlink(missing_ok=True)


def note_use(folder: Path) -> None:
    """Remember that the run of this process uses an entry; nothing on a read-only cache."""
    run = os.environ.get(RUN_DIR_ENV)
    uses = folder.parent / USES_DIR / folder.name
    if not run or not os.access(folder.parent, os.W_OK):
        return
    uses.mkdir(parents=True, exist_ok=True)
    marker = uses / hashlib.sha256(run.encode()).hexdigest()[:16]
    if not create_json(marker, {"run": run}):
        os.utime(marker)


def entries(cache: Path) -> list[Entry]:
    """All whole entries, the latest first."""
    if not cache.is_dir():
        return []
    found = [one for folder in cache.iterdir() if (one := entry(folder)) is not None]
    return sorted(found, key=lambda entry: -entry.created)


def entry_folders(cache: Path) -> list[Path]:
    """The folders of all entries, torn ones too."""
    return sorted(folder for folder in cache.iterdir() if _is_key(folder.name)) if cache.is_dir() else []


def entry(folder: Path) -> Entry | None:
    """None when there is no whole one."""
    footer = _footer_of(folder)
    return None if footer is None else _entry(folder, footer)


def select_for_pruning(
    found: list[Entry], *, older_than_days: float | None, unused: bool, now: float | None = None
) -> list[Entry]:
    """The entries that match all the conditions given; none given: none."""
    if older_than_days is None and not unused:
        return []
    limit = (now or time.time()) - (older_than_days or 0) * 86400
    return [
        entry for entry in found
        if (older_than_days is None or entry.last_used < limit) and not (unused and entry.used_by)
    ]  # fmt: skip


def remove_entry(entry: Entry) -> None:
    remove_folder(entry.path)
    shutil.rmtree(entry.path.parent / USES_DIR / entry.key, ignore_errors=True)


def damaged_files(folder: Path) -> list[str]:
    """The files of an entry whose content is not what was written; reads all of it.

    Raises DataError when the folder is no entry.
    """
    if not (folder / FOOTER_FILE).is_file():
        raise DataError(f"{folder}: is not a cache entry (no {FOOTER_FILE})", "prepare it again: oslo data build")
    footer = _sealed_footer(folder)
    if footer is None:
        return [FOOTER_FILE]
    return [
        name for name, expected in sorted(footer["files"].items())
        if not (folder / name).is_file() or file_sha256(folder / name) != expected["sha256"]
    ]  # fmt: skip


def _is_key(name: str) -> bool:
    return len(name) == _KEY_DIGITS and not name.startswith(".")


def _footer_of(folder: Path) -> dict[str, Any] | None:
    return read_entry(folder) if _is_key(folder.name) else None


def _entry(folder: Path, footer: dict[str, Any]) -> Entry:
    markers = list((folder.parent / USES_DIR / folder.name).glob("*"))
    runs = [(read_json(marker) or {}).get("run", "") for marker in markers]
    return Entry(
        key=folder.name,
        path=folder,
        name=footer["name"],
        documents=footer["counts"]["documents"],
        tokens=footer["counts"]["tokens"],
        size=sum(expected["size"] for expected in footer["files"].values()),
        created=footer["created"],
        used_by=tuple(sorted(run for run in runs if run and Path(run).is_dir())),
        last_used=max([footer["created"], *(marker.stat().st_mtime for marker in markers)]),
    )
