"""A prepared dataset: tokenised documents that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opensloth.data.documents import Int32Array
from opensloth.data.storage import LENGTHS_FILE, SOURCES_FILE, TARGETS_FILE, BatchColumns, DocumentFiles, targets_of
from opensloth.errors import DataError
from opensloth.files import read_json

FOOTER_FILE = "oslo.json"
TRAIN_DIR = "train"
EVAL_DIR = "eval"
_SPLITS = {TRAIN_DIR: (TRAIN_DIR,), EVAL_DIR: (EVAL_DIR, "validation")}
"""Names that a part may have in a folder of splits; the first that is there is taken."""

Int64Array = npt.NDArray[np.int64]


def part_folder(folder: Path, part: str) -> Path | None:
    """The folder of a part of a prepared dataset, None when there is none; one without splits is for training."""
    if _is_saved(folder):
        return folder if part == TRAIN_DIR else None
    return next((folder / name for name in _SPLITS[part] if _is_saved(folder / name)), None)


def splits_of(folder: Path) -> list[str]:
    """The names of all splits below a folder; [] where it has none or is one itself."""
    return [] if _is_saved(folder) else sorted(child.name for child in folder.iterdir() if _is_saved(child))


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file()


class PreparedDataset:
    """Documents of one part, train or eval, of a cache entry, or of a plain `save_to_disk` folder.

    lengths: int32[n], tokens of each document.
    targets: int32[n], targets of each document that a token before them predicts.
    info: the cache entry's footer; {} for a plain folder.
    """

    def __init__(self, files: DocumentFiles, lengths: Int32Array, targets: Int32Array, info: dict[str, Any]) -> None:
        self._files = files
        self.lengths, self.targets, self.info = lengths, targets, info
        self._sources: npt.NDArray[np.int16] | None = None
        self._numbers: Int64Array | None = None
        """Which documents of the files these are; None: all."""

    @classmethod
    def open(cls, path: Path | str, part: str = TRAIN_DIR, *, max_length: int | None = None) -> PreparedDataset:
        """Open a cache entry, a prepared folder, or what `datasets.Dataset.save_to_disk` wrote.

        max_length: documents of more tokens are left out (a cache entry has none); None: all are there.
        Raises DataError when the folder is none of these, or torn.
        """
        opened = cls._open(Path(path), part)
        if max_length is not None and len(opened) and int(opened.lengths.max()) > max_length:
            opened._keep(np.flatnonzero(opened.lengths <= max_length))
        return opened

    @classmethod
    def _open(cls, folder: Path, part: str) -> PreparedDataset:
        footer = read_json(folder / FOOTER_FILE)
        if footer is None:
            return cls._open_plain(folder, part)
        place = folder / part
        try:
            files = DocumentFiles(sorted(place.glob("*.arrow")))
            lengths = np.load(place / LENGTHS_FILE, mmap_mode="r")
            targets = np.load(place / TARGETS_FILE, mmap_mode="r")
            opened = cls(files, lengths, targets, footer)
            if part == TRAIN_DIR:  # evaluation sees every document once
                opened._sources = np.load(place / SOURCES_FILE, mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(
                f"{place}: this prepared dataset is damaged ({error})", "prepare it again: oslo data build"
            ) from error
        if len(files) != len(lengths):
            raise DataError(
                f"{place}: holds {len(files)} documents, {len(lengths)} expected", "prepare it again: oslo data build"
            )
        return opened

    @classmethod
    def _open_plain(cls, folder: Path, part: str) -> PreparedDataset:
        folder = part_folder(folder, part) or folder
        state = read_json(folder / "state.json")
        if not isinstance(state, dict) or "_data_files" not in state:
            raise DataError(
                f"{folder}: is not a prepared dataset",
                "expected what `oslo data build` or datasets' save_to_disk writes, with input_ids and labels",
            )
        try:
            files = DocumentFiles([folder / item["filename"] for item in state["_data_files"]])
        except KeyError as error:
            raise DataError(
                f"{folder}: the column {error} is missing", "a prepared dataset has input_ids and labels"
            ) from error
        except (OSError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{folder}: cannot be read: {error}") from error
        return cls(files, *_measure(files), {})

    @classmethod
    def has_eval(cls, path: Path | str) -> bool:
        """Whether there is an evaluation part, and documents in it."""
        folder = Path(path)
        return part_folder(folder, EVAL_DIR) is not None and len(cls.open(folder, EVAL_DIR)) > 0

    def _keep(self, numbers: Int64Array) -> None:
        self._numbers = numbers
        self.lengths, self.targets = self.lengths[numbers], self.targets[numbers]
        if self._sources is not None:
            self._sources = self._sources[numbers]

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> tuple[Int32Array, Int32Array]:
        """input_ids and labels of document `index`, int32[n] each; read-only views where the file holds int32."""
        ids, labels = self.stored_row(index)
        return ids.astype(np.int32, copy=False), labels.astype(np.int32, copy=False)

    def stored_row(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The same in the integer type of the file: ids that int32 cannot hold show as they are."""
        return self._files.row(index if self._numbers is None else int(self._numbers[index]))

    def batch_columns(self) -> list[BatchColumns]:
        """All documents of the files by record batch, also those that `max_length` leaves out."""
        return self._files.batch_columns()

    def epoch_documents(self) -> Int64Array:
        """int64[m]: the documents of one epoch, repeated or left out by their dataset's weight; deterministic."""
        weights = [source["weight"] for source in self.info.get("sources", [])]
        if self._sources is None or all(weight == 1 for weight in weights):
            return np.arange(len(self), dtype=np.int64)
        sources = np.asarray(self._sources)
        parts = [weighted(np.flatnonzero(sources == i), weight) for i, weight in enumerate(weights)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def weighted(documents: Int64Array, weight: float) -> Int64Array:
    """Each document floor(weight) times, and an evenly spread part of them once more for the rest."""
    whole = int(weight)
    steps = np.floor(np.arange(len(documents) + 1) * (weight - whole) + 1e-9)
    again = documents[np.diff(steps) > 0]
    return np.sort(np.concatenate([*[documents] * whole, again]).astype(np.int64))


def _measure(files: DocumentFiles) -> tuple[Int32Array, Int32Array]:
    """Lengths and targets, computed from the documents a batch at a time."""
    lengths, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for id_starts, _, label_starts, labels in files.batch_columns():
        lengths.append(np.diff(id_starts))
        targets.append(targets_of(label_starts, labels))
    return np.concatenate(lengths).astype(np.int32), np.concatenate(targets).astype(np.int32)
