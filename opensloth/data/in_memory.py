"""Tokenised rows that a caller hands over, as training reads prepared ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from opensloth.data.documents import Document, Int32Array
from opensloth.data.validate import validate_rows


class InMemoryDocuments:
    """A Hugging Face dataset or a list of rows with `input_ids` and `labels`, checked and kept as int32.

    lengths, targets: int32[n], tokens of each document, and those of them that are predicted.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, name: str, vocabulary: int, max_length: int) -> None:
        """name: what messages call the rows.

        Raises DataError for missing columns, unequal lengths, ids outside the vocabulary, rows over
        `max_length` and rows without targets; it names row and column.
        """
        validate_rows(rows, max_length=max_length, vocabulary=vocabulary, drop_overlength=False, name=name)
        self._documents = [
            Document(np.asarray(row["input_ids"], dtype=np.int32), np.asarray(row["labels"], dtype=np.int32))
            for row in rows
        ]
        self.lengths = np.array([len(document.ids) for document in self._documents], dtype=np.int32)
        self.targets = np.array([document.targets for document in self._documents], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._documents)

    def row(self, index: int) -> tuple[Int32Array, Int32Array]:
        """input_ids and labels of document `index`, int32[n] each."""
        return self._documents[index]

    def epoch_documents(self) -> npt.NDArray[np.int64]:
        """int64[n]: every document once."""
        return np.arange(len(self), dtype=np.int64)
