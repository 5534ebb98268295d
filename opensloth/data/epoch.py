"""One epoch of prepared documents, counted: what the datasets' weights make of them, and the rows they fill."""

from __future__ import annotations

from dataclasses import dataclass

from opensloth.data.pack import best_fit_decreasing
from opensloth.data.prepared import PreparedDataset
from opensloth.errors import DataError
from opensloth.run_config import RunConfig


@dataclass(frozen=True)
class EpochCounts:
    """A document that is seen twice counts twice. row_fill: tokens / (rows * max_seq_length), 0 to 1."""

    documents: int
    tokens: int
    target_tokens: int
    rows: int
    row_fill: float


def count_epoch(data: PreparedDataset, config: RunConfig) -> EpochCounts:
    """Raises DataError when the weights leave out every document."""
    members = data.epoch_documents()
    if not len(members):
        raise DataError(
            f"no rows are left to train on: the datasets' weights leave out all {len(data)} documents",
            "raise dataset.weight: below 1 it is the share of the documents that an epoch has, rounded down",
        )
    capacity = config.opensloth.fast_model_args.max_seq_length
    lengths = data.lengths[members]
    rows = len(best_fit_decreasing(lengths, capacity)) if config.opensloth.sequence_packing else len(members)
    tokens = int(lengths.sum())
    return EpochCounts(len(members), tokens, int(data.targets[members].sum()), rows, tokens / (rows * capacity))
