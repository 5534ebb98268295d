"""What was dropped or cut on the way from rows to documents, said aloud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from opensloth.data.prepare import SourceCounts
from opensloth.errors import DataError


class Report(Protocol):
    """Takes events as `opensloth.events.Events.emit` does: note, progress."""

    def __call__(self, event: str, /, **fields: Any) -> None: ...


def losses(counts: SourceCounts | Mapping[str, int]) -> dict[str, int]:
    """Rows that did not become documents, by reason, the largest first."""
    values = asdict(counts) if isinstance(counts, SourceCounts) else counts
    reasons = {
        "over max_seq_length": values["dropped_overlength"],
        "unreadable": values["bad"],
        "without targets": values["no_targets"],
        "of one token": values["too_short"],
    }
    return {reason: count for reason, count in sorted(reasons.items(), key=lambda item: -item[1]) if count}


def warn_of_losses(name: str, counts: SourceCounts, max_length: int, report: Report) -> None:
    lost = losses(counts)
    if lost:
        listed = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        much = counts.kept * 2 < counts.read
        head = "MORE THAN HALF of the rows were dropped" if much else "rows dropped"
        message = f"{name}: {head}: {sum(lost.values())} of {counts.read} ({listed})"
        report("note", level="warning", message=message)
    if counts.truncated:
        message = (
            f"{name}: {counts.truncated} rows truncated to {max_length} tokens, {counts.truncated_tokens} tokens lost"
        )
        report("note", level="warning", message=message)


_ADVICE = {
    "over max_seq_length": "raise opensloth.fast_model_args.max_seq_length, or set dataset.overlength: truncate",
    "unreadable": "look at the rows shown above, or set dataset.format and dataset.columns",
    "without targets": "check dataset.train_on and the roles: there must be assistant messages; see oslo data preview",
    "of one token": "is this the right column? see oslo data preview",
}


def check_totals(
    documents: int, eval_documents: int, has_eval: bool, sources: list[dict[str, Any]], report: Report
) -> None:
    if documents == 0:
        if eval_documents and not any(losses(source) for source in sources):
            raise DataError("all rows went into the evaluation split", "make dataset.eval_fraction smaller")
        total: dict[str, int] = {}
        for source in sources:
            for reason, count in losses(source).items():
                total[reason] = total.get(reason, 0) + count
        listed = ", ".join(f"{count} {reason}" for reason, count in total.items())
        raise DataError(f"no rows are left to train on: {listed}", _ADVICE[max(total, key=lambda r: total[r])])
    if has_eval and eval_documents == 0:
        report("note", level="warning", message="the evaluation split is empty: make dataset.eval_fraction larger")
