"""One source's rows, turned into documents: parse, render, tokenise, apply the length policy, count everything."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from opensloth.data.documents import Document
from opensloth.data.encode import Encoder, Rendered
from opensloth.data.examples import Chat, Segments, Tokens
from opensloth.data.formats import Parser, parser_for
from opensloth.data.rows import Row, RowProblem
from opensloth.data.sources import Source
from opensloth.data.template import ChatTemplate
from opensloth.data.turns import Turns
from opensloth.data.validate import check_document
from opensloth.errors import DataError
from opensloth.opensloth_config import DatasetArgs
from opensloth.tokenizer import own_template, resolve_chat_template, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Notes = Callable[[str, str], None]
"""(level, message): says something to the user; level is info or warning."""

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 20
"""A batch ends with the row that reaches this: an encoding takes a hundred times the memory of its text."""

BATCHES_AHEAD = 3
"""Batches that are being tokenised, or wait for it, while another is rendered."""

CHARACTERS_PER_TOKEN = 64
"""No text comes to more on average, but for white space. What is longer than max_seq_length such tokens is over it."""

DETECTION_ROWS = 64
DETECTION_CHARACTERS = 1 << 24
"""The rows that the format is told from end with the one that reaches this: they are in memory together."""

SHOWN_BAD_ROWS = 5
_MAY_BE_UNSEEN = ("reasoning_content", "tool_calls")


@dataclass
class SourceCounts:
    """What became of the rows of one source. read = kept + bad + dropped_* + no_targets + too_short."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    dropped_overlength: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    no_targets: int = 0
    too_short: int = 0
    """Documents of one token: nothing comes before it, so nothing can be predicted."""
    tokens: int = 0
    target_tokens: int = 0


@dataclass(frozen=True)
class Kept:
    """A document that will be trained, and the row it came from."""

    row: Row
    document: Document
    targets: int


