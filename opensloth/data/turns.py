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

from collections.abc import Hashable
from typing import Literal

from opensloth.data.examples import Chat
from opensloth.data.layout import Layout, build_layout
from opensloth.data.rows import TOO_DEEP, RowProblem
from opensloth.data.shape import take_apart
from opensloth.data.template import ChatTemplate, Span

TrainOn = Literal["assistant", "last", "all"]
_MAX_LAYOUTS = 4096
"""Shapes remembered; conversations of ever new shapes must not fill the memory."""


class Turns:
    """Finds the target spans of conversations under one template."""

    def __init__(self, template: ChatTemplate, train_on: TrainOn) -> None:
        self._template, self._train_on = template, train_on
        self._layouts: dict[Hashable, Layout | None] = {}

    def render(self, chat: Chat) -> tuple[str, list[Span]]:
        """The whole text, and its target spans in order.

        Raises RowProblem when the template refuses the conversation or a boundary cannot be told for certain.
        """
        try:
            return self._rendered(chat)
        except RecursionError:
            raise RowProblem(TOO_DEEP) from None

    def _rendered(self, chat: Chat) -> tuple[str, list[Span]]:
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
        return [i for i in said if chat.trained[i] and i >= chat.given]

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
        if self._template.stop_is_tagged and text[begin:end].rstrip().endswith(stop):
            return begin, begin + len(text[begin:end].rstrip())
        behind = text[end:].lstrip()
        return (begin, len(text) - len(behind) + len(stop)) if behind.startswith(stop) else span

    # --- templates without: layouts ---------------------------------------------------------------

    def _by_layout(self, chat: Chat, text: str) -> dict[int, Span]:
        shape = take_apart(chat, self._template.markup)
        if shape.outline not in self._layouts:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            try:
                self._layouts[shape.outline] = build_layout(self._template, chat, shape)
            except RowProblem:  # it takes these contents, but not others in their place
                self._layouts[shape.outline] = None
        layout = self._layouts[shape.outline]
        if layout is None:
            return {}
        if layout.text(shape.runs) == text:
            return layout.spans(shape.runs)
        in_json = shape.runs_in_json() if any(shape.shown_as_json) else []
        return layout.spans(in_json) if in_json and layout.text(in_json) == text else {}

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


def _complement(left_out: list[Span], length: int) -> list[Span]:
    """The spans of a text of `length` characters that `left_out` does not cover."""
    spans, at = [], 0
    for begin, end in sorted(left_out):
        if begin > at:
            spans.append((at, begin))
        at = max(at, end)
    return [*spans, (at, length)] if at < length else spans
