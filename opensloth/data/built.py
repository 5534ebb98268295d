"""Prepared data, as training and the plan see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BuiltData:
    """What training and the plan need to know of prepared data.

    documents to row_fill: of one epoch, after the datasets' weights (see EpochCounts); rows are packed if the
        config says so.
    sources: what became of the rows of each file or name, before weights.
    """

    path: str
    key: str
    reused: bool
    documents: int
    tokens: int
    target_tokens: int
    rows: int
    row_fill: float
    eval_documents: int
    eval_target_tokens: int
    sources: list[dict[str, Any]]
