"""Messages, put into one shape: the roles and keys that chat templates know."""

from __future__ import annotations

import json
from typing import Any

from opensloth.data.examples import Chat, Message
from opensloth.data.rows import RowProblem

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_KEPT = ("name", "tool_call_id")


def chat_from(turns: object, tools: object = None, system: object = None) -> Chat:
    """Check and normalise a conversation.

    turns: list of {role, content} or {from, value}. tools: list of schemas, or that as JSON text.
    Raises RowProblem.
    """
    turns = _json_or_same(turns)
    if not isinstance(turns, list):
        raise RowProblem(f"expected a list of messages, got {type(turns).__name__}")
    if not turns:
        raise RowProblem("the list of messages is empty")
    messages = [_message(turn, i) for i, turn in enumerate(turns)]
    trained = [_is_trained(turn, i) for i, turn in enumerate(turns)]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_of(system, "system")})
        trained.insert(0, True)
    return Chat(messages, tuple(trained), _tools(tools))


def text_of(value: object, name: str) -> str:
    """Raises RowProblem unless `value` is text."""
    if not isinstance(value, str):
        raise RowProblem(f"'{name}' must be text, got {type(value).__name__}")
    return value


def _message(turn: object, i: int) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(f"message {i} must have a role and a content, got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise RowProblem(f"message {i} has no role; keys found: {', '.join(map(str, turn)) or 'none'}")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowProblem(f"message {i} has the role {role!r}; known: {', '.join(_ROLES)}")
    message: Message = {"role": _ROLES[role], "content": _content(turn, i)}
    for key in _KEPT:
        if turn.get(key) is not None:
            message[key] = turn[key]
    if reasoning := turn.get("reasoning_content") or turn.get("thinking") or turn.get("reasoning"):
        message["reasoning_content"] = text_of(reasoning, f"messages[{i}].reasoning_content")
    calls = _json_or_same(turn.get("tool_calls"))
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RowProblem(f"message {i}: 'tool_calls' must be a list of calls")
        message["tool_calls"] = [_tool_call(call, i) for call in calls]
    return message


def _content(turn: dict[str, Any], i: int) -> Any:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        return content
    if content is None:
        if any(turn.get(key) for key in ("tool_calls", "reasoning_content", "thinking", "reasoning")):
            return ""  # what templates can join; null is what OpenAI's format has beside tool calls
        raise RowProblem(f"message {i} has no content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise RowProblem(f"message {i} has content other than text, which this version does not train on")
    raise RowProblem(f"message {i}: content must be text, got {type(content).__name__}")


def _tool_call(call: dict[str, Any], i: int) -> dict[str, Any]:
    """{"type", "function": {"name", "arguments": object}}, the shape that templates expect."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(f"message {i}: a tool call needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise RowProblem(f"message {i}: the arguments of the call of {function['name']} are not JSON") from None
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    function = {"name": function["name"], "arguments": arguments or {}}
    return kept | {"type": "function", "function": function}


def _tools(tools: object) -> list[Any] | None:
    tools = _json_or_same(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem("'tools' must be a list of schemas")
    return tools


def _is_trained(turn: dict[str, Any], i: int) -> bool:
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowProblem(f"message {i}: 'train' must be true or false, got {train!r}")
    if weight is not None and weight not in (0, 1):
        raise RowProblem(f"message {i}: 'weight' must be 0 or 1, got {weight!r}")
    return train is not False and weight != 0


def _json_or_same(value: object) -> object:
    """CSV files and some data sets keep lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
