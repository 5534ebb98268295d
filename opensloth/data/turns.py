"""Which characters of a rendered conversation an assistant has to produce.

A template without generation tags does not say. So the conversation is rendered a second time with
private-use characters in place of all that people and assistants wrote: what is then between two of them was
made by the template alone, and can be searched for marks without ever meeting a mark that somebody typed. An
assistant's turn begins where the generation prompt ends, with all that follows (reasoning, tool calls), and
ends with the turn's stop token. The result is a Layout, which holds for every conversation of the same shape;
for each conversation it is verified by rebuilding the whole text from it, character by character.

Where a template changes contents otherwise than by trimming, the rebuilt text differs. Then renderings of the
first turns are compared with the whole: if each is a prefix of it, the turns' ends are certain too. If not,
the row is refused: there is no guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opensloth.data.examples import Chat, Message
from opensloth.data.rows import RowProblem
from opensloth.data.template import FIRST_SENTINEL, SENTINELS, ChatTemplate, Span, common_prefix

TrainOn = Literal["assistant", "last", "all"]
_MAX_LAYOUTS = 4096
"""Shapes remembered; conversations of ever new shapes must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Point:
    """A place in a Layout: `offset` characters into literal number `literal`."""

    literal: int
    offset: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What message number `message` has to produce (assistants) or just says (others)."""

    message: int
    begin: Point
    end: Point


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation of one shape: literals[0] run literals[1] run ... literals[-1].

    slots[k]: which of the conversation's runs stands between literals[k] and literals[k + 1].
    """

    literals: list[str]
    slots: list[int]
    turns: list[Turn]

    def text(self, runs: list[str]) -> str:
        parts = [self.literals[0]]
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            parts += (runs[slot], literal)
        return "".join(parts)

    def spans(self, runs: list[str]) -> dict[int, Span]:
        """message -> span in the text that `runs` give."""
        starts, at = [0], 0
        for slot, literal in zip(self.slots, self.literals, strict=False):
            at += len(literal) + len(runs[slot])
            starts.append(at)
        return {
            turn.message: (
                starts[turn.begin.literal] + turn.begin.offset, starts[turn.end.literal] + turn.end.offset
            )
            for turn in self.turns
        }  # fmt: skip


@dataclass(slots=True)
class _Shape:
    """A conversation with its runs taken out.

    outline: nested tuples of literals and None for a run; equal outlines render alike.
    """

    runs: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    in_calls: bool = False


