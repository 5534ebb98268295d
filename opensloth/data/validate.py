"""Is a row of ids and labels fit to train on? The one place that says so, for built, prepared and given data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from opensloth.data.documents import IGNORE, Document
from opensloth.data.rows import RowProblem
from opensloth.data.storage import BatchColumns, targets_of
from opensloth.errors import DataError


@dataclass
class RowCounts:
    """What validation found: rows that are fit, and the indices of those left out for their length."""

    fit: int
    overlength: list[int]


def validate_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    max_length: int,
    vocabulary: int | None,
    drop_overlength: bool,
    name: str = "train_dataset",
) -> RowCounts:
    """Check tokenised rows: a Hugging Face dataset, or a list of dicts.

    vocabulary: number of ids the model knows; None: unknown, not checked.
    drop_overlength: rows over `max_length` are left out; false: they are an error.
    Raises DataError that names row and column.
    """
    overlength: list[int] = []
    count = 0
    for index, row in enumerate(rows):
        count += 1
        for column in ("input_ids", "labels"):
            if column not in row:
                found = ", ".join(map(str, row)) or "none"
                raise DataError(f"{name}: the column '{column}' is missing; columns found: {found}")
        try:
            document = _document(row)
        except RowProblem as problem:
            raise DataError(f"{name}[{index}]: {problem}") from problem
        if check_fitness(document, f"{name}[{index}]", max_length, vocabulary, drop_overlength):
            overlength.append(index)
    if count == len(overlength):
        raise _nothing_left(name, count, max_length)
    return RowCounts(count - len(overlength), overlength)


def check_fitness(
    document: Document, where: str, max_length: int, vocabulary: int | None, drop_overlength: bool
) -> bool:
    """Whether the document is to be left out for its length. Raises DataError when it is unfit otherwise."""
    problem = check_document(document, vocabulary)
    if problem:
        raise DataError(f"{where}: {problem}")
    if len(document.ids) > max_length:
        if drop_overlength:
            return True
        raise DataError(
            f"{where}: column 'input_ids' has {len(document.ids)} tokens, over max_seq_length {max_length}",
            "raise fast_model_args.max_seq_length, or set filter_overlength_samples: true to leave such rows out",
        )
    if not document.targets:
        raise DataError(
            f"{where}: column 'labels' has no targets after the first token (all are {IGNORE})",
            "leave the row out, or label what is to be learned",
        )
    return False


def suspects(columns: BatchColumns, max_length: int, vocabulary: int | None) -> npt.NDArray[np.int64]:
    """int64[m]: the documents of a batch that `check_fitness` would not pass; it says what is wrong with each.

    It looks at a whole batch at once: one document after another, a hundred thousand take seconds.
    """
    id_starts, ids, label_starts, labels = columns
    lengths = np.diff(id_starts)
    unfit = (lengths != np.diff(label_starts)) | (lengths == 0) | (lengths > max_length)
    unfit |= targets_of(label_starts, labels) == 0
    bound = vocabulary if vocabulary is not None else np.iinfo(np.int32).max
    for starts, values, outside in (
        (id_starts, ids, (ids < 0) | (ids >= bound)),
        (label_starts, labels, (labels >= bound) | ((labels < 0) & (labels != IGNORE))),
    ):
        count = np.concatenate(([0], np.cumsum(outside))) if outside.any() else np.zeros(len(values) + 1, np.int64)
        unfit |= count[starts[1:]] > count[starts[:-1]]
    return np.flatnonzero(unfit)


def check_document(document: Document, vocabulary: int | None) -> RowProblem | None:
    """What is wrong with ids and labels as such."""
    ids, labels = document
    if len(ids) != len(labels):
        return RowProblem(f"'input_ids' has {len(ids)} items, 'labels' has {len(labels)}: they must be equally long")
    if len(ids) == 0:
        return RowProblem("'input_ids' is empty")
    bound = vocabulary if vocabulary is not None else np.iinfo(np.int32).max
    if ids.min() < 0 or ids.max() >= bound:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        return RowProblem(f"'input_ids' has the id {wrong}, outside the model's vocabulary of {bound}")
    if labels.max() >= bound or (labels.min() < 0 and ((labels < 0) & (labels != IGNORE)).any()):
        wrong = labels.max() if labels.max() >= bound else labels[(labels < 0) & (labels != IGNORE)][0]
        return RowProblem(f"'labels' has {wrong}: expected an id of the vocabulary of {bound}, or {IGNORE}")
    return None


def _document(row: Mapping[str, Any]) -> Document:
    arrays = []
    for column in ("input_ids", "labels"):
        try:
            values = np.asarray(row[column])
        except (ValueError, TypeError) as error:
            raise RowProblem(f"column '{column}' must be a list of whole numbers") from error
        if values.ndim != 1 or not (values.size == 0 or np.issubdtype(values.dtype, np.integer)):
            raise RowProblem(f"column '{column}' must be a list of whole numbers")
        arrays.append(values.astype(np.int64))
    return Document(arrays[0], arrays[1])


def _nothing_left(name: str, count: int, max_length: int) -> DataError:
    if count == 0:
        return DataError(f"{name}: has no rows", "is this the right dataset?")
    return DataError(
        f"{name}: all {count} rows are over max_seq_length {max_length}", "raise fast_model_args.max_seq_length"
    )
