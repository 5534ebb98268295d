"""A prepared dataset that is trained as it is: no `dataset` section, `data_cache_path` is the data itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from opensloth.data import cache
from opensloth.data.documents import Document
from opensloth.data.epoch import count_epoch
from opensloth.data.prepared import EVAL_DIR, PreparedDataset
from opensloth.data.validate import check_fitness
from opensloth.errors import DataError
from opensloth.run_config import RunConfig
from opensloth.tokenizer import load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from opensloth.data.build import BuiltData
    from opensloth.data.losses import Report


def open_existing(config: RunConfig, report: Report) -> BuiltData:
    """Check every document and say what is there.

    Raises DataError, naming row and column, when a document is unfit.
    """
    from opensloth.data.build import BuiltData

    folder = Path(config.opensloth.data_cache_path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, and there is no dataset section",
            "add dataset: {path: ...}, or name a prepared dataset in opensloth.data_cache_path",
        )
    data = PreparedDataset.open(folder)
    footer = cache.read_entry(folder)
    if data.info and footer is None:
        raise DataError(f"{folder}: this prepared dataset is damaged", "prepare it again: oslo data build")
    read, limit = len(data), config.opensloth.fast_model_args.max_seq_length
    left_out = _check(data, config, folder, report)
    if left_out:
        message = f"{folder}: leaving out {left_out} of {read} rows over max_seq_length {limit}"
        report("note", level="warning", message=message)
        data = PreparedDataset.open(folder, max_length=limit)
    if len(data) == 0:
        hint = "raise opensloth.fast_model_args.max_seq_length" if read else "is this the right folder?"
        raise DataError(f"{folder}: no rows are left to train on, of {read}", hint)
    evaluation = PreparedDataset.open(folder, EVAL_DIR) if PreparedDataset.has_eval(folder) else None
    return BuiltData(
        path=str(folder),
        key=str(data.info.get("key", "")),
        reused=True,
        **asdict(count_epoch(data, config)),
        eval_documents=len(evaluation) if evaluation else 0,
        eval_target_tokens=int(evaluation.targets.sum()) if evaluation else 0,
        sources=[
            {"path": str(folder), "format": "prepared", "read": read, "kept": len(data), "dropped_overlength": left_out}
        ],
    )


def _check(data: PreparedDataset, config: RunConfig, folder: Path, report: Report) -> int:
    """How many documents are left out for their length."""
    model = config.opensloth.fast_model_args
    vocabulary = None
    try:
        tokenizer = load_tokenizer(model.model_name, revision=model.revision)
        vocabulary = vocabulary_size(tokenizer, model.model_name)
    except DataError as error:
        report("note", level="warning", message=f"ids are not checked against the vocabulary: {error.message}")
    drop = config.opensloth.filter_overlength_samples
    left_out = 0
    for index in range(len(data)):
        ids, labels = data.stored_row(index)
        where = f"{folder}: row {index}"
        left_out += check_fitness(Document(ids, labels), where, model.max_seq_length, vocabulary, drop)
    return left_out
