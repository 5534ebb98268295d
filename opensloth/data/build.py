"""Build a cache entry from a config, or find the one that is there."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensloth import __version__
from opensloth.data import cache
from opensloth.data.built import BuiltData
from opensloth.data.documents import Document
from opensloth.data.epoch import count_epoch
from opensloth.data.existing import open_existing
from opensloth.data.file_errors import file_errors
from opensloth.data.lock import BuildLock, LockObserver, describe_holder
from opensloth.data.losses import Report, check_totals, warn_of_losses
from opensloth.data.prepare import SourcePreparation, Target
from opensloth.data.prepared import EVAL_DIR, TRAIN_DIR, PreparedDataset
from opensloth.data.sources import Source, open_source
from opensloth.data.storage import DocumentWriter
from opensloth.errors import DataError
from opensloth.opensloth_config import DatasetArgs
from opensloth.run_config import RunConfig
from opensloth.tokenizer import load_tokenizer, read_template, tokenizer_sha256

PREPARATION_VERSION = 3
"""Raised whenever the same rows would give other documents: entries of before are not used any more."""

WAIT_SECONDS = 0.5
PROGRESS_SECONDS = 0.5
_KEYED_ARGS = ("format", "columns", "train_on", "overlength", "bad_rows", "num_samples", "weight", "eval_fraction")


@dataclass(frozen=True)
class _Part:
    """A source with its options, for training or for evaluation."""

    args: DatasetArgs
    source: Source
    evaluation: bool


def build(config: RunConfig, report: Report) -> BuiltData:
    """Prepare the datasets of `config`, or reuse what is there.

    Raises DataError when rows, tokenizer or template do not fit, or a file cannot be read or written.
    """
    folder = Path(config.opensloth.data_cache_path)
    with file_errors(folder):
        if config.dataset is not None:
            return _find_or_build(config, config.dataset, folder, report)
        return open_existing(config, report)


def _find_or_build(config: RunConfig, datasets: list[DatasetArgs], folder: Path, report: Report) -> BuiltData:
    _refuse_prepared_folder(folder)
    parts = _open_parts(datasets)
    key = _key(config, parts)
    entry = folder / key
    footer, reused = _whole(entry), True
    if footer is None:
        footer, reused = _build_once(config, parts, entry, report)
    if reused:
        report("note", level="info", message=f"dataset found in the cache: {entry}")
    cache.note_use(entry)
    return _built(config, entry, footer, reused)


def _open_parts(datasets: list[DatasetArgs]) -> list[_Part]:
    parts = []
    for args in datasets:
        parts.append(_Part(args, open_source(args), evaluation=False))
        if args.eval_path:
            whole = args.model_copy(update={"num_samples": -1})  # the limit is for training
            parts.append(_Part(whole, open_source(args, evaluation=True), evaluation=True))
    return parts


def _key(config: RunConfig, parts: list[_Part]) -> str:
    model = config.opensloth.fast_model_args
    return cache.key_of(
        {
            "preparation_version": PREPARATION_VERSION,
            "tokenizer": tokenizer_sha256(model.model_name, model.revision),
            "max_seq_length": model.max_seq_length,
            "sources": [
                {
                    "data": part.source.fingerprint(),
                    "evaluation": part.evaluation,
                    "template": _template_sha256(part.args.chat_template),
                    **{name: getattr(part.args, name) for name in _KEYED_ARGS},
                }
                for part in parts
            ],
        }
    )


def _template_sha256(option: str | None) -> str | None:
    if option is None:
        return None
    text = read_template(Path(option)) if option.endswith(".jinja") else option
    return hashlib.sha256(text.encode()).hexdigest()


def _build_once(config: RunConfig, parts: list[_Part], entry: Path, report: Report) -> tuple[dict[str, Any], bool]:
    """The footer of the entry, and whether another process built it while this one waited."""
    lock_path = entry.with_name(f"{entry.name}.lock")
    observer = LockObserver(lock_path)
    waited = False
    while True:
        lock = BuildLock(lock_path)
        if _try_lock(lock, entry):
            with lock:
                footer = _whole(entry)
                if footer is not None:
                    return footer, True
                return _build_locked(config, parts, entry, lock, report), False
        progress = observer.look()
        footer = _whole(entry)
        if footer is not None:
            return footer, True
        if progress is not None:
            if not waited:
                message = f"waiting for {describe_holder(lock_path)}, which prepares the same dataset"
                report("note", level="info", message=message)
                waited = True
            report("progress", phase="wait", done=progress.done, total=progress.total, unit="rows")
            time.sleep(WAIT_SECONDS)


def _whole(entry: Path) -> dict[str, Any] | None:
    """The footer of an entry that can be read; files of the right sizes may still be torn inside."""
    footer = cache.read_entry(entry)
    if footer is not None:
        try:
            PreparedDataset.open(entry)
        except DataError:
            return None
    return footer


def _try_lock(lock: BuildLock, entry: Path) -> bool:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        return lock.try_acquire()
    except OSError as error:
        raise DataError(
            f"{entry.parent}: the dataset is not in this cache, and it cannot be written: {error.strerror}",
            "prepare it where the cache is writable: oslo data build",
        ) from error


def _build_locked(
    config: RunConfig, parts: list[_Part], entry: Path, lock: BuildLock, report: Report
) -> dict[str, Any]:
    cache.remove_leftovers(entry.parent, entry.name, keep=lock.token)
    cache.remove_folder(entry)  # a torn one
    aside = entry.with_name(f".{entry.name}.{lock.token}.building")
    try:
        written = _write(config, parts, aside, entry.name, lock, report)
        return cache.finish_entry(aside, entry, written)
    except BaseException:
        cache.remove_folder(aside)
        raise


def _write(
    config: RunConfig, parts: list[_Part], aside: Path, key: str, lock: BuildLock, report: Report
) -> dict[str, Any]:
    """Write the documents of all parts; returns the footer's own fields."""
    _use_threads(config.training.dataset_num_proc)
    gc.freeze()  # the imported libraries' many objects need not be searched again and again
    model = config.opensloth.fast_model_args
    tokenizer = load_tokenizer(model.model_name, revision=model.revision)
    target = Target.of(tokenizer, model.model_name, model.max_seq_length)
    has_eval = any(part.evaluation or part.args.eval_fraction for part in parts)
    counts = [part.source.count() if part.args.num_samples < 0 else part.args.num_samples for part in parts]
    lock.progress.total = sum(count or 0 for count in counts) if all(counts) else None
    progress = _Progress(lock, report)
    sources, number = [], -1
    with ExitStack() as stack:
        train = stack.enter_context(DocumentWriter(aside / TRAIN_DIR, key))
        evaluation = stack.enter_context(DocumentWriter(aside / EVAL_DIR, key)) if has_eval else None
        for part in parts:
            number += not part.evaluation
            sources.append(_write_part(part, number, target, train, evaluation, progress, report))
    progress.say()
    eval_documents = evaluation.documents if evaluation else 0
    check_totals(train.documents, eval_documents, has_eval, sources, report)
    return {
        "key": key,
        "name": config.name,
        "created": time.time(),
        "preparation_version": PREPARATION_VERSION,
        "tokenizer": model.model_name,
        "max_seq_length": model.max_seq_length,
        "counts": {
            "documents": train.documents,
            "tokens": train.tokens,
            "target_tokens": train.target_tokens,
            "eval_documents": eval_documents,
            "eval_target_tokens": evaluation.target_tokens if evaluation else 0,
        },
        "sources": [source for source in sources if not source["evaluation"]],
        "eval_sources": [source for source in sources if source["evaluation"]],
        "versions": _versions(),
    }


