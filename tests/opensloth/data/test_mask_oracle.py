"""Random conversations under every template: what is trained is exactly what the assistants said, and the stop.

What they said is told by an oracle of a few lines for each template (tests/support/mask_oracle.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from chat_templates import SPECIAL, TOOL_SPECIAL
from data_tools import make_tokenizer
from mask_oracle import STYLES, TOOLS, Style, has_markup
from measured import at_least, at_most

from opensloth.data.documents import IGNORE
from opensloth.data.encode import Encoder
from opensloth.data.prepare import SourcePreparation, Target
from opensloth.data.rows import Row
from opensloth.errors import DataError
from opensloth.opensloth_config import DatasetArgs

AMOUNTS = [
    pytest.param(60, id="sample"),
    pytest.param(2_500, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
]
TEXTS = (
    "hi", "yes", "a b", "1", "é", "😀", "ſ", "e\u0301", "中文", "\u2028", "\U000f0000", "\n", "\n\n", " ", "\t", "  ",
    "### user:", "[INST]", "assistant", "user\n", "{{ x }}", "\\n", '"', "'", "<b>", "&amp;",
    "<|im_start|>assistant\n", *SPECIAL, *TOOL_SPECIAL,
)  # fmt: skip
MARKUP = (
    "<think>",
    "</think>",
    "<think>\nno\n</think>\n\n",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
UNCERTAIN = "the template does not show where message"


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_what_is_trained_is_what_assistants_said(style: str, train_on: str, amount: int) -> None:
    chosen = STYLES[style]
    r = random.Random(f"{style} {train_on}")
    rows = [conversation(r, chosen) for _ in range(amount)]
    tokenizer = make_tokenizer(chosen.template)
    kept = {one.row.number: one for one in prepared(chosen, rows, train_on).documents()}
    refused, wrong = 0, []
    for number, row in enumerate(rows, start=1):
        text, ids, labels = expected(tokenizer, chosen, row, train_on)
        if number not in kept:
            if (labels[1:] != IGNORE).any():
                refused += 1
                check_refusal(chosen, row, train_on)
            continue
        document = kept[number].document
        shown = tokenizer.decode(document.ids)
        assert shown.endswith(text), row
        before = len(document.ids) - len(ids)
        assert before == 0 or shown != text, row
        assert document.ids[before:].tolist() == ids.tolist(), row
        found = document.labels
        if (found[:before] != IGNORE).any() or found[before:].tolist() != labels.tolist():
            wrong.append((row, tokenizer.decode(document.ids[found != IGNORE])))
    assert not wrong, wrong[0]
    at_most("masks of random conversations, every template: documents not labelled as the oracle has it", len(wrong), 0)
    at_least("masks of random conversations, every template: share of them compared", len(kept) / amount, 0.5)
    assert refused <= (amount / 5 if chosen.markup else 0)


def conversation(r: random.Random, style: Style) -> dict[str, Any]:
    """A row of the messages format; its messages are in the shape that templates see."""
    messages: list[dict[str, Any]] = []
    if style.has_system and r.random() < 0.3:
        messages.append({"role": "system", "content": words(r, style) or "be kind"})
    has_tools = style.calls and r.random() < 0.4
    for _ in range(r.choice((1, 1, 2, 3))):
        messages.append({"role": "user", "content": words(r, style)})
        if has_tools and r.random() < 0.6:
            messages.append({**answer(r, style), "tool_calls": calls(r)[: style.calls]})
            messages.append({"role": "tool", "content": words(r, style)})
        messages.append(answer(r, style))
    row: dict[str, Any] = {"messages": messages}
    if has_tools:
        row["tools"] = TOOLS
    return row


def answer(r: random.Random, style: Style) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": words(r, style)}
    if style.reasons and r.random() < 0.5:
        thought = r.choice(("hm", "let me see\n\nso", "1 + 1 = 2", "é 😀"))
        if style.calls and r.random() < 0.5:
            message["reasoning_content"] = thought
        else:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    if r.random() < 0.15:
        message |= r.choice(({"train": False}, {"weight": 0}, {"train": True}, {"weight": 1}))
    return message


def calls(r: random.Random) -> list[dict[str, Any]]:
    values = (
        {},
        {"a": 1},
        {"a": "x"},
        {"q": 'say "hi"\n', "n": [1, None, True]},
        {"t": {"é": "<|im_end|>😀"}},
        {"a": ""},
    )
    made = [{"type": "function", "function": {"name": r.choice(("f", "get_x")), "arguments": r.choice(values)}}]
    return made * r.choice((1, 1, 2))


def words(r: random.Random, style: Style) -> str:
    kinds = (TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, MARKUP) if style.markup and r.random() < 0.15 else (TEXTS,)
    return "".join(r.choice(r.choice(kinds)) for _ in range(r.choice((0, 1, 1, 2, 3, 5))))


@dataclass
class Rows:
    """A source in memory."""

    values: list[dict[str, Any]]
    name: str = "rows"
    note: str = ""

    def fingerprint(self) -> str:
        return ""

    def count(self) -> int | None:
        return len(self.values)

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(self.values, start=1):
            yield Row(self.name, number, json.loads(json.dumps(row)))


def prepared(style: Style, rows: list[dict[str, Any]], train_on: Any, bad_rows: Any = "skip") -> SourcePreparation:
    tokenizer = make_tokenizer(style.template)
    target = Target(tokenizer, Encoder(tokenizer), len(tokenizer), 1 << 20)
    args = DatasetArgs(path="rows", train_on=train_on, bad_rows=bad_rows)
    return SourcePreparation(args, Rows(rows), target, lambda *_: None)


def expected(tokenizer: Any, style: Style, row: dict[str, Any], train_on: str) -> tuple[str, Any, Any]:
    """What the template shows from the first message on, its ids, and the labels by the oracle.

    A token is a target when it holds any character that is one.
    """
    messages = row["messages"]
    options = {"has_tools": True} if "tools" in row else {}
    pieces = list(style.oracle(messages, **options))
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in (said[-1:] if train_on == "last" else said) if is_trained(messages[i])]
    text, trained = "", []
    for piece in pieces:
        text += piece.text
        trained += [piece.said_by in wanted and piece.said_by is not None] * len(piece.text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    hits = [any(trained[begin:end]) for begin, end in encoded["offset_mapping"]]
    labels = [token if hit else IGNORE for token, hit in zip(ids, hits, strict=True)]
    if (
        style is STYLES["headings"] and wanted and wanted[-1] == len(messages) - 1
    ):  # nothing of the template ends the turn
        ids, labels, text = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id], text + "</s>"
    return text, np.array(ids), np.array(labels)


def is_trained(message: dict[str, Any]) -> bool:
    return message.get("train") is not False and message.get("weight") != 0


def check_refusal(style: Style, row: dict[str, Any], train_on: str) -> None:
    """Only where somebody typed what the template looks for, and with that reason."""
    with pytest.raises(DataError) as caught:
        list(prepared(style, [row], train_on, "error").documents())
    assert UNCERTAIN in caught.value.message, (row, caught.value.message)
    assert has_markup(style, row["messages"]), row
