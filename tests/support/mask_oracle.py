"""What each chat template shows of a conversation, and which of it an assistant said: written by hand, in Python.

Nothing here looks at a template or at the code that is tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import chat_templates as templates

Message = dict[str, Any]


class Piece(NamedTuple):
    """A stretch of the rendered text. said_by: the number of the assistant's message that it is all of, stop included;
    None: nobody has to produce it."""

    text: str
    said_by: int | None = None


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
"""What every conversation with tools has."""

Oracle = Callable[[Sequence[Message]], Iterator[Piece]]


def chatml(messages: Sequence[Message], change: Callable[[str], str] = str) -> Iterator[Piece]:
    for i, message in enumerate(messages):
        yield Piece(f"<|im_start|>{message['role']}\n")
        content = change(message["content"]) + "<|im_end|>"
        yield Piece(content, i if message["role"] == "assistant" else None)
        yield Piece("\n")


def llama3(messages: Sequence[Message]) -> Iterator[Piece]:
    yield Piece("<s>")
    for i, message in enumerate(messages):
        yield Piece(f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n")
        yield Piece(message["content"].strip() + "<|eot_id|>", i if message["role"] == "assistant" else None)


def llama3_1(messages: Sequence[Message], *, has_tools: bool = False) -> Iterator[Piece]:
    """Where there are tools, the system message is among what stands before. What is said beside a call is hidden."""
    yield Piece("" if has_tools else "<s>")
    for i, message in enumerate(messages):
        role = message["role"]
        if has_tools and role == "system":
            continue
        yield Piece(f"<|start_header_id|>{'ipython' if role == 'tool' else role}<|end_header_id|>\n\n")
        if "tool_calls" in message:
            (call,) = _json_calls(message, "parameters")
            yield Piece(call + "<|eot_id|>", i)
        elif role == "tool":
            yield Piece(json.dumps(message["content"], ensure_ascii=False) + "<|eot_id|>")
        else:
            yield Piece(message["content"].strip() + "<|eot_id|>", i if role == "assistant" else None)


def gemma(messages: Sequence[Message]) -> Iterator[Piece]:
    yield Piece("<s>")
    lead = ""
    for i, message in enumerate(messages):
        if message["role"] == "system":
            lead = message["content"] + "\n\n"
        elif message["role"] == "user":
            yield Piece(f"<start_of_turn>user\n{lead}{message['content'].strip()}<end_of_turn>\n")
            lead = ""
        else:
            yield Piece("<start_of_turn>model\n")
            yield Piece(message["content"].strip() + "<end_of_turn>", i)
            yield Piece("\n")


def mistral(messages: Sequence[Message], *, has_tools: bool = False) -> Iterator[Piece]:
    """What is said beside a call is hidden."""
    yield Piece("<s>")
    has_system = messages[0]["role"] == "system"
    last_question = max(i for i, message in enumerate(messages) if message["role"] == "user")
    for i, message in enumerate(messages):
        if message["role"] == "user":
            lead = messages[0]["content"] + "\n\n" if has_system and i == last_question else ""
            if has_tools and i == last_question:
                yield Piece(f"[AVAILABLE_TOOLS] {json.dumps(TOOLS)}[/AVAILABLE_TOOLS]")
            yield Piece(f"[INST] {lead}{message['content']} [/INST]")
        elif "tool_calls" in message:
            yield Piece(f"[TOOL_CALLS] [{', '.join(_json_calls(message, 'arguments'))}]</s>", i)
        elif message["role"] == "tool":
            yield Piece(f'[TOOL_RESULTS] {{"content": {message["content"]}}}[/TOOL_RESULTS]')
        elif message["role"] == "assistant":
            yield Piece(f" {message['content'].strip()}</s>", i)


def closing(messages: Sequence[Message]) -> Iterator[Piece]:
    for i, message in enumerate(messages):
        yield Piece(f"<|{message['role']}|>\n")
        yield Piece(message["content"] + "<|end|>", i if message["role"] == "assistant" else None)
        yield Piece("\n")
    yield Piece("</s>")


def headings(messages: Sequence[Message]) -> Iterator[Piece]:
    """White space at the end of an answer cannot be told from the template's own."""
    for i, message in enumerate(messages):
        yield Piece(f"### {message['role']}:\n")
        content = message["content"]
        if message["role"] == "assistant":
            said = content.rstrip() or content
            yield Piece(said, i)
            content = content[len(said) :]
        yield Piece(f"{content}\n\n")


def reasoner(messages: Sequence[Message]) -> Iterator[Piece]:
    """The prompt opens the reasoning, so that its mark is not learned; of old turns only what comes after is shown."""
    yield Piece("<s>")
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "assistant":
            yield Piece(f"<|User|>{content}")
            continue
        if i < len(messages) - 1:
            content = content.split("</think>")[-1]
        opened = re.match(r"<think>(?:\n|\Z|(?!\s|</?think>))", content)
        given = opened.group() if opened else ""
        yield Piece(f"<|Assistant|>{given}")
        yield Piece(content.removeprefix(given) + "<|end|>", i)


