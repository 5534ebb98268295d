"""A chat template: rendering, and what it says about where turns begin and end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opensloth.data.examples import Message
from opensloth.data.rows import RowProblem
from opensloth.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Begin and end of a stretch of text, in characters."""

# Private-use characters stand for contents: no template treats them specially.
FIRST_SENTINEL = 0xF0000
SENTINELS = re.compile("[\U000f0000-\U000ffffd]")
_PROBE_USER, _PROBE_ANSWER, _PROBE_NEXT = (chr(FIRST_SENTINEL + i) for i in range(3))

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKUP = re.compile(r"</?[A-Za-z_][\w.-]*>")
_THINKING_KEY = re.compile(r"(?<![A-Za-z_])thinking(?![A-Za-z_])")


class ChatTemplate:
    """Renders conversations as the tokenizer's `apply_chat_template` would.

    stop: the text that ends an assistant's turn (nearly always one special token), or None when the template
    ends turns with nothing of its own.
    stop_is_special: whether `stop` is one special token.
    tagged: whether the template marks what assistants say by `{% generation %}`.
    stop_is_tagged: whether those marks enclose `stop` as well.
    markup: tags such as </think> in the template's own code, which may look for them in contents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        """text: the Jinja source.

        Raises DataError when it cannot be compiled or cannot render a question with its answer.
        """
        self.text = text
        self.tagged = bool(_GENERATION_TAG.search(text))
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._rename_reasoning = "reasoning_content" not in text and bool(_THINKING_KEY.search(text))
        self.special_tokens = special_tokens(tokenizer)
        self.stop, self.stop_is_special = self._probe_stop()
        self.stop_is_tagged = self.tagged and self._probe_tags()
        self.markup = self._markup()

    def looks_at(self, key: str) -> bool:
        """Whether the template's code mentions a key of messages, or a variable."""
        return key in self.text or (key == "reasoning_content" and self._rename_reasoning)

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """prompt: add what a model is given before its answer.

        Raises RowProblem when the template refuses the conversation.
        """
        return self._render(messages, tools, {"add_generation_prompt": prompt})[0]

    def render_tagged(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The text and the spans that the template's own generation tags enclose."""
        return self._render(messages, tools, {"return_assistant_tokens_mask": True})

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, options: dict[str, Any]
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils import chat_template_utils

        # Typed by its authors as returning text: it returns lists of texts and of spans.
        render: Any = chat_template_utils.render_jinja_template
        options = options | self._variables
        try:
            texts, spans = render([self._in_template_words(messages)], tools, chat_template=self.text, **options)
        except jinja2.TemplateSyntaxError as error:
            where = f"line {error.lineno}: {error.message}"
            raise DataError(f"the chat template is not valid: {where}", "is it a Jinja template?") from error
        except Exception as error:  # a template is somebody's program: it divides by zero, it calls itself for ever
            raise RowProblem(f"the chat template refuses this conversation: {error}") from error
        return texts[0], spans[0] if spans else []

    def _in_template_words(self, messages: Sequence[Message]) -> list[Message]:
        if not self._rename_reasoning:
            return list(messages)
        return [{("thinking" if key == "reasoning_content" else key): m[key] for key in m} for m in messages]

    def _probe_stop(self) -> tuple[str | None, bool]:
        """What follows an assistant's content: at the end of a conversation, and before the next turn."""
        turns = [
            {"role": "user", "content": _PROBE_USER},
            {"role": "assistant", "content": _PROBE_ANSWER},
            {"role": "user", "content": _PROBE_NEXT},
        ]
        try:
            at_end = self.render(turns[:2]).rpartition(_PROBE_ANSWER)
            between = self.render(turns).rpartition(_PROBE_NEXT)[0].rpartition(_PROBE_ANSWER)[2]
        except RowProblem as problem:
            raise DataError(f"the chat template cannot render a question and its answer: {problem}") from problem
        if not at_end[1]:
            raise DataError("the chat template does not render what an assistant said", "check its loop over messages")
        tail = at_end[2].lstrip()
        for token in self.special_tokens:
            if tail.startswith(token):
                return token, True
        common = at_end[2][: common_prefix(at_end[2], between)].strip()
        return (common, False) if common else (None, False)

    def _probe_tags(self) -> bool:
        turns = [{"role": "user", "content": _PROBE_USER}, {"role": "assistant", "content": _PROBE_ANSWER}]
        try:
            text, spans = self.render_tagged(turns, None)
        except RowProblem:  # every row will say so
            return False
        return self.stop is not None and any(text[slice(*span)].rstrip().endswith(self.stop) for span in spans)

    def _markup(self) -> re.Pattern[str] | None:
        """Tags that the template may look for in contents; the turn's own marks are left out."""
        own = {tag for token in self.special_tokens for tag in _MARKUP.findall(token)}
        tags = sorted(set(_MARKUP.findall(self.text)) - own - {self.stop}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tags))) if tags else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of all special tokens, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(texts, key=lambda text: (-len(text), text))


def common_prefix(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
