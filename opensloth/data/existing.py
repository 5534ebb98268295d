"""A prepared dataset that is trained as it is: no `dataset` section, `data_cache_path` is the data itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth.data import cache
from opensloth.data.built import BuiltData
from opensloth.data.documents import Document
from opensloth.data.epoch import count_epoch
from opensloth.data.prepared import EVAL_DIR, TRAIN_DIR, PreparedDataset, part_folder, splits_of
from opensloth.data.validate import check_fitness, suspects
from opensloth.errors import DataError
from opensloth.run_config import RunConfig
from opensloth.tokenizer import load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from opensloth.data.losses import Report


@dataclass(frozen=True)
class _Part:
    """The documents of one part that are fit. read: how many there were, left_out: those over max_seq_length."""

    folder: Path
    data: PreparedDataset
    read: int
    left_out: int

    def as_source(self, *, evaluation: bool) -> dict[str, Any]:
        return {
            "path": str(self.folder),
            "format": "prepared",
            "evaluation": evaluation,
            "read": self.read,
            "kept": len(self.data),
            "dropped_overlength": self.left_out,
        }


def open_existing(config: RunConfig, report: Report) -> BuiltData:
    """Check every document, also those of the evaluation part, and say what is there.

    Raises DataError, naming row and column, when a document is unfit.
    """
    folder = Path(config.opensloth.data_cache_path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, and there is no dataset section",
            "add dataset: {path: ...}, or name a prepared dataset in opensloth.data_cache_path",
        )
    info = PreparedDataset.open(folder).info
    if info and cache.read_entry(folder) is None:
        raise DataError(f"{folder}: this prepared dataset is damaged", "prepare it again: oslo data build")
    _say_splits(folder, report)
    vocabulary = _vocabulary(config, report)
    train = _checked(folder, TRAIN_DIR, config, vocabulary, report)
    evaluation = None
    if PreparedDataset.has_eval(folder):
        evaluation = _checked(folder, EVAL_DIR, config, vocabulary, report)
    epoch = count_epoch(train.data, config)
    entry = folder.resolve()
    if entry.name == info.get("key"):  # in a cache; a copy of an entry has a name of its own
        cache.note_use(entry)
    return BuiltData(
        path=str(folder),
        key=str(info.get("key", "")),
        reused=True,
        **asdict(epoch),
        eval_documents=len(evaluation.data) if evaluation else 0,
        eval_target_tokens=int(evaluation.data.targets.sum()) if evaluation else 0,
        sources=[part.as_source(evaluation=part is evaluation) for part in (train, evaluation) if part is not None],
    )


def _say_splits(folder: Path, report: Report) -> None:
    """Of a folder of splits: which are used for what, and which are not."""
    found = splits_of(folder)
    if len(found) < 2:
        return
    train, evaluation = (part_folder(folder, part) for part in (TRAIN_DIR, EVAL_DIR))
    use = [f"'{train.name}' is trained"] if train else []
    use.append(f"'{evaluation.name}' is evaluated" if evaluation else "none is evaluated")
    ignored = [f"'{name}'" for name in found if folder / name not in (train, evaluation)]
    if ignored:
        use.append(f"{', '.join(ignored)} not used")
    report("note", level="info", message=f"{folder}: of its splits, {', '.join(use)}")


def _vocabulary(config: RunConfig, report: Report) -> int | None:
    model = config.opensloth.fast_model_args
    try:
        tokenizer = load_tokenizer(model.model_name, revision=model.revision)
        return vocabulary_size(tokenizer, model.model_name)
    except DataError as error:
        report("note", level="warning", message=f"ids are not checked against the vocabulary: {error.message}")
        return None


def _checked(folder: Path, part: str, config: RunConfig, vocabulary: int | None, report: Report) -> _Part:
    """The documents of a part, without those over max_seq_length where the config drops them.

    Raises DataError when one is unfit, or none is left.
    """
    limit, drop = config.opensloth.fast_model_args.max_seq_length, config.opensloth.filter_overlength_samples
    data, place = PreparedDataset.open(folder, part), part_folder(folder, part) or folder
    read, left_out, first = len(data), 0, 0
    for columns in data.batch_columns():
        for index in (first + suspects(columns, limit, vocabulary)).tolist():
            document = Document(*data.stored_row(index))
            left_out += check_fitness(document, f"{place}: row {index}", limit, vocabulary, drop)
        first += len(columns[0]) - 1
    if left_out == read:
        purpose = "train on" if part == TRAIN_DIR else "evaluate on"
        hint = "raise opensloth.fast_model_args.max_seq_length" if read else "is this the right folder?"
        raise DataError(f"{place}: no rows are left to {purpose}, of {read}", hint)
    if left_out:
        message = f"{place}: leaving out {left_out} of {read} rows over max_seq_length {limit}"
        report("note", level="warning", message=message)
        data = PreparedDataset.open(folder, part, max_length=limit)
    return _Part(place, data, read, left_out)
