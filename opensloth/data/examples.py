"""What a row means once its format is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]
"""role and content (text, or a list of parts); perhaps reasoning_content, tool_calls, name, tool_call_id."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation.

    trained[i]: whether messages[i] may be a target; its writer can say no.
    given: messages at the start that are the prompt, so that what assistants said there is not learned.
    """

    messages: list[Message]
    trained: tuple[bool, ...]
    tools: list[Any] | None = None
    given: int = 0


@dataclass(frozen=True, slots=True)
class Segments:
    """Plain text in pieces, each a target or not.

    closed: the writer spelled out the special tokens; none is added.
    """

    pieces: tuple[tuple[str, bool], ...]
    closed: bool = False

    def all_targets(self) -> Segments:
        """The same text with every piece a target."""
        return replace(self, pieces=tuple((text, True) for text, _ in self.pieces))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Already tokenised, labels as in `documents.Document`."""

    ids: list[int]
    labels: list[int]


Example = Chat | Segments | Tokens