@dataclass(frozen=True)
class Target:
    """What documents are prepared for: a model's tokenizer and its limits."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    vocabulary: int
    max_length: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model_name: str, max_length: int) -> Target:
        """Raises DataError when the tokenizer makes ids that the model has no row for."""
        vocabulary = vocabulary_size(tokenizer, model_name)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= vocabulary:
            raise DataError(
                f"'{model_name}': its tokenizer makes ids up to {largest}, its config.json knows {vocabulary} ids",
                "tokens were added without resizing the model's embeddings: save both together",
            )
        return cls(tokenizer, Encoder(tokenizer), vocabulary, max_length)


@dataclass
class SourcePreparation:
    """Prepares one source. Iterate `documents()` once; `counts` and `format` are filled on the way."""

    args: DatasetArgs
    source: Source
    target: Target
    note: Notes
    counts: SourceCounts = field(default_factory=SourceCounts)
    format: str = ""
    _noted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        tokenizer = self.target.tokenizer
        text = self.args.chat_template
        template = resolve_chat_template(text, tokenizer) if text else own_template(tokenizer)
        self.template = ChatTemplate(tokenizer, template) if template else None
        self._turns = Turns(self.template, self.args.train_on) if self.template else None

    def documents(self) -> Iterator[Kept]:
        """Documents in the order of the rows.

        Raises DataError: at a bad row unless they are skipped, at an overlong one if the config says so.
        """
        rows = self._limited_rows()
        first = _first_of(rows)
        if not first:
            raise DataError(f"{self.source.name}: no rows in it", "is this the right file?")
        parser = self._parser(first)
        # Batches are tokenised in their order by another thread, which needs no Python, while this one renders.
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: deque[_Batch] = deque()
            for batch in self._rendered_batches(itertools.chain(first, rows), parser):
                texts = [item for _, item in batch if isinstance(item, Rendered)]
                waiting.append(_Batch(batch, texts, pool.submit(self.target.encoder.tokenise, texts)))
                if len(waiting) > BATCHES_AHEAD:
                    yield from self._finish_batch(waiting.popleft())
            while waiting:
                yield from self._finish_batch(waiting.popleft())

    def _limited_rows(self) -> Iterator[Row]:
        rows = self.source.rows()
        return itertools.islice(rows, self.args.num_samples) if self.args.num_samples > 0 else rows

    def _parser(self, first: list[Row]) -> Parser:
        readable = [row for row in first if row.values is not None]
        if not readable:
            raise DataError(f"{first[0].where}: {first[0].problem}", f"none of the first {len(first)} rows is readable")
        parser = parser_for(
            readable,
            name=self.source.name,
            wanted=self.args.format,
            columns=self.args.columns,
            has_template=self.template is not None,
        )
        self.format = parser.format.name
        how = "detected from the columns" if self.args.format == "auto" else "as given"
        self.note("info", f"{self.source.name}: format {self.format} ({how})")
        return parser

    def _rendered_batches(self, rows: Iterator[Row], parser: Parser) -> Iterator[list[tuple[Row, Rendered | Tokens]]]:
        batch: list[tuple[Row, Rendered | Tokens]] = []
        characters = 0
        for row in rows:
            self.counts.read += 1
            try:
                if row.values is None:
                    raise RowProblem(row.problem)
                item = self._in_reach(row, self._render(parser, row))
            except RowProblem as problem:
                self._bad(row, problem)
                continue
            if item is None:
                continue
            batch.append((row, item))
            characters += len(item.text) if isinstance(item, Rendered) else len(item.ids)
            if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _render(self, parser: Parser, row: Row) -> Rendered | Tokens:
        assert row.values is not None
        example = parser.parse(row.values)
        if isinstance(example, Tokens):
            return example
        if isinstance(example, Segments):
            chosen = example.all_targets() if self.args.train_on == "all" else example
            return self.target.encoder.of_segments(chosen)
        return self._render_chat(example)

    def _render_chat(self, chat: Chat) -> Rendered:
        assert self._turns is not None
        assert self.template is not None  # the parser made sure
        self._note_unseen(chat, self.template)
        text, spans = self._turns.render(chat)
        # A template that ends no turn leaves the end of the answer to the end-of-sequence token.
        ends_open = self.template.stop is None and bool(spans) and spans[-1][1] >= len(text.rstrip())
        return Rendered(text, spans, eos=ends_open)

    def _note_unseen(self, chat: Chat, template: ChatTemplate) -> None:
        """Say once what rows have and the template does not look at."""
        present = {key for message in chat.messages for key in message if key in _MAY_BE_UNSEEN}
        if chat.tools:
            present.add("tools")
        for key in sorted(present - self._noted):
            self._noted.add(key)
            if not template.looks_at(key):
                self.note("warning", f"{self.source.name}: the chat template does not show '{key}': it is lost")

    def _finish_batch(self, batch: _Batch) -> Iterator[Kept]:
        documents = iter(self.target.encoder.documents(batch.texts, batch.encodings.result()))
        for row, item in batch.rows:
            found = self._checked(item) if isinstance(item, Tokens) else next(documents)
            if isinstance(found, RowProblem):
                self._bad(row, found)
            elif kept := self._fitted(row, found):
                yield kept

    def _in_reach(self, row: Row, item: Rendered | Tokens) -> Rendered | Tokens | None:
        """The item, less what no token within max_seq_length can hold: a text's tokens take a hundred times its memory.

        None when the config drops it. Of a text that is cut here, `truncated_tokens` counts what is left.
        """
        reach = self.target.max_length * CHARACTERS_PER_TOKEN
        if isinstance(item, Tokens) or len(item.text) <= reach:
            return item
        if not self._may_truncate(row, f"{len(item.text)} characters"):
            return None
        spans = [(begin, min(end, reach)) for begin, end in item.spans if begin < reach]
        return Rendered(item.text[:reach], spans, bos=item.bos)

    def _may_truncate(self, row: Row, length: str) -> bool:
        """What becomes of a row over max_seq_length: true to truncate it; false when it is dropped, and counted."""
        if self.args.overlength == "error":
            raise DataError(
                f"{row.where}: {length}, over max_seq_length {self.target.max_length}",
                "raise opensloth.fast_model_args.max_seq_length, or set dataset.overlength to drop or truncate",
            )
        if self.args.overlength == "drop":
            self.counts.dropped_overlength += 1
            return False
        return True

    def _fitted(self, row: Row, document: Document) -> Kept | None:
        """The document under the length policy; None when nothing is left of it to learn."""
        limit, length = self.target.max_length, len(document.ids)
        if length > limit:
            if not self._may_truncate(row, f"{length} tokens"):
                return None
            self.counts.truncated += 1
            self.counts.truncated_tokens += length - limit
            document = Document(document.ids[:limit], document.labels[:limit])
        if len(document.ids) < 2:
            self.counts.too_short += 1
            return None
        targets = document.targets
        if not targets:
            self.counts.no_targets += 1
            return None
        self.counts.kept += 1
        self.counts.tokens += len(document.ids)
        self.counts.target_tokens += targets
        return Kept(row, document, targets)

    def _checked(self, tokens: Tokens) -> Document | RowProblem:
        """A row that came tokenised; what our own tokenizer makes needs no check."""
        try:
            wide = Document(np.array(tokens.ids, dtype=np.int64), np.array(tokens.labels, dtype=np.int64))
        except OverflowError:
            return RowProblem("'input_ids' or 'labels' has a number of more than 64 bits")
        problem = check_document(wide, self.target.vocabulary)
        return problem or Document(wide.ids.astype(np.int32), wide.labels.astype(np.int32))

    def _bad(self, row: Row, problem: RowProblem) -> None:
        if self.args.bad_rows == "error":
            raise DataError(f"{row.where}: {problem}", "mend the row, or set dataset.bad_rows: skip")
        self.counts.bad += 1
        if self.counts.bad <= SHOWN_BAD_ROWS:
            more = ", further ones are only counted" if self.counts.bad == SHOWN_BAD_ROWS else ""
            self.note("warning", f"skipped {row.where}: {problem}{more}")


@dataclass(frozen=True)
class _Batch:
    """Rows whose texts are being tokenised. texts: of those rows that are not tokenised already."""

    rows: list[tuple[Row, Rendered | Tokens]]
    texts: list[Rendered]
    encodings: Future[list[Any]]


def _first_of(rows: Iterator[Row]) -> list[Row]:
    first: list[Row] = []
    characters = 0
    for row in rows:
        first.append(row)
        characters += _characters_in(row.values)
        if len(first) == DETECTION_ROWS or characters >= DETECTION_CHARACTERS:
            break
    return first


def _characters_in(value: Any, levels: int = 8) -> int:
    """Of the texts in the first levels: a conversation has four."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict | list) and levels:
        return sum(_characters_in(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))
    return 0
