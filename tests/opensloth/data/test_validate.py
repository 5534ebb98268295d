"""Rows that somebody hands to the trainer: fit, or refused by row and column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensloth.data.documents import Document
from opensloth.data.validate import check_fitness, suspects, validate_rows
from opensloth.errors import DataError

GOOD = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


def check(rows: Any, **options: Any) -> Any:
    return validate_rows(rows, **{"max_length": 4, "vocabulary": 10, "drop_overlength": True} | options)


def test_fit_rows() -> None:
    from datasets import Dataset

    assert check([GOOD, GOOD]).fit == 2
    assert check([{key: np.array(value) for key, value in GOOD.items()}]).fit == 1
    assert check(Dataset.from_list([GOOD] * 3)).fit == 3


def test_overlong_rows_are_left_out_or_refused() -> None:
    long = {"input_ids": [1] * 5, "labels": [1] * 5}
    found = check([GOOD, long, GOOD])
    assert (found.fit, found.overlength) == (2, [1])
    with pytest.raises(DataError, match=r"train_dataset\[1\]: column 'input_ids' has 5 tokens, over max_seq_length 4"):
        check([GOOD, long], drop_overlength=False)
    with pytest.raises(DataError, match="all 1 rows are over max_seq_length 4"):
        check([long])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [1]}, "the column 'input_ids' is missing; columns found: labels"),
        ({"input_ids": [1], "text": "a"}, "the column 'labels' is missing; columns found: input_ids, text"),
        ({"input_ids": [1, 2], "labels": [1]}, "[1]: 'input_ids' has 2 items, 'labels' has 1: they must be equally"),
        ({"input_ids": [1, 10], "labels": [1, 2]}, "[1]: 'input_ids' has the id 10, outside the model's vocabulary of"),
        ({"input_ids": [-1, 1], "labels": [1, 2]}, "[1]: 'input_ids' has the id -1, outside"),
        ({"input_ids": [1, 1], "labels": [1, 10]}, "[1]: 'labels' has 10: expected an id of the vocabulary of 10"),
        ({"input_ids": [1, 1], "labels": [1, -5]}, "[1]: 'labels' has -5: expected"),
        ({"input_ids": [], "labels": []}, "[1]: 'input_ids' is empty"),
        ({"input_ids": [1, 1], "labels": [1, -100]}, "[1]: column 'labels' has no targets after the first token"),
        ({"input_ids": "ab", "labels": [1, 2]}, "[1]: column 'input_ids' must be a list of whole numbers"),
        ({"input_ids": [1.0, 2.0], "labels": [1, 2]}, "[1]: column 'input_ids' must be a list of whole numbers"),
        ({"input_ids": [[1], [2, 3]], "labels": [1, 2]}, "[1]: column 'input_ids' must be a list of whole numbers"),
    ],
)  # fmt: skip
def test_unfit_rows_are_named(row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        check([GOOD, row])
    assert message in str(caught.value)
    assert str(caught.value).startswith("train_dataset")


def test_no_rows() -> None:
    with pytest.raises(DataError, match="has no rows"):
        check([])


def test_an_unknown_vocabulary_is_not_checked() -> None:
    assert check([{"input_ids": [1, 10**6], "labels": [1, 10**6]}], vocabulary=None).fit == 1


TOKENS = st.tuples(st.sampled_from([0, 1, 5, 9, 9, 10, -1]), st.sampled_from([-100, 1, 5, 9, 9, 10, -1, -101]))
DOCUMENTS = st.tuples(st.lists(TOKENS, max_size=5), st.sampled_from([0, 0, 0, 1]))
"""Tokens with their labels, and how many labels are missing at the end."""


@settings(max_examples=200, deadline=None)
@given(st.lists(DOCUMENTS, max_size=8), st.sampled_from([10, 10, None]))
def test_a_batch_of_documents_is_judged_as_each_alone(
    documents: list[tuple[list[tuple[int, int]], int]], vocabulary: int | None
) -> None:
    pairs = [([i for i, _ in tokens], [j for _, j in tokens[missing:]]) for tokens, missing in documents]
    columns: list[Any] = []
    for side in zip(*pairs, strict=True) if pairs else ([], []):
        columns += [np.cumsum([0, *map(len, side)]), np.array([i for values in side for i in values], dtype=np.int64)]
    alone = []
    for i, pair in enumerate(pairs):
        document = Document(*(np.array(values, dtype=np.int64) for values in pair))
        try:
            if check_fitness(document, "", 4, vocabulary, drop_overlength=True):
                alone.append(i)
        except DataError:
            alone.append(i)
    assert suspects(tuple(columns), 4, vocabulary).tolist() == alone
