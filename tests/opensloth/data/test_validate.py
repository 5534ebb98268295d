"""Rows that somebody hands to the trainer: fit, or refused by row and column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opensloth.data.validate import validate_rows
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
