"""A conversation taken apart: what people and assistants wrote, and the outline that is left without it.

A *run* is a stretch of text without white space at its ends and without markup that the template might look
for. Conversations of equal outlines are rendered alike but for their runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from opensloth.data.examples import Chat, Message

Markup = re.Pattern[str] | None


@dataclass(slots=True)
class Shape:
    """runs: the texts, in the order in which they were met. owners: the message of each.

    shown_as_json: whether a run is part of a tool call's arguments or name.
    outline: equal for conversations that differ in their runs only.
    """

    runs: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    shown_as_json: list[bool] = field(default_factory=list)
    outline: Hashable = None

    def add(self, run: str, owner: int, *, shown_as_json: bool = False) -> None:
        self.runs.append(run)
        self.owners.append(owner)
        self.shown_as_json.append(shown_as_json)

    def runs_in_json(self) -> list[str]:
        """The runs as they look where a template writes calls as JSON."""
        return [
            json.dumps(run, ensure_ascii=False)[1:-1] if shown_as_json else run
            for run, shown_as_json in zip(self.runs, self.shown_as_json, strict=True)
        ]


def take_apart(chat: Chat, markup: Markup) -> Shape:
    """markup: what a template may look for in contents, which stays in the outline."""
    shape = Shape()
    outline: list[Any] = [_outline(message, i, shape, markup) for i, message in enumerate(chat.messages)]
    if chat.tools:
        outline.append(json.dumps(chat.tools, sort_keys=True, default=str))
    shape.outline = tuple(outline)
    return shape


def with_sentinels(message: Message, sentinels: Iterator[str], markup: Markup) -> Message:
    """The message with each run replaced by the next sentinel, in the order of `take_apart`."""
    replaced = dict(message)
    for name in sorted(message):
        if name in ("content", "reasoning_content"):
            outline = _cut(message[name], 0, Shape(), markup, fill=_is_blank(message, name, markup))
            replaced[name] = "".join(next(sentinels) if piece is None else piece for piece in outline)
        elif name == "tool_calls":
            replaced[name] = _replaced(message[name], sentinels)
    return replaced


def _outline(message: Message, index: int, shape: Shape, markup: Markup) -> Hashable:
    parts: list[Any] = [message["role"]]
    for name in sorted(message):
        value = message[name]
        if name in ("content", "reasoning_content"):
            parts += (name, _cut(value, index, shape, markup, fill=_is_blank(message, name, markup)))
        elif name == "tool_calls":
            parts += (name, tuple(_cut_call(value, index, shape)))
        elif name != "role":
            parts += (name, str(value))
    return tuple(parts)


def _cut(content: str, index: int, shape: Shape, markup: Markup, *, fill: bool) -> tuple[str | None, ...]:
    """White space and markup as they are; None for each run, which goes to `shape`.

    fill: end with an empty run, so that what has no text has a place all the same.
    """
    outline: list[str | None] = []
    for piece, is_tag in _pieces(content, markup):
        run = piece.strip()
        if is_tag or not run:
            outline.append(piece)
            continue
        shape.add(run, index)
        if len(run) == len(piece):
            outline.append(None)
        else:
            at = piece.index(run)
            outline += (piece[:at], None, piece[at + len(run) :])
    if fill:
        shape.add("", index)
        outline.append(None)
    return tuple(outline)


def _cut_call(value: Any, index: int, shape: Shape) -> Iterator[Any]:
    """The structure of tool calls; every text in it is a run, except keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key in ("type", "id") and isinstance(item, str):
                yield item
            else:
                yield tuple(_cut_call(item, index, shape))
    elif isinstance(value, list):
        for item in value:
            yield tuple(_cut_call(item, index, shape))
    elif isinstance(value, str) and value:
        shape.add(value, index, shown_as_json=True)
        yield None
    else:
        yield (type(value).__name__, value)


def _replaced(value: Any, sentinels: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in ("type", "id") and isinstance(item, str) else _replaced(item, sentinels)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_replaced(item, sentinels) for item in value]
    return next(sentinels) if isinstance(value, str) and value else value


def _is_blank(message: Message, name: str, markup: Markup) -> bool:
    """Whether nothing would mark the place of this message: it has neither calls nor text, reasoning left out."""
    if name != "content" or "tool_calls" in message:
        return False
    content = message["content"]
    if markup is not None and "<" in content:
        content = markup.split(content)[-1]  # templates drop the reasoning of old turns
    return not content.strip()


def _pieces(content: str, markup: Markup) -> list[tuple[str, bool]]:
    """Contents cut at markup: (piece, whether it is a tag)."""
    if markup is None or "<" not in content:
        return [(content, False)]
    pieces, at = [], 0
    for match in markup.finditer(content):
        pieces += [(content[at : match.start()], False), (match.group(), True)]
        at = match.end()
    return [(piece, is_tag) for piece, is_tag in (*pieces, (content[at:], False)) if piece]
