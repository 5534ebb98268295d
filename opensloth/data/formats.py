"""The formats of rows: how to tell them apart, and how to parse each into an example."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from opensloth.data.examples import Example, Segments, Tokens
from opensloth.data.messages import chat_from, text_of
from opensloth.data.rows import TOO_DEEP, Row, RowProblem
from opensloth.errors import DataError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """required, optional: columns under the format's own names."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Values, bool], Example]
    """(columns, whether there is a chat template) -> example; raises RowProblem."""
    needs_template: bool = True


def _messages(values: Values, _: bool) -> Example:
    return chat_from(values["messages"], values.get("tools"))


def _sharegpt(values: Values, _: bool) -> Example:
    return chat_from(values["conversations"], values.get("tools"), values.get("system"))


def _alpaca(values: Values, _: bool) -> Example:
    instruction, context = text_of(values["instruction"], "instruction"), values.get("input")
    if context:
        instruction = f"{instruction}\n\n{text_of(context, 'input')}"
    answer = text_of(values["output"], "output")
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
    return chat_from(turns, None, values.get("system"))


def _prompt_completion(values: Values, has_template: bool) -> Example:
    """Lists of messages, or texts: one turn each where there is a template, else plain text end to end."""
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not has_template:
            return Segments(((prompt, False), (completion, True)))
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    elif isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise RowProblem("'prompt' and 'completion' must be texts or lists of messages")
    chat = chat_from([*prompt, *completion], values.get("tools"))
    if len(chat.messages) != len(prompt) + len(completion):
        raise RowProblem("'completion' is empty")
    return replace(chat, given=len(prompt))


def _input_output(values: Values, _: bool) -> Example:
    segments = values["segments"]
    if not isinstance(segments, list) or not segments:
        raise RowProblem("'segments' must be a list of {label, text}")
    pieces = []
    for i, segment in enumerate(segments):
        if not isinstance(segment, dict) or not isinstance(segment.get("label"), bool):
            raise RowProblem(f"segments[{i}] must have a 'label' that is true or false, and a 'text'")
        pieces.append((text_of(segment.get("text"), f"segments[{i}].text"), segment["label"]))
    return Segments(tuple(pieces), closed=True)


def _text(values: Values, _: bool) -> Example:
    return Segments(((text_of(values["text"], "text"), True),))


def _tokenized(values: Values, _: bool) -> Example:
    ids, labels = values["input_ids"], values["labels"]
    for name, column in (("input_ids", ids), ("labels", labels)):
        if not isinstance(column, list) or not all(type(item) is int for item in column):
            raise RowProblem(f"'{name}' must be a list of whole numbers")
    if len(ids) != len(labels):
        raise RowProblem(f"'input_ids' has {len(ids)} items, 'labels' has {len(labels)}: they must be equally long")
    return Tokens(ids, labels)


FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        # In the order in which they are tried.
        Format("tokenized", ("input_ids", "labels"), (), _tokenized, needs_template=False),
        Format("messages", ("messages",), ("tools",), _messages),
        Format("sharegpt", ("conversations",), ("tools", "system"), _sharegpt),
        Format("prompt_completion", ("prompt", "completion"), ("tools",), _prompt_completion, needs_template=False),
        Format("alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
        Format("input_output", ("segments",), (), _input_output, needs_template=False),
        Format("text", ("text",), (), _text, needs_template=False),
    )
}


@dataclass(frozen=True)
class Parser:
    """Turns the rows of one source into examples.

    columns: the format's column -> the source's column.
    """

    format: Format
    columns: dict[str, str]
    has_template: bool

    def parse(self, values: Values) -> Example:
        """Raises RowProblem when the row does not have the format's shape."""
        taken = {}
        for own, theirs in self.columns.items():
            value = values.get(theirs)
            if value is not None:
                taken[own] = value
            elif own in self.format.required:
                raise RowProblem(f"column '{theirs}' is {'null' if theirs in values else 'missing'}")
        try:
            return self.format.parse(taken, self.has_template)
        except RowProblem as problem:
            raise RowProblem(self._in_their_words(str(problem))) from None
        except RecursionError:
            raise RowProblem(TOO_DEEP) from None

    def _in_their_words(self, problem: str) -> str:
        for own, theirs in self.columns.items():
            if own != theirs and f"'{own}'" in problem:
                problem = problem.replace(f"'{own}'", f"'{theirs}'")
        return problem


def parser_for(
    first_rows: Iterable[Row], *, name: str, wanted: str, columns: Mapping[str, str], has_template: bool
) -> Parser:
    """Choose the format of a source from its first rows.

    name: the source, for messages. wanted: a format's name, or `auto`. columns: DatasetArgs.columns.
    Raises DataError with the columns found when nothing fits.
    """
    found = _columns_of(first_rows)
    _check_mapping(columns, found, name, wanted)
    renamed = {theirs: own for own, theirs in columns.items()}
    own_names = [renamed.get(column, column) for column in found]
    chosen = FORMATS[wanted] if wanted != "auto" else _detect(own_names, found, name)
    missing = [column for column in chosen.required if column not in own_names]
    if missing:
        raise DataError(
            f"{name}: format '{chosen.name}' needs the column '{missing[0]}'; columns found: {_listed(found)}",
            _mapping_hint(missing[0], found),
        )
    if chosen.needs_template and not has_template:
        raise DataError(
            f"{name}: format '{chosen.name}' needs a chat template, and the tokenizer has none",
            "add dataset.chat_template: chatml, a .jinja file, or a template's text",
        )
    used = {own: columns.get(own, own) for own in (*chosen.required, *chosen.optional)}
    unused = sorted(set(columns) - set(used))
    if unused:
        raise DataError(
            f"{name}: columns.{unused[0]} has no meaning in format '{chosen.name}'",
            f"its columns: {', '.join((*chosen.required, *chosen.optional))}",
        )
    return Parser(chosen, used, has_template)


def _columns_of(rows: Iterable[Row]) -> list[str]:
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(row.values or ())
    return list(found)


def _detect(own_names: list[str], found: list[str], name: str) -> Format:
    for candidate in FORMATS.values():
        if all(column in own_names for column in candidate.required):
            return candidate
    example = [*found, "...", "..."][:2]
    raise DataError(
        f"{name}: no known format has these columns: {_listed(found)}",
        f"name yours, for example dataset.columns: {{prompt: {example[0]}, completion: {example[1]}}}",
    )


def _check_mapping(columns: Mapping[str, str], found: list[str], name: str, wanted: str) -> None:
    known = sorted({column for f in FORMATS.values() for column in (*f.required, *f.optional)})
    for own, theirs in columns.items():
        if own not in known:
            near = difflib.get_close_matches(own, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise DataError(f"{name}: columns.{own} is not a column of any format", hint)
        if theirs not in found:
            near = difflib.get_close_matches(theirs, found, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"columns found: {_listed(found)}"
            raise DataError(f"{name}: columns.{own} names '{theirs}', which is not in the data", hint)


def _mapping_hint(missing: str, found: list[str]) -> str:
    near = difflib.get_close_matches(missing, found, n=1, cutoff=0.5)
    example = near[0] if near else "YOUR_COLUMN"
    return f"map it: dataset.columns: {{{missing}: {example}}}"


def _listed(columns: list[str]) -> str:
    return ", ".join(columns) if columns else "none"