def qwen3(messages: Sequence[Message], *, has_tools: bool = False) -> Iterator[Piece]:
    """Where there are tools, the system message is among what stands before."""
    questions = [i for i, m in enumerate(messages) if m["role"] == "user" and not _is_tools_answer(m["content"])]
    last = questions[-1] if questions else len(messages) - 1
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            yield Piece("<|im_start|>assistant\n")
            content, reasoning = _reasoning_of(message)
            if i > last and (i == len(messages) - 1 or reasoning):
                thought = reasoning.strip("\n")
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
            yield Piece(content + _calls(message, bool(_reasoning_of(message)[0])) + "<|im_end|>", i)
            yield Piece("\n")
        elif role == "tool":
            opens = i == 0 or messages[i - 1]["role"] != "tool"
            closes = i == len(messages) - 1 or messages[i + 1]["role"] != "tool"
            yield Piece("<|im_start|>user" if opens else "")
            yield Piece(f"\n<tool_response>\n{message['content']}\n</tool_response>" + "<|im_end|>\n" * closes)
        elif not (has_tools and role == "system"):
            yield Piece(f"<|im_start|>{role}\n{message['content']}<|im_end|>\n")


def qwen2_5(messages: Sequence[Message], *, has_tools: bool = False) -> Iterator[Piece]:
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "assistant" and message.get("tool_calls"):
            yield Piece("<|im_start|>assistant\n")
            yield Piece(content + _calls(message, bool(content)) + "<|im_end|>", i)
            yield Piece("\n")
        elif role == "tool":
            yield from qwen3([message] if _alone(messages, i) else [], has_tools=True)
        elif not (has_tools and role == "system"):
            yield Piece(f"<|im_start|>{role}\n")
            yield Piece(f"{content}<|im_end|>", i if role == "assistant" else None)
            yield Piece("\n")


def _alone(messages: Sequence[Message], i: int) -> bool:
    """These conversations have one answer of a tool at a time under this template."""
    assert messages[i - 1]["role"] != "tool"
    return True


def _is_tools_answer(content: str) -> bool:
    return content.startswith("<tool_response>") and content.endswith("</tool_response>")


def _reasoning_of(message: Message) -> tuple[str, str]:
    content = message["content"]
    if isinstance(message.get("reasoning_content"), str):
        return content, message["reasoning_content"]
    if "</think>" not in content:
        return content, ""
    reasoning = content.split("</think>")[0].split("<think>")[-1].strip("\n")
    return content.split("</think>")[-1].lstrip("\n"), reasoning


def _calls(message: Message, after_text: bool) -> str:
    shown = [f"<tool_call>\n{call}\n</tool_call>" for call in _json_calls(message, "arguments")]
    return ("\n" if after_text and shown else "") + "\n".join(shown)


def _json_calls(message: Message, key: str) -> list[str]:
    """Each call as a JSON object, its arguments under `key`."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [
        f'{{"name": "{function["name"]}", "{key}": {json.dumps(function["arguments"], ensure_ascii=False)}}}'
        for function in functions
    ]


def _published(name: str) -> str:
    """A model's own template, as TRL has it."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


class Style(NamedTuple):
    """template: its text. oracle: what it shows, but for what stands before the first message (tools, say).

    calls: how many of tools a message may hold. markup: what in a content the template itself looks for, so that a
    mask may be uncertain.
    """

    template: str
    oracle: Oracle
    calls: int = 0
    reasons: bool = False
    has_system: bool = True
    markup: str | None = None


_THINKING = r"</?think>|</?tool_response>|</?tool_call>|</?tools>"

STYLES: dict[str, Style] = {
    "chatml": Style(templates.CHATML, chatml),
    "chatml_tagged": Style(templates.CHATML_TAGGED, chatml),
    "chatml_tagged_with_stop": Style(templates.CHATML_TAGGED_WITH_STOP, chatml),
    "llama3": Style(templates.LLAMA3, llama3),
    "llama3.1": Style(templates.LLAMA3_1, llama3_1, calls=1),
    "gemma": Style(templates.GEMMA, gemma),
    "mistral": Style(templates.MISTRAL, mistral),
    "mistral_tools": Style(templates.MISTRAL_TOOLS, mistral, calls=2),
    "qwen3": Style(templates.QWEN3, qwen3, calls=2, reasons=True, markup=_THINKING),
    "reasoner": Style(templates.REASONER, reasoner, reasons=True, markup=_THINKING),
    "closing": Style(templates.CLOSING, closing),
    "headings": Style(templates.HEADINGS, headings),
    "shouting": Style(templates.SHOUTING, lambda messages: chatml(messages, str.upper)),
    "published llama3": Style(_published("llama3"), llama3),
    "published gemma": Style(_published("gemma"), gemma, has_system=False),
    "published qwen2.5": Style(_published("qwen2_5"), qwen2_5, calls=2, markup=_THINKING),
    "published qwen3": Style(_published("qwen3"), qwen3, calls=2, reasons=True, markup=_THINKING),
}


def has_markup(style: Style, messages: Sequence[Message]) -> bool:
    """Whether somebody typed what the template looks for, apart from reasoning in its usual form."""
    if style.markup is None:
        return False
    texts = [message["content"] for message in messages] + [m.get("reasoning_content", "") for m in messages]
    return any(re.search(style.markup, re.sub(r"\A<think>\n[^<>]*\n</think>\n\n", "", text)) for text in texts)
