"""From rendered text and target spans to ids and labels: one tokenisation of the whole text, by offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from opensloth.data.documents import IGNORE, Document, Int32Array
from opensloth.data.examples import Segments
from opensloth.data.rows import RowProblem
from opensloth.data.template import Span
from opensloth.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text to tokenise.

    spans: target stretches of the text, ordered, apart from one another.
    bos: put what the tokenizer puts before plain text. eos: append the end-of-sequence token, as a target.
    """

    text: str
    spans: list[Span]
    bos: bool = False
    eos: bool = False


class Encoder:
    """Tokenises batches on all threads that RAYON_NUM_THREADS allows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the tokenizer over: it adds no special tokens any more. (A copy takes half a second.)"""
        self._backend: Any = tokenizer.backend_tokenizer
        plain = self._backend.encode("a", add_special_tokens=True).ids
        # Post-processing would add special tokens, or trim white space out of offsets.
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos_id: int | None = tokenizer.eos_token_id
        self._eos_text = str(tokenizer.eos_token) if tokenizer.eos_token else None
        self._before = _ids_before(plain, self._backend.encode("a").ids)
        self._before_text = [str(tokenizer.convert_ids_to_tokens(i)) for i in self._before]

    @property
    def bos_ids(self) -> list[int]:
        """What the tokenizer puts before plain text: the BOS token, or nothing."""
        return list(self._before)

    def of_segments(self, segments: Segments) -> Rendered:
        """Plain text with its spans; a BOS or EOS that the writer spelled out is not doubled.

        Raises DataError when the tokenizer has no end-of-sequence token to learn.
        """
        text = ""
        spans: list[Span] = []
        for piece, is_target in segments.pieces:
            if is_target and piece:
                begin = spans.pop()[0] if spans and spans[-1][1] == len(text) else len(text)
                spans.append((begin, len(text) + len(piece)))
            text += piece
        if segments.closed:
            return Rendered(text, spans)
        if self._eos_text is None:
            raise DataError("the tokenizer has no end-of-sequence token, which plain text needs to end with")
        spelled = [token for token in self._before_text if text.startswith(token)]
        return Rendered(text, spans, bos=not spelled, eos=not text.endswith(self._eos_text))

    def encode(self, batch: Sequence[Rendered]) -> list[Document | RowProblem]:
        """One document each, or what is wrong with the text."""
        return self.documents(batch, self.tokenise(batch))

    def tokenise(self, batch: Sequence[Rendered]) -> list[Any]:
        """The encodings of a batch, None where a text cannot be encoded. Runs without Python's lock."""
        try:
            return list(self._backend.encode_batch([item.text for item in batch], add_special_tokens=False))
        except (UnicodeEncodeError, TypeError):  # one text cannot be encoded: find out which
            return [self._encode_alone(item) for item in batch]

    def documents(self, batch: Sequence[Rendered], encodings: Sequence[Any]) -> list[Document | RowProblem]:
        """encodings: what `tokenise` returned for `batch`."""
        return [
            RowProblem("contains half a surrogate pair, which is not text")
            if encoding is None
            else self._document(item, encoding)
            for item, encoding in zip(batch, encodings, strict=True)
        ]

    def _encode_alone(self, item: Rendered) -> Any:
        try:
            item.text.encode()
        except UnicodeEncodeError:
            return None
        return self._backend.encode(item.text, add_special_tokens=False)

    def _document(self, item: Rendered, encoding: Any) -> Document:
        ids = np.array(encoding.ids, dtype=np.int32)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        for span in item.spans:
            begin, end = tokens_of(encoding, span, len(item.text))
            labels[begin:end] = ids[begin:end]
        if item.bos and self._before:
            ids, labels = _joined(self._before, ids), _joined([IGNORE] * len(self._before), labels)
        if item.eos and self._eos_id is not None:
            ids, labels = _joined(ids, [self._eos_id]), _joined(labels, [self._eos_id])
        return Document(ids, labels)


def tokens_of(encoding: Any, span: Span, length: int) -> tuple[int, int]:
    """The tokens that overlap the characters of `span`: [begin, end).

    encoding: of `tokenizers`, with untrimmed offsets. length: of the text in characters.
    """
    begin, end = span
    if begin >= end:
        return 0, 0
    if begin == 0 and end == length:
        return 0, len(encoding.ids)
    first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1)
    if first is None or last is None:
        return _tokens_of_slowly(encoding.offsets, span)
    # A character may be several tokens (its bytes); the first of them was found.
    count = len(encoding.ids)
    while last + 1 < count and encoding.token_to_chars(last + 1)[0] < end:
        last += 1
    return first, last + 1


def _tokens_of_slowly(offsets: Sequence[Span], span: Span) -> tuple[int, int]:
    """The same where a boundary character is in no token: the normaliser dropped or joined it."""
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    overlapping = np.flatnonzero((begins < span[1]) & (ends > span[0]))
    return (int(overlapping[0]), int(overlapping[-1]) + 1) if len(overlapping) else (0, 0)


def _joined(one: Sequence[int] | Int32Array, other: Sequence[int] | Int32Array) -> Int32Array:
    return np.concatenate((np.asarray(one, dtype=np.int32), np.asarray(other, dtype=np.int32)))


def _ids_before(with_special: list[int], bare: list[int]) -> list[int]:
    """What stands before `bare` in `with_special`."""
    for begin in range(len(with_special) - len(bare) + 1):
        if with_special[begin : begin + len(bare)] == bare:
            return with_special[:begin]
    return []
