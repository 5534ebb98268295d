"""From rendered text and target spans to ids and labels: one tokenisation of the whole text.

Which tokens a span covers is told by the tokens' own bytes where they spell the text, else by the offsets of the
tokenizer. Both give the same labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from opensloth.data.byte_tokens import ByteTokens, byte_span
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
        self._byte_tokens = ByteTokens.of(self._backend)
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
        encode_batch = self._backend.encode_batch_fast if self._byte_tokens else self._backend.encode_batch
        try:
            return list(encode_batch([item.text for item in batch], add_special_tokens=False))
        except (UnicodeEncodeError, TypeError):  # one text cannot be encoded: find out which
            return [self._encode_alone(item) for item in batch]

    def documents(self, batch: Sequence[Rendered], encodings: Sequence[Any]) -> list[Document | RowProblem]:
        """encodings: what `tokenise` returned for `batch`. Documents may be views of one array for the batch."""
        spelled = [self._spelled(item, encoding) for item, encoding in zip(batch, encodings, strict=True)]
        by_bytes = iter(self._by_bytes([one for one in spelled if one is not None]))
        found: list[Document | RowProblem] = []
        for item, encoding, one in zip(batch, encodings, spelled, strict=True):
            if encoding is None:
                found.append(RowProblem("contains half a surrogate pair, which is not text"))
                continue
            document = self._by_offsets(item, encoding) if one is None else next(by_bytes)
            found.append(self._with_ends(item, document) if item.bos or item.eos else document)
        return found

    def _encode_alone(self, item: Rendered) -> Any:
        try:
            item.text.encode()
        except UnicodeEncodeError:
            return None
        return self._backend.encode(item.text, add_special_tokens=False)

    def _spelled(self, item: Rendered, encoding: Any) -> _Spelled | None:
        """None where the bytes of the tokens are not those of the text, or nobody knows them."""
        if self._byte_tokens is None or encoding is None:
            return None
        ids, text = encoding.ids, item.text.encode()
        if not self._byte_tokens.spell(ids, text):
            return None
        return _Spelled(ids, [byte_span(item.text, span) for span in item.spans if span[0] < span[1]], len(text))

    def _by_bytes(self, texts: list[_Spelled]) -> list[Document]:
        """All texts at once: what is done for each one alone takes longer than the tokens themselves."""
        if self._byte_tokens is None or not texts:
            return []
        ids = np.fromiter(itertools.chain.from_iterable(one.ids for one in texts), dtype=np.int32)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        starts = itertools.accumulate((one.length for one in texts), initial=0)
        spans = [(at + begin, at + end) for one, at in zip(texts, starts, strict=False) for begin, end in one.spans]
        for begin, end in self._byte_tokens.overlapping(ids, spans):
            labels[begin:end] = ids[begin:end]
        edges = itertools.pairwise(itertools.accumulate((len(one.ids) for one in texts), initial=0))
        return [Document(ids[begin:end], labels[begin:end]) for begin, end in edges]

    def _by_offsets(self, item: Rendered, encoding: Any) -> Document:
        if self._byte_tokens is not None:  # encoded without offsets
            encoding = self._backend.encode(item.text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        for span in item.spans:
            begin, end = tokens_of(encoding, span, len(item.text))
            labels[begin:end] = ids[begin:end]
        return Document(ids, labels)

    def _with_ends(self, item: Rendered, document: Document) -> Document:
        ids, labels = document
        if item.bos and self._before:
            ids, labels = _joined(self._before, ids), _joined([IGNORE] * len(self._before), labels)
        if item.eos and self._eos_id is not None:
            ids, labels = _joined(ids, [self._eos_id]), _joined(labels, [self._eos_id])
        return Document(ids, labels)


@dataclass(frozen=True, slots=True)
class _Spelled:
    """A text that its tokens spell. ids: the tokens. spans: the target stretches in bytes. length: in bytes."""

    ids: list[int]
    spans: list[Span]
    length: int


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


def _joined(one: npt.ArrayLike, other: npt.ArrayLike) -> Int32Array:
    return np.concatenate((np.asarray(one, dtype=np.int32), np.asarray(other, dtype=np.int32)))


def _ids_before(with_special: list[int], bare: list[int]) -> list[int]:
    """What stands before `bare` in `with_special`."""
    for begin in range(len(with_special) - len(bare) + 1):
        if with_special[begin : begin + len(bare)] == bare:
            return with_special[:begin]
    return []
