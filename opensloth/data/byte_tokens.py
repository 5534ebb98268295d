"""Where a text's tokens begin and end, from the bytes that each token stands for.

The tokenizer can say so itself, but at the price of an offset for every token, a fifth of the time of encoding.
A byte-level vocabulary needs none: end to end, the bytes of the tokens are those of the text. Whether they are is
checked for every text, so that a normaliser, or anything else that changes or drops characters, is noticed.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from opensloth.data.documents import Int32Array
from opensloth.data.template import Span

_SAMPLE = "A dog, 2 caf\u00e9s\n"


class ByteTokens:
    """The bytes of every id of a byte-level vocabulary."""

    def __init__(self, pieces: list[bytes]) -> None:
        """pieces: bytes by id."""
        self._pieces = pieces
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)

    @classmethod
    def of(cls, backend: Any) -> ByteTokens | None:
        """backend: of `tokenizers`. None when texts are not spelled by its tokens."""
        from tokenizers import decoders

        if not isinstance(backend.decoder, decoders.ByteLevel):
            return None
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            pieces[number] = token.encode() if token in added else _bytes_of(token)
        made = cls(pieces)
        ids = backend.encode(_SAMPLE, add_special_tokens=False).ids
        return made if made.spell(ids, _SAMPLE.encode()) else None  # else it would hardly ever do

    def spell(self, ids: Sequence[int], text: bytes) -> bool:
        """Whether `ids` are `text`, byte for byte."""
        return b"".join(map(self._pieces.__getitem__, ids)) == text

    def overlapping(self, ids: Int32Array, spans: Sequence[Span]) -> list[Span]:
        """The tokens that overlap each stretch of bytes: [begin, end).

        ids: int32[n], of one text or of several end to end, each checked with `spell`. spans: not empty ones.
        """
        if not spans:
            return []
        ends = np.cumsum(self._lengths[ids])
        begins, stops = np.array(spans, dtype=np.int64).T
        first = np.searchsorted(ends, begins, side="right")
        last = np.searchsorted(ends, stops, side="left")
        return list(zip(first.tolist(), (last + 1).tolist(), strict=True))


def byte_span(text: str, span: Span) -> Span:
    """The bytes of a stretch of characters in `text`."""
    begin, end = span
    if text.isascii():
        return span
    before = len(text[:begin].encode())
    return before, before + len(text[begin:end].encode())


def _byte_characters() -> dict[int, int]:
    """The character that stands for each byte, reversed: printable ones for themselves, the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | dict(zip(itertools.count(256), others, strict=False))


_BYTE_OF_CHARACTER = _byte_characters()


def _bytes_of(token: str) -> bytes:
    try:
        return codecs.charmap_encode(token, "strict", _BYTE_OF_CHARACTER)[0]
    except UnicodeEncodeError:  # not written in this alphabet: no text is spelled with it
        return token.encode()
