"""What training will see: rows as they are rendered, with the targets marked, and an audit of their ends."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opensloth.data.documents import IGNORE, Document
from opensloth.data.prepare import Kept, SourcePreparation, Target
from opensloth.data.sources import open_source
from opensloth.errors import DataError
from opensloth.opensloth_config import DatasetArgs
from opensloth.run_config import RunConfig
from opensloth.tokenizer import load_tokenizer

SCANNED_ROWS = 1000
"""Rows of each source that the counts and the samples are taken from."""

_GREEN, _DIM, _RED, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[31m", "\x1b[0m"
_OPEN, _CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Piece:
    """A stretch of consecutive tokens that are all targets, or none."""

    text: str
    target: bool


@dataclass(frozen=True)
class Sample:
    where: str
    tokens: int
    target_tokens: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Check:
    """One line of the audit. ok None: there is nothing to check."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class SourcePreview:
    """One source. counts: of the first rows, up to SCANNED_ROWS."""

    path: str
    format: str
    notes: list[str]
    counts: dict[str, int]
    samples: list[Sample]
    audit: list[Check]


@dataclass(frozen=True)
class Preview:
    sources: list[SourcePreview]


def preview(config: RunConfig, rows: int) -> Preview:
    """Look at the datasets of `config` without building anything.

    rows: how many documents to show from the start of each source; as many are taken from the rest.
    Raises DataError as a build would.
    """
    if config.dataset is None:
        raise DataError(
            "there is no dataset section: a prepared dataset has no rows to render",
            "oslo data preview shows how a dataset section is read",
        )
    model = config.opensloth.fast_model_args
    tokenizer = load_tokenizer(model.model_name, revision=model.revision)
    target = Target.of(tokenizer, model.model_name, model.max_seq_length)
    return Preview([_preview_source(args, target, rows) for args in config.dataset])


def _preview_source(args: DatasetArgs, target: Target, rows: int) -> SourcePreview:
    scanned = SCANNED_ROWS if args.num_samples < 0 else min(SCANNED_ROWS, args.num_samples)
    notes: list[str] = []
    limited = args.model_copy(update={"num_samples": scanned})
    work = SourcePreparation(limited, open_source(args), target, lambda level, message: notes.append(message))
    kept = list(work.documents())
    shown = [*kept[:rows], *_spread(kept[rows:], rows)]
    return SourcePreview(
        path=args.path,
        format=work.format,
        notes=notes,
        counts=asdict(work.counts),
        samples=[_sample(item, target.tokenizer) for item in shown],
        audit=audit(work, [item.document for item in kept]),
    )


def _spread(kept: Sequence[Kept], count: int) -> Sequence[Kept]:
    """`count` items at equal distances."""
    return kept[:: max(1, len(kept) // count)][:count] if kept and count else []


def _sample(item: Kept, tokenizer: Any) -> Sample:
    pieces = [Piece(tokenizer.decode(ids, skip_special_tokens=False), target) for ids, target in _runs(item.document)]
    return Sample(item.row.where, len(item.document.ids), item.document.targets, pieces)


def _runs(document: Document) -> Iterator[tuple[list[int], bool]]:
    pairs = zip(document.ids.tolist(), (document.labels != IGNORE).tolist(), strict=True)
    for target, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        yield [token for token, _ in run], target


def audit(work: SourcePreparation, documents: Sequence[Document]) -> list[Check]:
    """Check ends and beginnings of all documents: stop token, BOS, EOS, padding."""
    if not documents:
        return [Check("targets", False, "no document is left of these rows")]
    return [_stop_check(work, documents), *_bos_checks(work, documents), _pad_check(work, documents)]


def _stop_check(work: SourcePreparation, documents: Sequence[Document]) -> Check:
    """Whether the last thing a document teaches is to stop."""
    tokenizer: Any = work.target.tokenizer
    last = Counter(int(document.labels[document.labels != IGNORE][-1]) for document in documents)
    stop = work.template.stop if work.template and work.format not in ("text", "input_output", "tokenized") else None
    expected = tokenizer.encode(stop, add_special_tokens=False)[-1] if stop else tokenizer.eos_token_id
    hits, name = last.get(expected, 0), stop or tokenizer.eos_token
    if stop and work.template and not work.template.stop_is_special:
        return Check("stop token", False, f"the template ends turns with {stop!r}, which is not one special token")
    detail = f"{hits} of {len(documents)} documents end their last target with {name}"
    return Check("stop token", hits == len(documents), detail)


def _bos_checks(work: SourcePreparation, documents: Sequence[Document]) -> list[Check]:
    bos = work.target.tokenizer.bos_token_id
    if bos is None:
        return [Check("BOS", None, "the tokenizer has no BOS token")]
    starts = sum(int(document.ids[0]) == bos for document in documents)
    double = sum(document.ids[:2].tolist() == [bos, bos] for document in documents)
    name = work.target.tokenizer.bos_token
    return [
        Check("one BOS at most", double == 0, f"{double} of {len(documents)} documents begin with two {name}"),
        Check("BOS", None, f"{starts} of {len(documents)} documents begin with {name}"),
    ]


def _pad_check(work: SourcePreparation, documents: Sequence[Document]) -> Check:
    """Padding never enters the loss: lengths say what is padding, not ids, so pad == EOS does no harm."""
    pad, eos = work.target.tokenizer.pad_token_id, work.target.tokenizer.eos_token_id
    same = "the same token as EOS, which stays a target" if pad is not None and pad == eos else "not used by documents"
    ends = sum(int(document.ids[-1]) == pad for document in documents) if pad is not None and pad != eos else 0
    return Check("padding", ends == 0, f"{ends} documents end with the padding token" if ends else f"padding is {same}")


def as_text(seen: Preview, *, color: bool) -> str:
    """For people. Targets are green, or stand between ⟦ and ⟧ without colour."""
    return "\n".join(line for source in seen.sources for line in _source_lines(source, color)) + "\n"


def _source_lines(source: SourcePreview, color: bool) -> Iterator[str]:
    yield from source.notes
    for sample in source.samples:
        yield ""
        yield _dim(f"--- {sample.where}: {sample.tokens} tokens, {sample.target_tokens} targets", color)
        yield "".join(_marked(piece, color) for piece in sample.pieces)
    yield ""
    counts = source.counts
    yield f"of the first {counts['read']} rows: {counts['kept']} kept, " + _losses(counts)
    share = counts["target_tokens"] / counts["tokens"] if counts["tokens"] else 0.0
    yield f"{counts['tokens']} tokens, {counts['target_tokens']} targets ({share:.0%})"
    for check in source.audit:
        yield f"{_verdict(check.ok, color)} {check.name}: {check.detail}"


def _losses(counts: dict[str, int]) -> str:
    names = {
        "bad": "unreadable",
        "dropped_overlength": "dropped for length",
        "truncated": "truncated",
        "no_targets": "without targets",
        "too_short": "of one token",
    }
    return ", ".join(f"{counts[key]} {name}" for key, name in names.items())


def _marked(piece: Piece, color: bool) -> str:
    if color:
        return f"{_GREEN}{piece.text}{_RESET}" if piece.target else f"{_DIM}{piece.text}{_RESET}"
    return f"{_OPEN}{piece.text}{_CLOSE}" if piece.target else piece.text


def _dim(text: str, color: bool) -> str:
    return f"{_DIM}{text}{_RESET}" if color else text


def _verdict(ok: bool | None, color: bool) -> str:
    word, shade = {True: ("pass", _GREEN), False: ("FAIL", _RED), None: ("info", _DIM)}[ok]
    return f"{shade}{word}{_RESET}" if color else word