class Turns:
    """Finds the target spans of conversations under one template."""

    def __init__(self, template: ChatTemplate, train_on: TrainOn) -> None:
        self._template, self._train_on = template, train_on
        self._layouts: dict[Any, Layout | None] = {}

    def render(self, chat: Chat) -> tuple[str, list[Span]]:
        """The whole text, and its target spans in order.

        Raises RowProblem when the template refuses the conversation or a boundary cannot be told for certain.
        """
        if self._train_on == "all" and all(chat.trained):
            text = self._template.render(chat.messages, chat.tools)
            return text, [(0, len(text))]
        wanted = self._wanted(chat)
        if self._template.tagged and self._train_on != "all":
            return self._by_tags(chat, wanted)
        text = self._template.render(chat.messages, chat.tools)
        if not wanted and self._train_on != "all":
            return text, []
        spans = self._by_layout(chat, text)
        if any(message not in spans for message in wanted):
            spans = self._by_prefixes(chat, text) | spans
        lost = [message for message in wanted if message not in spans]
        if lost:
            raise RowProblem(f"the template does not show where message {lost[0]} begins and ends: no mask is certain")
        if self._train_on == "all":
            return text, _complement([spans[message] for message in wanted], len(text))
        return text, [spans[message] for message in wanted]

    def _wanted(self, chat: Chat) -> list[int]:
        """The messages whose spans are needed: the targets, or with `all` those that are left out."""
        if self._train_on == "all":
            return [i for i, trained in enumerate(chat.trained) if not trained]
        said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self._train_on == "last":
            said = said[-1:]
        return [i for i in said if chat.trained[i]]

    # --- templates with generation tags ----------------------------------------------------------

    def _by_tags(self, chat: Chat, wanted: list[int]) -> tuple[str, list[Span]]:
        text, tagged = self._template.render_tagged(chat.messages, chat.tools)
        said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(tagged) != len(said):
            raise RowProblem(f"{len(said)} assistant messages, but the template's generation tags mark {len(tagged)}")
        spans = []
        for i, span in zip(said, tagged, strict=True):
            tail = str(chat.messages[i]["content"]).rpartition("</think>")[2].strip()
            if tail not in text[slice(*span)]:
                raise RowProblem(f"the template's generation tags do not enclose what message {i} says")
            if i in wanted:
                spans.append(self._with_stop(text, span))
        return text, spans

    def _with_stop(self, text: str, span: Span) -> Span:
        """The span, made to end with the stop token: longer if the tag left it out, without what follows it."""
        begin, end = span
        stop = self._template.stop
        if stop is None:
            return span
        if text[begin:end].rstrip().endswith(stop):
            return begin, begin + len(text[begin:end].rstrip())
        behind = text[end:].lstrip()
        return (begin, len(text) - len(behind) + len(stop)) if behind.startswith(stop) else span

    # --- templates without: layouts ---------------------------------------------------------------

    def _by_layout(self, chat: Chat, text: str) -> dict[int, Span]:
        shape = _Shape()
        key = tuple(self._outline(message, i, shape) for i, message in enumerate(chat.messages))
        if chat.tools:
            key = (*key, json.dumps(chat.tools, sort_keys=True, default=str))
        if key not in self._layouts:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            try:
                self._layouts[key] = _build_layout(self._template, chat, shape, self._sentinel_message)
            except RowProblem:  # it takes these contents, but not others in their place
                self._layouts[key] = None
        layout = self._layouts[key]
        if layout is None:
            return {}
        if layout.text(shape.runs) == text:
            return layout.spans(shape.runs)
        escaped = [json.dumps(run, ensure_ascii=False)[1:-1] for run in shape.runs] if shape.in_calls else []
        if escaped:
            # Arguments of calls are shown as JSON; contents are shown as they are.
            runs = [e if owner < 0 else r for r, e, owner in zip(shape.runs, escaped, shape.owners, strict=True)]
            if layout.text(runs) == text:
                return layout.spans(runs)
        return {}

    def _outline(self, message: Message, index: int, shape: _Shape) -> Any:
        """The message without its runs, as a key; the runs are added to `shape`."""
        parts: list[Any] = [message["role"]]
        for name in sorted(message):
            if name == "role":
                continue
            value = message[name]
            if name in ("content", "reasoning_content"):
                parts += (name, self._cut(value, index, shape, fill=_is_blank(message, name)))
            elif name == "tool_calls":
                shape.in_calls = True
                parts += (name, tuple(self._cut_call(value, index, shape)))
            else:
                parts += (name, str(value))
        return tuple(parts)

    def _cut(self, content: str, index: int, shape: _Shape, *, fill: bool) -> tuple[str | None, ...]:
        """White space and markup as they are; None for each run of other text, which goes to `shape`.

        fill: end with an empty run, so that what has no text has a place all the same.
        """
        outline: list[str | None] = []
        for piece, is_tag in _pieces(content, self._template.markup):
            run = piece.strip()
            if is_tag or not run:
                outline.append(piece)
                continue
            shape.runs.append(run)
            shape.owners.append(index)
            if len(run) == len(piece):
                outline.append(None)
            else:
                at = piece.index(run)
                outline += (piece[:at], None, piece[at + len(run) :])
        if fill:
            shape.runs.append("")
            shape.owners.append(index)
            outline.append(None)
        return tuple(outline)

    def _cut_call(self, value: Any, index: int, shape: _Shape) -> Iterator[Any]:
        """The structure of tool calls; every text in it is a run, except keys."""
        if isinstance(value, dict):
            for key, item in value.items():
                yield key
                if key in ("type", "id") and isinstance(item, str):
                    yield item
                else:
                    yield tuple(self._cut_call(item, index, shape))
        elif isinstance(value, list):
            for item in value:
                yield tuple(self._cut_call(item, index, shape))
        elif isinstance(value, str) and value:
            shape.runs.append(value)
            shape.owners.append(-1 - index)
            yield None
        else:
            yield (type(value).__name__, value)

    def _sentinel_message(self, message: Message, sentinels: Iterator[str]) -> Message:
        """The message with each run replaced by the next sentinel, in the order of `_outline`."""
        replaced = dict(message)
        for name in sorted(message):
            if name in ("content", "reasoning_content"):
                scratch = _Shape()
                outline = self._cut(message[name], 0, scratch, fill=_is_blank(message, name))
                replaced[name] = "".join(next(sentinels) if piece is None else piece for piece in outline)
            elif name == "tool_calls":
                replaced[name] = _replaced(message[name], sentinels)
        return replaced

    # --- templates that change contents: prefixes -------------------------------------------------

    def _by_prefixes(self, chat: Chat, text: str) -> dict[int, Span]:
        spans: dict[int, Span] = {}
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant" or not chat.trained[i]:
                continue
            try:
                before = self._template.render(chat.messages[:i], chat.tools, prompt=True)
                after = self._template.render(chat.messages[: i + 1], chat.tools)
            except RowProblem:
                continue
            if not (after.startswith(before) and text.startswith(after)):
                continue
            said = after[len(before) :].rstrip()
            if self._template.stop is None or said.endswith(self._template.stop):
                spans[i] = (len(before), len(before) + len(said))
        return spans


def _is_blank(message: Message, name: str) -> bool:
    """Whether nothing would mark the place of this message: it has neither text nor calls."""
    return name == "content" and "tool_calls" not in message and not message["content"].strip()


