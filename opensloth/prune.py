"""Free the space of what nobody needs any more: `python -m opensloth.prune --root R --older-than DAYS [--dry-run]`.

Of a run that nothing has written to for DAYS, the checkpoints go; config, logs, events, final/ and the report stay.
Inputs and prepared datasets go when they are that old and no run that is younger uses them. What killed uploads,
builds and deletions left behind (names with a dot) goes after a day. Whatever a living process writes to is younger
than that: a run's events and heartbeats count as much as its checkpoints.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from opensloth import contract, run_config
from opensloth.data import cache
from opensloth.errors import ConfigError
from opensloth.human import human_bytes

DAY_SECONDS: Final = 86400.0
LEFTOVERS: Final = {contract.INPUTS_DIR: (".*",), contract.RUNS_DIR: (".*.deleted",)}
CACHE_LEFTOVERS: Final = (".*.building", ".*.removed", ".*.beat")
"""What nobody needs if nothing has written to it for a day."""
_INPUT: Final = re.compile(rf"/{contract.INPUTS_DIR}/([0-9a-f]{{64}})\b")
_KEY: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Removal:
    """One thing to remove. size in bytes; due: whether it still is, asked right before: hours may lie between."""

    what: str
    path: Path
    size: int
    remove: Callable[[], None]
    due: Callable[[], bool]


def removals(root: Path, older_than_days: float, now: float) -> Iterator[Removal]:
    """All that is due at `now` (seconds since the epoch), found one by one."""
    limit = now - older_than_days * DAY_SECONDS
    runs = _visible_folders(root / contract.RUNS_DIR)
    for run in runs:
        yield from _of_run(run, limit)
    yield from _of_inputs(root, limit)
    for folder in _caches(root, runs):
        yield from _of_cache(folder, older_than_days, now)
        yield from _of_leftovers(folder, CACHE_LEFTOVERS, now)
    for name, patterns in LEFTOVERS.items():
        yield from _of_leftovers(root / name, patterns, now)


def _of_run(run: Path, limit: float) -> Iterator[Removal]:
    def due() -> bool:
        return _last_written(run) < limit

    if due():
        for folder in (run / contract.CHECKPOINTS_DIR, *run.glob(f".{contract.CHECKPOINTS_DIR}.*.removed")):
            if folder.is_dir():
                yield _removal("checkpoints", folder, due)


def _of_inputs(root: Path, limit: float) -> Iterator[Removal]:
    named_by: dict[Path, set[str]] = {}  # runs may come meanwhile; the config of a run names the same inputs for ever

    def due(path: Path) -> bool:
        for run in _visible_folders(root / contract.RUNS_DIR):
            if run not in named_by:
                with suppress(FileNotFoundError):
                    named_by[run] = set(_INPUT.findall((run / contract.CONFIG_FILE).read_text()))
        users = [run for run, keys in named_by.items() if path.name in keys]
        return _last_written(path) < limit and not any(_last_written(run) >= limit for run in users)

    for path in _visible_folders(root / contract.INPUTS_DIR):
        if _KEY.fullmatch(path.name) and due(path):
            yield _removal("input", path, partial(due, path))


def _of_cache(folder: Path, older_than_days: float, now: float) -> Iterator[Removal]:
    limit = now - older_than_days * DAY_SECONDS

    def due(key: str) -> bool:
        found = [entry for entry in [cache.entry(folder / key)] if entry is not None]
        chosen = cache.select_for_pruning(found, older_than_days=older_than_days, unused=False, now=now)
        return any(not any(_last_written(Path(run)) >= limit for run in entry.used_by) for entry in chosen)

    for entry in cache.entries(folder):
        if due(entry.key):
            remove = partial(cache.remove_entry, entry)
            yield Removal("prepared dataset", entry.path, entry.size, remove, partial(due, entry.key))


def _of_leftovers(parent: Path, patterns: Sequence[str], now: float) -> Iterator[Removal]:
    def due(path: Path) -> bool:
        return _last_written(path) < now - DAY_SECONDS

    for path in sorted(path for pattern in patterns for path in parent.glob(pattern)):
        if due(path):
            yield _removal("leftover", path, partial(due, path))


def _removal(what: str, path: Path, due: Callable[[], bool]) -> Removal:
    return Removal(what, path, _size(path), partial(_remove, path), due)


def _remove(path: Path) -> None:
    """Nobody sees it half removed under its name, and what cannot be removed is an error."""
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- what the files say -----------------------------------------------------------------------------


def _visible_folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(path: Path) -> Iterator[Path]:
    """`path` itself, or the files below it. Folders do not count: removing something in one renews its time."""
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    for folder, folders, names in os.walk(path, onerror=_unless_gone):
        yield from (Path(folder, name) for name in names)
        yield from (link for name in folders if (link := Path(folder, name)).is_symlink())


def _unless_gone(error: OSError) -> None:
    """A run that goes on removes its old checkpoints meanwhile; what nobody lets us see, we cannot remove either."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        raise error


def _last_written(path: Path) -> float:
    """Seconds since the epoch of the last write to any file in it; of the folder itself when it has none."""
    times = []
    for file in _files(path):
        with suppress(FileNotFoundError):  # a heartbeat that is being replaced
            times.append(file.lstat().st_mtime)
    with suppress(FileNotFoundError):
        return max(times) if times else path.lstat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    total = 0
    for file in _files(path):
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def _caches(root: Path, runs: Sequence[Path]) -> list[Path]:
    """The dataset caches of the root and of its runs; those elsewhere belong to somebody else."""
    found = {root / run_config.DEFAULT_DATA_CACHE_PATH}
    for run in runs:
        with suppress(ConfigError, FileNotFoundError):  # of another version: its default is above
            config = run_config.load((run / contract.CONFIG_FILE).read_text())
            found.add(Path(config.opensloth.data_cache_path))
    return sorted(path for path in found if path.is_dir() and path.resolve().is_relative_to(root.resolve()))


# --- the command --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when something could not be removed."""
    parser = argparse.ArgumentParser(prog="python -m opensloth.prune", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder that holds runs/, inputs/ and cache/")
    parser.add_argument("--older-than", type=_days, required=True, metavar="DAYS")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        parser.error(f"{options.root} is not a folder")
    return prune(options.root, options.older_than, dry_run=options.dry_run)


def prune(root: Path, older_than_days: float, *, dry_run: bool) -> int:
    freed, failed = 0, False
    for removal in removals(root, older_than_days, time.time()):
        if not dry_run:
            if not (os.path.lexists(removal.path) and removal.due()):
                continue
            try:
                removal.remove()
            except OSError as error:
                sys.stderr.write(f"error: {removal.path}: {error.strerror}\n")
                failed = True
                continue
        freed += removal.size
        verb = "would remove" if dry_run else "removed"
        _say(f"{verb} {removal.what} {removal.path.relative_to(root)}: {human_bytes(removal.size)}")
    _say(f"{'would free' if dry_run else 'freed'} {human_bytes(freed)}")
    return int(failed)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _days(text: str) -> float:
    days = float(text)
    if not days >= 1:  # also nan; less could meet a run between two of its signs of life
        raise argparse.ArgumentTypeError(f"{text} is less than a day")
    return days


if __name__ == "__main__":
    sys.exit(main())
