"""Where the turns are in a rendered conversation, for all conversations of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opensloth.data.examples import Chat, Message
from opensloth.data.rows import RowProblem
from opensloth.data.shape import Shape, with_sentinels
from opensloth.data.template import FIRST_SENTINEL, SENTINELS, ChatTemplate, Span, common_prefix


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


def build_layout(template: ChatTemplate, chat: Chat, shape: Shape) -> Layout:
    """Render sentinels in place of the runs and find the turns among them.

    shape: of `chat`. A message whose place cannot be told for certain has no turn in the layout.
    Raises RowProblem when the template does not take the sentinels.
    """
    sentinels = (chr(FIRST_SENTINEL + i) for i in range(len(shape.runs)))
    messages = [with_sentinels(message, sentinels, template.markup) for message in chat.messages]
    text = template.render(messages, chat.tools)
    found = list(SENTINELS.finditer(text))
    edges = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    literals = [text[begin:end] for begin, end in zip(edges, ends, strict=True)]
    slots = [ord(match.group()) - FIRST_SENTINEL for match in found]
    if any(slot >= len(shape.runs) for slot in slots):
        raise RowProblem("a name or a tool holds a private-use character that stands for contents")
    owners = [shape.owners[slot] for slot in slots]
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
        end = end_of_turn(literals[places[-1] + 1], template.stop)
        if offset is not None and end is not None:
            turns.append(Turn(i, Point(places[0], offset), Point(places[-1] + 1, end)))
    return Layout(literals, slots, turns)


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


def end_of_turn(literal: str, stop: str | None) -> int | None:
    """Where in the template's text after an answer's last run the turn ends."""
    if stop is None:
        return 0
    at = literal.find(stop)
    return None if at < 0 else at + len(stop)