def _write_part(
    part: _Part,
    number: int,
    target: Target,
    train: DocumentWriter,
    evaluation: DocumentWriter | None,
    progress: _Progress,
    report: Report,
) -> dict[str, Any]:
    def note(level: str, message: str) -> None:
        report("note", level=level, message=message)

    if part.source.note:
        note("info", part.source.note)
    work = SourcePreparation(part.args, part.source, target, note)
    into_eval = 0
    for kept in work.documents():
        to_eval = part.evaluation or is_evaluated(kept.document, part.args.eval_fraction)
        if to_eval and evaluation is not None:
            evaluation.add(kept.document, kept.targets, number)
            into_eval += 1
        else:
            train.add(kept.document, kept.targets, number)
        progress.at(work.counts.read)
    progress.next_part(work.counts.read)
    warn_of_losses(part.source.name, work.counts, target.max_length, report)
    return {
        "path": part.source.name,
        "format": work.format,
        "weight": part.args.weight,
        "evaluation": part.evaluation,
        "eval_documents": into_eval,
        **asdict(work.counts),
    }


def is_evaluated(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the evaluation split: by its content, so that equal ones stay together."""
    if not fraction:
        return False
    digest = hashlib.blake2b(document.ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class _Progress:
    """Reports rows done over all parts, not more than twice a second."""

    def __init__(self, lock: BuildLock, report: Report) -> None:
        self._state, self._report = lock.progress, report
        self._before = 0
        self._said_at = 0.0
        self._said: tuple[int, int | None] | None = None

    def at(self, rows: int) -> None:
        self._state.done = self._before + rows
        if time.monotonic() - self._said_at >= PROGRESS_SECONDS:
            self.say()

    def next_part(self, rows: int) -> None:
        self._before += rows
        self._state.done = self._before

    def say(self) -> None:
        """Report, unless these very numbers were the last that were reported."""
        self._said_at = time.monotonic()
        done, total = self._state.done, self._state.total
        if total is not None:
            total = max(total, done)
        if (done, total) != self._said:
            self._said = done, total
            self._report("progress", phase="tokenise", done=done, total=total, unit="rows")


def _built(config: RunConfig, entry: Path, footer: Mapping[str, Any], reused: bool) -> BuiltData:
    counts = footer["counts"]
    return BuiltData(
        path=str(entry),
        key=entry.name,
        reused=reused,
        **asdict(count_epoch(PreparedDataset.open(entry), config)),
        eval_documents=counts["eval_documents"],
        eval_target_tokens=counts["eval_target_tokens"],
        sources=[*footer["sources"], *footer["eval_sources"]],
    )


def _refuse_prepared_folder(folder: Path) -> None:
    if folder.is_file():
        raise DataError(f"{folder}: opensloth.data_cache_path is a file, expected a folder")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise DataError(
            f"{folder}: opensloth.data_cache_path is a prepared dataset, and there is a dataset section as well",
            "drop the dataset section to train on it, or name another folder for the cache",
        )


def _use_threads(count: int | None) -> None:
    """Let the tokenizer use `count` threads (None: all cores); read when it encodes its first batch."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if count:
        os.environ["RAYON_NUM_THREADS"] = str(count)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    others = {name: version(name) for name in ("transformers", "tokenizers", "pyarrow")}
    return {"opensloth": __version__, **others}