def _build_layout(
    template: ChatTemplate,
    chat: Chat,
    shape: _Shape,
    with_sentinels: Callable[[Message, Iterator[str]], Message],
) -> Layout:
    """Render sentinels in place of the runs and find the turns among them. Raises RowProblem."""
    sentinels = (chr(FIRST_SENTINEL + i) for i in range(len(shape.runs)))
    messages = [with_sentinels(message, sentinels) for message in chat.messages]
    text = template.render(messages, chat.tools)
    found = list(SENTINELS.finditer(text))
    edges = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    literals = [text[begin:end] for begin, end in zip(edges, ends, strict=True)]
    slots = [ord(match.group()) - FIRST_SENTINEL for match in found]
    if any(slot >= len(shape.runs) for slot in slots):
        raise RowProblem("a name or a tool holds a private-use character that stands for contents")
    owners = [_owner(shape.owners[slot]) for slot in slots]
    turns = []
    for i, message in enumerate(messages):
        places = [k for k, owner in enumerate(owners) if owner == i]
        if not places or owners[places[0] : places[-1] + 1] != [i] * len(places):
            continue  # not shown, or not in one piece: whoever needs it refuses the row
        if message["role"] != "assistant":
            begin = Point(places[0], len(literals[places[0]]))
            turns.append(Turn(i, begin, Point(places[-1] + 1, 0)))
            continue
        given = _given_before(template, messages[:i], chat.tools, slots[places[0] - 1] if places[0] else None)
        offset = None if given is None else begin_of_turn(literals[places[0]], *given, template.special_tokens)
        end = _end_of_turn(literals[places[-1] + 1], template.stop)
        if offset is not None and end is not None:
            turns.append(Turn(i, Point(places[0], offset), Point(places[-1] + 1, end)))
    return Layout(literals, slots, turns)


def _owner(owner: int) -> int:
    """The message of a run; runs inside tool calls are counted below zero."""
    return owner if owner >= 0 else -1 - owner


def _given_before(
    template: ChatTemplate, messages: list[Message], tools: list[Any] | None, last_slot: int | None
) -> tuple[str, str] | None:
    """What the template puts behind the last run when it asks for an answer, and what when it does not.

    None: in these renderings another run comes last, so that they cannot be compared with the whole.
    """
    try:
        renderings = [template.render(messages, tools, prompt=prompt) for prompt in (True, False)]
    except RowProblem:
        return None
    tails = []
    for text in renderings:
        last = next(reversed(list(SENTINELS.finditer(text))), None)
        slot = ord(last.group()) - FIRST_SENTINEL if last else None
        if slot != last_slot:
            return None
        tails.append(text[last.end() :] if last else text)
    return tails[0], tails[1]


def begin_of_turn(literal: str, given: str, closing: str, special_tokens: Sequence[str]) -> int | None:
    """Where in the template's text before an answer the model's own part begins.

    literal: that text in the conversation. given: what ends the prompt at inference. closing: the same
    without asking for an answer, so that the rest of `given` is the answer's header.
    Mostly `given` begins `literal`. A prompt may hold more than an old turn shows (`<think>`): then all of
    `literal` was given. Else they part somewhere behind the header: at the line or special token before that.
    """
    if literal.startswith(given):
        return len(given)
    common = common_prefix(literal, given)
    if common == len(literal):
        return common
    ends = [at + len(token) for token in special_tokens if (at := literal.rfind(token, 0, common)) >= 0]
    end = max((literal.rfind("\n", 0, common) + 1, *ends))
    return end if end > common_prefix(given, closing) else None


def _end_of_turn(literal: str, stop: str | None) -> int | None:
    """Where in the template's text after an answer's last run the turn ends."""
    if stop is None:
        return 0
    at = literal.find(stop)
    return None if at < 0 else at + len(stop)


def _pieces(content: str, markup: re.Pattern[str] | None) -> list[tuple[str, bool]]:
    """Contents cut at markup: (piece, whether it is a tag)."""
    if markup is None or "<" not in content:
        return [(content, False)]
    pieces, at = [], 0
    for match in markup.finditer(content):
        pieces += [(content[at : match.start()], False), (match.group(), True)]
        at = match.end()
    return [(piece, is_tag) for piece, is_tag in (*pieces, (content[at:], False)) if piece]


def _replaced(value: Any, sentinels: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: item if key in ("type", "id") and isinstance(item, str) else _replaced(item, sentinels)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_replaced(item, sentinels) for item in value]
    return next(sentinels) if isinstance(value, str) and value else value


def _complement(left_out: list[Span], length: int) -> list[Span]:
    """The spans of a text of `length` characters that `left_out` does not cover."""
    spans, at = [], 0
    for begin, end in sorted(left_out):
        if begin > at:
            spans.append((at, begin))
        at = max(at, end)
    return [*spans, (at, length)] if at < length else spans
