"""Where rows come from: local files and folders, the volume, the hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opensloth.contract import ROOT_ENV
from opensloth.data.file_errors import file_errors
from opensloth.data.readers import count_rows, is_data_file, read_file, without_nulls
from opensloth.data.rows import Row
from opensloth.errors import DataError
from opensloth.fingerprint import file_sha256
from opensloth.opensloth_config import DatasetArgs
from opensloth.source_names import VOLUME_PREFIX, VOLUME_ROOT, is_hub_name


class Source(Protocol):
    """Rows that can be read more than once."""

    name: str
    note: str
    """What a person should know about how the path was understood, or ""."""

    def fingerprint(self) -> str:
        """Hex hash of the content."""
        ...

    def count(self) -> int | None:
        """About how many rows there are; None: unknown."""
        ...

    def rows(self) -> Iterator[Row]: ...


def open_source(args: DatasetArgs, *, evaluation: bool = False) -> Source:
    """Find the data that `args.path` (or `args.eval_path`) names.

    Raises DataError when there is nothing, nothing readable, or the hub does not answer.
    """
    name = args.eval_path if evaluation and args.eval_path else args.path
    path = _local_path(name)
    if path is None:
        return _open_hub(name, args)
    if path.is_file():
        if not is_data_file(path):
            raise _unknown_kind(path)
        return FileSource(name, (path,), root=path)
    if path.is_dir():
        return _open_folder(name, path, args.split)
    raise DataError(f"{path}: no such file or folder", _where_paths_start(name))


@dataclass
class FileSource:
    """One or more data files, read in order."""

    name: str
    files: tuple[Path, ...]
    root: Path
    note: str = ""

    def fingerprint(self) -> str:
        if self.files == (self.root,):
            return _sha256(self.root)
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.root).as_posix()}\0{_sha256(file)}\n".encode())
        return digest.hexdigest()

    def count(self) -> int | None:
        counts = [count_rows(file) for file in self.files]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def rows(self) -> Iterator[Row]:
        for file in self.files:
            with file_errors(file):
                yield from read_file(file)


def _sha256(file: Path) -> str:
    with file_errors(file):
        return file_sha256(file)


@dataclass
class HubSource:
    """A split of a dataset that the `datasets` library has downloaded."""

    name: str
    dataset: Any
    note: str = ""

    def fingerprint(self) -> str:
        return hashlib.sha256(f"hub\0{self.dataset._fingerprint}".encode()).hexdigest()

    def count(self) -> int | None:
        return len(self.dataset)

    def rows(self) -> Iterator[Row]:
        for number, values in enumerate(self.dataset, start=1):
            yield Row(self.name, number, without_nulls(values), unit=" row ")


def _local_path(name: str) -> Path | None:
    """The path that `name` means on this machine; None when it can only be a hub name."""
    if name.startswith(VOLUME_PREFIX):
        inside = name.removeprefix(VOLUME_PREFIX).lstrip("/")
        return Path(os.environ.get(ROOT_ENV, VOLUME_ROOT)) / inside
    return None if is_hub_name(name, Path()) else Path(name).expanduser()


def _where_paths_start(name: str) -> str:
    if name.startswith(VOLUME_PREFIX):
        return f"pvc: paths start at the volume's root, {os.environ.get(ROOT_ENV, VOLUME_ROOT)}"
    return "in a YAML file, a relative path starts at the file's own folder"


def _unknown_kind(path: Path) -> DataError:
    return DataError(
        f"{path}: no reader for '{path.suffix or path.name}' files",
        "use .jsonl, .jsonl.gz, .json, .csv, .parquet, or a folder of those",
    )


def _open_folder(name: str, folder: Path, split: str) -> FileSource:
    """A save_to_disk folder, or all data files below a folder; of one with splits, the split's."""
    if (folder / "dataset_dict.json").is_file():
        inner = folder / split
        if not inner.is_dir():
            found = sorted(child.name for child in folder.iterdir() if child.is_dir())
            raise DataError(f"{folder}: has no split '{split}'", f"dataset.split: one of {', '.join(found)}")
        folder = inner
    saved = (folder / "state.json").is_file()
    files = sorted(file for file in folder.rglob("*") if _is_wanted(file, folder, saved))
    if not files:
        raise DataError(
            f"{folder}: no data files in this folder",
            "expected .jsonl, .jsonl.gz, .json, .csv or .parquet files, or a folder of datasets' save_to_disk",
        )
    of_split = [] if saved else [file for file in files if _split_of(file.relative_to(folder)) == split]
    note = ""
    if of_split and len(of_split) < len(files):
        note = f"{folder}: reading the split '{split}', {len(of_split)} of {len(files)} files"
    return FileSource(name, tuple(of_split or files), folder, note)


def _is_wanted(file: Path, folder: Path, saved: bool) -> bool:
    if any(part.startswith(".") for part in file.relative_to(folder).parts) or not file.is_file():
        return False
    return file.suffix == ".arrow" if saved else is_data_file(file) and file.suffix != ".arrow"


def _split_of(relative: Path) -> str:
    """`train` for train.jsonl, train-00000-of-00002.parquet and train/a.csv."""
    return re.split(r"[-.]", relative.parts[0], maxsplit=1)[0]


def _open_hub(name: str, args: DatasetArgs) -> HubSource:
    from datasets import Dataset, load_dataset

    try:
        loaded = load_dataset(name, args.subset, split=args.split, revision=args.revision)
    except (OSError, ValueError, RuntimeError) as error:  # what the library raises: not found, offline, no such split
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"dataset '{name}' cannot be loaded from the hub: {reason}",
            "check the name, subset, split and network; a local file needs its suffix, as in data/train.jsonl",
        ) from error
    if not isinstance(loaded, Dataset):
        raise DataError(f"dataset '{name}': the split '{args.split}' is not a table of rows")
    return HubSource(name, loaded)
