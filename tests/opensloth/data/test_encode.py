"""Labels by the tokens' own bytes are those by the tokenizer's offsets; the same rows give the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_tools import make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from opensloth.data.built import BuiltData
from opensloth.data.documents import Document
from opensloth.data.encode import Encoder, Rendered
from opensloth.data.prepared import PreparedDataset
from opensloth.data.template import Span
from opensloth.run_config import RunConfig, dump


def plain() -> Any:
    return make_tokenizer()


def composing() -> Any:
    """As Qwen's: letters with accents apart are joined, so that some texts are not spelled by their tokens."""
    made = make_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made


def swallowing() -> Any:
    """Special tokens that take the white space around them, which no token has then."""
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<x>", lstrip=True, rstrip=True)]})
    return made


def digit_by_digit() -> Any:
    made = make_tokenizer()
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return made


def prefixing() -> Any:
    """As RoBERTa's: a space of its own before every text."""
    made = make_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def encoders(make: Callable[[], Any]) -> tuple[Encoder, Encoder]:
    """By bytes where it can be, and by offsets only."""
    by_offsets = Encoder(make())
    by_offsets._byte_tokens = None
    return Encoder(make()), by_offsets


KINDS = {make.__name__: encoders(make) for make in (plain, composing, swallowing, digit_by_digit, prefixing)}
TEXT = st.lists(
    st.sampled_from(
        ["a dog", " the", "<x>", " <x> ", "<|im_start|>", "</s>", "e\u0301", "é", "😀", "\n", " ", "1", "12"]
    )
    | st.text(st.characters(codec="utf-8"), max_size=3),
    max_size=8,
).map("".join)


@st.composite
def rendered(draw: st.DrawFn) -> Rendered:
    """Any text with any spans."""
    text = draw(TEXT)
    edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans: list[Span] = list(zip(edges[::2], edges[1::2], strict=False))
    return Rendered(text, spans, bos=draw(st.booleans()), eos=draw(st.booleans()))


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=150, deadline=None)
@given(batch=st.lists(rendered(), max_size=4))
def test_labels_by_bytes_are_those_by_offsets(kind: str, batch: list[Rendered]) -> None:
    fast, by_offsets = (encoder.encode(batch) for encoder in KINDS[kind])
    for one, other in zip(fast, by_offsets, strict=True):
        assert isinstance(one, Document)
        assert isinstance(other, Document)
        assert one.ids.dtype == one.labels.dtype == np.int32
        assert one.ids.tolist() == other.ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_which_tokenizers_spell_texts() -> None:
    assert {kind for kind, (fast, _) in KINDS.items() if fast._byte_tokens is None} == {"prefixing"}


def test_what_is_not_text_is_found_among_what_is() -> None:
    fast, _ = KINDS["composing"]
    found = fast.encode([Rendered("a", [(0, 1)]), Rendered("\ud800", []), Rendered("e\u0301", []), Rendered("", [])])
    assert [type(one).__name__ for one in found] == ["Document", "RowProblem", "Document", "Document"]


# --- one input, one output ------------------------------------------------------------------------

SENTENCES = ("the quick brown fox", "jumps over a lazy dog", "¿qué? 😀", "a\n\nb  c", "numbers 0 1 2 345", "")


def conversations(count: int) -> list[dict[str, Any]]:
    """Of one to three questions, of few and many words; every 7th has a system prompt."""
    rows = []
    for i in range(count):
        turns = [{"role": "system", "content": SENTENCES[i % 5]}] if i % 7 == 0 else []
        for turn in range(1 + i % 3):
            turns.append({"role": "user", "content": f"{SENTENCES[(i + turn) % 6]} {i}" * (1 + i % 4)})
            turns.append({"role": "assistant", "content": f"{i} {SENTENCES[(i * turn) % 6]}" * (1 + i % 5)})
        rows.append({"messages": turns})
    return rows


def test_documents_are_those_of_before(tmp_path: Path, built: Callable[..., BuiltData]) -> None:
    """The hash was taken when offsets told the labels and batches were made otherwise."""
    result = built(write_jsonl(tmp_path / "a.jsonl", conversations(2000)), eval_fraction=0.1)
    digest = hashlib.sha256()
    for part in ("train", "eval"):
        data = PreparedDataset.open(result.path, part)
        for i in range(len(data)):
            for values in data.row(i):
                digest.update(values.tobytes())
    assert (result.documents, result.eval_documents, digest.hexdigest()[:16]) == (1780, 220, "6894c13577a25bdf")


@pytest.mark.slow
def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", conversations(3000))
    contents = []
    for threads in (1, 2):
        cache = tmp_path / f"cache-{threads}"
        config = make_config(path, cache=cache, eval_fraction=0.1)
        config.training.dataset_num_proc = threads
        command = [sys.executable, "-m", "opensloth.data", "build", "--config", "-"]
        environment = {key: value for key, value in os.environ.items() if key != "RAYON_NUM_THREADS"}
        subprocess.run(command, input=dump(config), text=True, check=True, capture_output=True, env=environment)
        files = sorted(file for file in cache.glob("*/*/*") if file.is_file())
        contents.append({file.relative_to(cache).as_posix(): file.read_bytes() for file in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 12
