"""YAML text -> plain values with the line of each key, by the core schema of YAML 1.2.

PyYAML reads YAML 1.1: `2e-4` is text there, `no` is false, `1:30` is 90, of two equal keys the last wins in
silence. Here its parser (in C where there is one) only finds the nodes; what they mean is decided below.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from opensloth.errors import Problem

_MAX_NODES: Final = 100_000
"""Aliases of aliases can stand for more values than fit in memory."""

_MAX_DEPTH: Final = 50
"""Composing recurses, in C without a check; a config needs five levels or so."""
_TOO_DEEP: Final = f"more than {_MAX_DEPTH} levels of lists and mappings inside each other"

_MAX_DIGITS: Final = 1_000
"""Of a whole number. Python reads hexadecimal ones of any length, and then cannot print them."""

_TAG: Final = "tag:yaml.org,2002:"
_IMPLICIT: Final = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
    ("float", re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)\Z")),
    ("float", re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")),
]
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_PARSER):  # type: ignore[misc]
    """Finds nodes; None as first character stands for any."""

    yaml_implicit_resolvers = {None: [(_TAG + name, pattern) for name, pattern in _IMPLICIT]}  # noqa: RUF012


@dataclass
class Document:
    """What a text says, and on which line it says it.

    values: a mapping, list or scalar; None for an empty text.
    lines: line (from 1) of each dotted path; the whole text is "".
    """

    values: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    """(line, problem), without `where`."""


def parse(text: str) -> Document:
    """Read one YAML document; problems are collected, never raised."""
    document = Document(lines={"": 1})
    # PyYAML skips a mark at the beginning only when it decodes the bytes itself.
    text = text.removeprefix("\ufeff")
    try:
        text.encode()
    except UnicodeEncodeError:  # an argument whose bytes are not UTF-8
        document.problems.append((1, Problem("", "not UTF-8 text")))
        return document
    try:
        if (line := _line_too_deep(text)) is not None:
            document.problems.append((line, Problem("", _TOO_DEEP)))
            return document
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        line, message = _syntax_error(error, text)
        if "nesting depth" in message:  # libyaml's scanner has a limit of its own, far beyond ours
            message = _TOO_DEEP
        document.problems.append((line, Problem("", message)))
        return document
    if root is not None:
        document.values = _Builder(document).build(root, "")
    return document


def decode(data: bytes) -> str:
    """UTF-8 text.

    Raises ValueError with line and byte when it is not.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8") from error


def _line_too_deep(text: str) -> int | None:
    """The line of the first list or mapping below _MAX_DEPTH others, None when there is none.

    Events come one by one, whereas composing their nodes would exhaust the stack.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                return _line(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return None


class _Builder:
    """Turns nodes into values; notes lines and problems in `document`."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._open: set[int] = set()
        self._count = 0

    def build(self, node: Any, path: str) -> Any:
        self._count += 1
        if id(node) in self._open:
            return self._refuse(node, path, "contains itself through an alias")
        if self._count > _MAX_NODES:
            if self._count == _MAX_NODES + 1:
                self._refuse(node, path, f"more than {_MAX_NODES} values, aliases counted as often as they are used")
            return None
        if len(self._open) > _MAX_DEPTH:  # through aliases
            self._count = _MAX_NODES + 1  # said once, and nothing is read after it
            return self._refuse(node, path, _TOO_DEEP)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, path)
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, path: str) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            inner = f"{path}.{key}" if path else key
            if key in built:
                first = self._document.lines[inner]
                self._refuse(key_node, inner, f"given twice, first on line {first}", "keep one of the two")
                continue
            self._document.lines[inner] = _line(key_node)
            built[key] = self.build(value_node, inner)
        return built

    def _key(self, node: Any, path: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, path, "expected text as a key, got a list or a mapping")
        elif node.tag == _TAG + "str":
            if "\0" in node.value:
                self._refuse(node, path, "a key contains a NUL character")
                return None
            if node.value != "<<":
                return str(node.value)
            self._refuse(node, path, "merge keys (<<) are not part of YAML 1.2", "write the keys out")
        else:
            self._refuse(node, path, f"expected text as a key, got {node.value or 'nothing'}", "put it in quotes")
        return None

    def _sequence(self, node: Any, path: str) -> list[Any]:
        built = []
        for index, item in enumerate(node.value):
            inner = f"{path}[{index}]"
            self._document.lines[inner] = _line(item)
            built.append(self.build(item, inner))
        return built

    def _scalar(self, node: Any, path: str) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            match kind:
                case "str" if "\0" in text:
                    return self._refuse(node, path, "contains a NUL character, which no value may")
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return _integer(text)
                case "float":
                    return _number(text)
        except (ValueError, KeyError):
            return self._refuse(node, path, f"{text!r} cannot be read as {kind}")
        return self._refuse(node, path, f"the tag {_shown_tag(node.tag)} is not supported", "leave it out")

    def _refuse(self, node: Any, path: str, message: str, hint: str = "") -> None:
        self._document.problems.append((_line(node), Problem(path, message, hint)))


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError
    if text.startswith("0o"):
        return int(text[2:], 8)
    return int(text, 16) if text.startswith("0x") else int(text)


def _number(text: str) -> float:
    lower = text.lower()
    if lower.endswith(".nan"):
        return math.nan
    return float(lower.replace(".inf", "inf"))


def _shown_tag(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line of a syntax error, and what it says in our words where PyYAML's are obscure."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"the character U+{ord(_character(error)):04X} is not allowed in YAML"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark else 1
    said = str(getattr(error, "problem", None) or error)
    for pattern, words in _SAYINGS.items():
        if pattern in said:
            return line, words
    return line, f"not valid YAML: {said}"


def _character(error: Any) -> str:
    return error.character if isinstance(error.character, str) else chr(error.character)


_CLOSE: Final = "not valid YAML: a `{` or `[` that is not closed, or a missing comma"
_INDENT: Final = "not valid YAML: the indentation of this line fits no line above it"
_SAYINGS: Final = {
    "cannot start any token": "not valid YAML: a tab or one of @ ` % starts a value: indent by spaces, quote the value",
    "but found another document": "several documents in one file: keep one (what stands after `---`, on its own)",
    "mapping values are not allowed": "not valid YAML: a second `: ` in one line, or a `:` after a line without a key: "
    "quote the value, or check the indentation",
    "could not find expected ':'": "not valid YAML: a key without `:` after it",
    "undefined alias": "not valid YAML: an alias (*name) without its anchor (&name)",
    "expected ',' or": _CLOSE,
    "did not find expected key": _INDENT,
    "expected <block end>": _INDENT,
    "expected <document start>": _INDENT,
    "expected '<document start>'": _INDENT,
}
"""Part of what libyaml or PyYAML says: what to tell a person."""
