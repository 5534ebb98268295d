"""Rows of every format, and the message for rows and columns that fit none."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import CHATML
from data_tools import chat, make_tokenizer

from opensloth.data.examples import Chat, Segments, Tokens
from opensloth.data.formats import Parser, parser_for
from opensloth.data.rows import Row, RowProblem
from opensloth.data.template import ChatTemplate
from opensloth.data.turns import Turns
from opensloth.errors import DataError

MESSAGES = chat("hi", "hello")


def parser(row: dict[str, Any], *, wanted: str = "auto", columns: Any = None, has_template: bool = True) -> Parser:
    return parser_for([Row("f", 1, row)], name="f", wanted=wanted, columns=columns or {}, has_template=has_template)


def parse(row: dict[str, Any], **options: Any) -> Any:
    return parser(row, **options).parse(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": MESSAGES}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "sharegpt"),
        ({"conversations": MESSAGES}, "sharegpt"),
        ({"prompt": "hi", "completion": "hello"}, "prompt_completion"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt_completion"),
        ({"prompt": "hi", "completion": MESSAGES[1:]}, "prompt_completion"),
        ({"prompt": MESSAGES[:1], "completion": "hello"}, "prompt_completion"),
        ({"instruction": "hi", "output": "hello"}, "alpaca"),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca"),
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, MESSAGES[1]]}, "messages"),
    ],
)
def test_one_conversation_in_every_format(row: dict[str, Any], name: str) -> None:
    assert parser(row).format.name == name
    example = parse(row)
    assert isinstance(example, Chat)
    assert example.messages == MESSAGES


def test_alpaca_with_input_and_system() -> None:
    example = parse({"instruction": "Add.", "input": "1 2", "output": "3", "system": "be brief"})
    assert example.messages == chat("Add.\n\n1 2", "3", system="be brief")


def test_a_system_column_does_not_replace_a_system_message() -> None:
    example = parse({"conversations": chat("a", "b", system="one"), "system": "two"})
    assert example.messages == chat("a", "b", system="one")


def test_texts_without_a_template_are_plain_text() -> None:
    row = {"prompt": "1+1=", "completion": "2"}
    assert parse(row, has_template=False) == Segments((("1+1=", False), ("2", True)))


def test_only_the_completion_is_learned() -> None:
    row = {"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    example = parse(row)
    assert example.given == 3
    tokenizer = make_tokenizer()
    text, spans = Turns(ChatTemplate(tokenizer, CHATML), "assistant").render(example)
    assert [text[begin:end] for begin, end in spans] == ["d<|im_end|>"]


def test_flags_tools_and_reasoning() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call], "train": False},
            {"role": "function", "content": "1", "name": "f"},
            {"role": "assistant", "content": "b", "thinking": "hm", "weight": 0},
            {"role": "assistant", "content": "c", "weight": 1.0, "train": True},
        ],
        "tools": '[{"name": "f"}]',
    }
    example = parse(row)
    assert example.trained == (True, False, True, False, True)
    assert example.tools == [{"name": "f"}]
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert example.messages[1]["content"] == ""
    assert example.messages[2] == {"role": "tool", "content": "1", "name": "f"}
    assert example.messages[3]["reasoning_content"] == "hm"


def test_formats_without_template() -> None:
    segments = [{"label": False, "text": "a"}, {"label": True, "text": "b"}]
    assert parse({"segments": segments}) == Segments((("a", False), ("b", True)), closed=True)
    assert parse({"text": "a"}) == Segments((("a", True),))
    assert parse({"input_ids": [1, 2], "labels": [-100, 2], "text": "x"}) == Tokens([1, 2], [-100, 2])


def test_columns_are_mapped_and_named_in_messages() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    assert parse({"question": "hi", "answer": "hello"}, columns=columns).messages == MESSAGES
    with pytest.raises(RowProblem, match="column 'answer' is missing"):
        parser({"question": "hi", "answer": "x"}, columns=columns).parse({"question": "hi"})
    with pytest.raises(RowProblem, match="'question' and 'answer' must be texts"):
        parse({"question": 1, "answer": "x"}, columns=columns)


def test_a_mapping_decides_between_formats() -> None:
    row = {"text": "a", "prompt": "b", "answer": "c"}
    assert parser(row).format.name == "text"
    assert parser(row, columns={"completion": "answer"}).format.name == "prompt_completion"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            {},
            "f: no known format has these columns: question, answer\n"
            "  name yours, for example dataset.columns: {prompt: question, completion: answer}",
        ),
        (
            {"a": 1},
            {"wanted": "messages"},
            "f: format 'messages' needs the column 'messages'; columns found: a\n"
            "  map it: dataset.columns: {messages: YOUR_COLUMN}",
        ),
        (
            {"message": []},
            {"wanted": "messages"},
            "f: format 'messages' needs the column 'messages'; columns found: message\n"
            "  map it: dataset.columns: {messages: message}",
        ),
        (
            {"question": "a"},
            {"columns": {"promt": "question"}},
            "f: columns.promt is not a column of any format\n  did you mean prompt?",
        ),
        (
            {"question": "a"},
            {"columns": {"prompt": "questoin"}},
            "f: columns.prompt names 'questoin', which is not in the data\n  did you mean question?",
        ),
        (
            {"messages": [], "question": ""},
            {"columns": {"prompt": "question"}},
            "f: columns.prompt has no meaning in format 'messages'\n  its columns: messages, tools",
        ),
        (
            {"messages": []},
            {"has_template": False},
            "f: format 'messages' needs a chat template, and the tokenizer has none\n"
            "  add dataset.chat_template: chatml, a .jinja file, or a template's text",
        ),
    ],
)
def test_columns_that_fit_no_format(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        parser(row, **options)
    assert str(caught.value) == message


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "the list of messages is empty"),
        ({"messages": "hello"}, "expected a list of messages, got str"),
        ({"messages": ["hello"]}, "message 0 must have a role and a content, got str"),
        ({"messages": [{"content": "a"}]}, "message 0 has no role; keys found: content"),
        ({"messages": [USER, {"role": "robot", "content": "a"}]}, "message 1 has the role 'robot'; known: system"),
        ({"messages": [{"role": "user"}]}, "message 0 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0: content must be text, got int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 0 has content other than text, which this version does not train on",
        ),
        ({"messages": [{**USER, "train": "no"}]}, "message 0: 'train' must be true or false, got 'no'"),
        ({"messages": [{**USER, "weight": 0.5}]}, "message 0: 'weight' must be 0 or 1, got 0.5"),
        ({"messages": [{**USER, "tool_calls": "x"}]}, "message 0: 'tool_calls' must be a list of calls"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "message 0: a tool call needs a function with a name"),
        (
            {"messages": [{**USER, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "message 0: the arguments of the call of f are not JSON",
        ),
        ({"messages": [USER], "tools": "x"}, "'tools' must be a list of schemas"),
        ({"messages": None, "x": 1}, "column 'messages' is null"),
        ({"prompt": "a", "completion": 1}, "'prompt' and 'completion' must be texts or lists of messages"),
        ({"instruction": 1, "output": "b"}, "'instruction' must be text, got int"),
        ({"text": ["a"]}, "'text' must be text, got list"),
        ({"segments": []}, "'segments' must be a list of {label, text}"),
        ({"segments": [{"text": "a"}]}, "segments[0] must have a 'label' that is true or false, and a 'text'"),
        ({"segments": [{"label": True}]}, "'segments[0].text' must be text, got NoneType"),
        ({"input_ids": [1], "labels": [1, 2]}, "'input_ids' has 1 items, 'labels' has 2: they must be equally long"),
        ({"input_ids": [1.5], "labels": [1]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": [True], "labels": [1]}, "'input_ids' must be a list of whole numbers"),
    ],
)
def test_rows_that_do_not_fit(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowProblem) as caught:
        parse(row)
    assert str(caught.value).startswith(message)
