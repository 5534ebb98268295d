"""Tokenizers, rows and reports for the tests of data preparation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chat_templates import CHATML, SPECIAL, TOOL_SPECIAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over a lazy dog while user and assistant talk about numbers 0 1 2 3 4 5 6 7 8 9"


def make_tokenizer(template: str | None = CHATML, *, bos: bool = True, trim: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with real merges, and the special tokens of all the test templates.

    bos: whether plain text begins with <s>. trim: whether offsets leave white space out, as Llama's do.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL) + 80, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([WORDS] * 4 + ["\n\n\n", "  "], trainer)
    core.add_special_tokens(list(TOOL_SPECIAL))
    parts: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos:
        parts.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]))
    if parts:
        core.post_processor = processors.Sequence(parts)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


class Events:
    """A report that remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, event: str, /, **fields: Any) -> None:
        self.seen.append({"event": event, **fields})

    def notes(self, level: str | None = None) -> list[str]:
        return [e["message"] for e in self.seen if e["event"] == "note" and level in (None, e["level"])]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages from alternating texts, the user first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages
