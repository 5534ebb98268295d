"""A folder of documents on disk: an Arrow stream that `datasets.load_from_disk` opens too, and their lengths.

data-00000-of-00001.arrow   columns input_ids, labels: list<int32>
state.json, dataset_info.json   what `datasets` wants beside it
lengths.npy, targets.npy    int32[n]; only ours, so that packing need not read the documents
sources.npy                 int16[n]: which source a document came from
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from opensloth.data.documents import IGNORE, Document, Int32Array

ARROW_FILE = "data-00000-of-00001.arrow"
LENGTHS_FILE = "lengths.npy"
TARGETS_FILE = "targets.npy"
SOURCES_FILE = "sources.npy"

TOKENS_PER_BATCH = 1 << 20
"""Documents are collected up to this many tokens (8 MiB) before they are written."""

BatchColumns = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
"""Starts and values of input_ids, starts and values of labels; n documents have n + 1 starts."""

_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_FEATURES = {name: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"} for name in _SCHEMA.names}


class DocumentWriter:
    """Writes documents in batches; memory does not grow with their number, but for 10 bytes each."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """fingerprint: names the content, for the caches of `datasets`."""
        folder.mkdir(parents=True)
        self._fingerprint = fingerprint
        self._folder = folder
        schema = _SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": _FEATURES}})})
        self._stream = pa.ipc.new_stream(str(folder / ARROW_FILE), schema)
        self._pending: list[Document] = []
        self._pending_tokens = 0
        self._lengths: list[Int32Array] = []
        self._targets: list[Int32Array] = []
        self._sources: list[npt.NDArray[np.int16]] = []
        self._pending_facts: list[tuple[int, int]] = []
        self.documents = self.tokens = self.target_tokens = 0

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            self._stream.close()

    def add(self, document: Document, targets: int, source: int) -> None:
        """targets: `document.targets`. source: the number of its dataset, whose weight counts."""
        self._pending.append(Document(document.ids.copy(), document.labels.copy()))  # not views of whole batches
        self._pending_facts.append((targets, source))
        self._pending_tokens += len(document.ids)
        if self._pending_tokens >= TOKENS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        lengths = np.array([len(document.ids) for document in self._pending], dtype=np.int32)
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        ids = np.concatenate([document.ids for document in self._pending])
        labels = np.concatenate([document.labels for document in self._pending])
        columns = [pa.ListArray.from_arrays(starts, pa.array(values)) for values in (ids, labels)]
        self._stream.write_batch(pa.record_batch(columns, names=_SCHEMA.names))
        targets, sources = np.array(self._pending_facts, dtype=np.int32).T
        self._lengths.append(lengths)
        self._targets.append(targets)
        self._sources.append(sources.astype(np.int16))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.target_tokens += int(targets.sum())
        self._pending, self._pending_facts, self._pending_tokens = [], [], 0

    def _finish(self) -> None:
        self._flush()
        self._stream.close()
        np.save(self._folder / LENGTHS_FILE, _all(self._lengths, np.int32))
        np.save(self._folder / TARGETS_FILE, _all(self._targets, np.int32))
        np.save(self._folder / SOURCES_FILE, _all(self._sources, np.int16))
        state: dict[str, Any] = {
            "_data_files": [{"filename": ARROW_FILE}],
            "_fingerprint": self._fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {"citation": "", "description": "", "features": _FEATURES, "homepage": "", "license": ""}
        (self._folder / "state.json").write_text(json.dumps(state, indent=1))
        (self._folder / "dataset_info.json").write_text(json.dumps(info, indent=1))


def _all(parts: list[Any], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


class DocumentFiles:
    """Reads the Arrow files of a folder through memory maps: documents are views, nothing is copied."""

    def __init__(self, files: list[Path]) -> None:
        """Raises pyarrow's errors when a file is not an Arrow stream, KeyError when a column is missing."""
        self._maps = [pa.memory_map(str(file)) for file in files]
        self._batches: list[BatchColumns] = []
        firsts = [0]
        for source in self._maps:
            for batch in pa.ipc.open_stream(source):
                if batch.num_rows == 0:
                    continue
                self._batches.append((*_list_column(batch, "input_ids"), *_list_column(batch, "labels")))
                firsts.append(firsts[-1] + batch.num_rows)
        self._firsts = np.array(firsts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def row(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """(input_ids, labels) of one document, in the file's own integer type."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        id_starts, ids, label_starts, labels = self._batches[number]
        at = index - int(self._firsts[number])
        return ids[id_starts[at] : id_starts[at + 1]], labels[label_starts[at] : label_starts[at + 1]]

    def batch_columns(self) -> list[BatchColumns]:
        """One for each record batch, in the order of the documents."""
        return self._batches


def _list_column(batch: Any, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    column = batch.column(batch.schema.get_field_index(name)) if name in batch.schema.names else None
    if column is None:
        raise KeyError(name)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise TypeError(f"column '{name}' holds {column.type}, expected lists of whole numbers")
    if not pa.types.is_integer(column.type.value_type):
        raise TypeError(f"column '{name}' holds lists of {column.type.value_type}, expected whole numbers")
    if column.null_count or column.values.null_count:
        raise TypeError(f"column '{name}' has nulls")
    return np.from_dlpack(column.offsets), np.from_dlpack(column.values)  # views: to_numpy imports pandas first


def targets_of(label_starts: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """int64[n]: the targets of each document that a token before them predicts (`Document.targets`)."""
    is_target = labels != IGNORE
    first = label_starts[:-1][np.diff(label_starts) > 0]
    is_target[first] = False
    before = np.concatenate(([0], np.cumsum(is_target)))
    return before[label_starts[1:]] - before[label_starts[:-1]]
