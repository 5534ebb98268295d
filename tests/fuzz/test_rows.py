"""Whatever stands in a data file: documents fit to train on, rows that are counted as bad, or one DataError."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import SPECIAL, STYLES
from data_tools import make_tokenizer
from fuzz import AMOUNTS, ODD_TEXTS, fuzz, is_one_sentence, mutated_bytes, odd_value

from opensloth.data.documents import IGNORE
from opensloth.data.encode import Encoder
from opensloth.data.prepare import Kept, SourcePreparation, Target
from opensloth.data.sources import open_source
from opensloth.errors import DataError
from opensloth.opensloth_config import DatasetArgs

LONGEST = 1200
SUFFIXES = (*[".jsonl"] * 5, ".json", ".json", ".jsonl.gz", ".csv", ".parquet", ".arrow")
TEXTS = (*ODD_TEXTS, *SPECIAL, "[1, 2]", '{"a": 1}', "1", "İSTANBUL", "ﬁ", "e\u0301")
PLAIN = ("hi", "hello there", " a b ", "x", "\n\nyes\n", "so <|im_end|> it is")
WORDS = tuple(
    word.encode("utf-8", "surrogatepass")
    for word in (
        '"', "{", "}", "[", "]", ",", ":", "\\", "\\u", "\\ud800", "\\udc00", "\\u0000", "\0", "\n", "\r", "\r\n",
        "NaN", "1e999", "-", "9" * 5000, "[" * 3000, '{"a":' * 3000, "null", "true", "\ufeff", '""', "'", ";", "\t",
        *TEXTS,
    )
)  # fmt: skip
PLACES = {"@DEEP@": (40, 400, 900, 3_000, 100_000), "@LONG@": (1_000, 100_000)}
"""Text that stands in a row for what Python could not write: lists inside lists, numbers of many digits."""


@cache
def target() -> Target:
    tokenizer = make_tokenizer()
    return Target(tokenizer, Encoder(tokenizer), len(tokenizer), 64)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_data_files(scratch: Path, amount: int) -> None:
    def case(r: random.Random) -> str:
        kind = r.choice(SUFFIXES)
        path = scratch / f"data{kind}"
        path.write_bytes(file_of(r, kind))
        args = DatasetArgs(
            path=str(path),
            format=r.choice((*["auto"] * 40, *FORMATS)),  # type: ignore[arg-type]
            columns=r.choice((*[{}] * 40, {"prompt": "text"}, {"messages": "conversations"})),
            chat_template=r.choice([*STYLES.values()]),
            train_on=r.choice(("assistant", "last", "all")),
            overlength=r.choice(("drop", "truncate", "truncate", "truncate", "error")),
            bad_rows=r.choice(("error", "skip", "skip", "skip")),
        )
        notes: list[str] = []
        try:
            work = SourcePreparation(args, open_source(args), target(), lambda _, message: notes.append(message))
            kept = list(work.documents())
        except DataError as error:
            assert_says(path, error)
            return "refused"
        for message in notes:
            assert is_one_sentence(message, LONGEST), ascii(message)
        for one in kept:
            assert_fit(one)
        counts = work.counts
        lost = counts.bad + counts.dropped_overlength + counts.no_targets + counts.too_short
        assert (counts.read, counts.kept) == (len(kept) + lost, len(kept))
        return "trained" if kept else "nothing kept"

    outcomes = fuzz("data files", case, amount)
    assert min(outcomes["trained"], outcomes["refused"]) > amount / 10


def assert_says(path: Path, error: DataError) -> None:
    assert is_one_sentence(error.message, LONGEST), ascii(error.message)
    assert not error.hint or is_one_sentence(error.hint, LONGEST), ascii(error.hint)
    assert str(path) in error.message, error.message


def assert_fit(kept: Kept) -> None:
    ids, labels = kept.document
    assert ids.dtype == labels.dtype == np.int32
    assert 2 <= len(ids) == len(labels) <= target().max_length
    assert 0 <= ids.min() <= ids.max() < target().vocabulary
    assert kept.targets == (labels[1:] != IGNORE).sum() > 0
    assert kept.row.values is not None


# --- files ----------------------------------------------------------------------------------------


def file_of(r: random.Random, kind: str) -> bytes:
    make = r.choice([*FORMATS.values()])
    rows = [make(r) for _ in range(r.choice((1, 1, 2, 4)))]
    rows += [copy.deepcopy(rows[-1]) for _ in range(r.randrange(2))]
    for _ in range(r.choice((0, 1, 1, 2, 4))):
        index = r.randrange(len(rows))
        rows[index] = mutated(r, rows[index])
    data = written(r, rows, kind)
    if r.random() < 0.25:
        data = mutated_bytes(r, data, WORDS)
    if r.random() < 0.01:
        data = data.decode("utf-8", "replace").encode(r.choice(("utf-16", "utf-32", "latin-1")), "replace")
    return data


def written(r: random.Random, rows: list[Any], kind: str) -> bytes:
    if kind in (".parquet", ".arrow"):
        return _arrow(rows, kind)
    texts = [_filled(r, json.dumps(row, ensure_ascii=r.random() < 0.7)) for row in rows]
    if kind == ".json":
        listed = f"[{', '.join(texts)}]"
        text = r.choice((*[listed] * 12, texts[0], "\n".join(texts), "{", "[]", "null"))
    elif kind == ".csv":
        text = _csv(rows)
    else:
        text = r.choice(("\n", "\n", "\n", "\r\n", "\n\n", "\r")).join(texts) + r.choice(("", "\n"))
    data = text.encode("utf-8", "surrogatepass")
    return gzip.compress(data, 1) if kind == ".jsonl.gz" else data


def _filled(r: random.Random, text: str) -> str:
    for place, lengths in PLACES.items():
        if place in text:
            n = r.choice(lengths)
            text = text.replace(f'"{place}"', "[" * n + "]" * n if place == "@DEEP@" else "7" * n)
    return text


def _csv(rows: list[Any]) -> str:
    columns = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)) or ["text"]
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column) if isinstance(row, dict) else row for column in columns]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return stream.getvalue()


def _arrow(rows: list[Any], kind: str) -> bytes:
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        stream = io.BytesIO()
        if kind == ".parquet":
            pq.write_table(table, stream)
        else:
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        return json.dumps(rows).encode()  # what Arrow has no type for
    return stream.getvalue()


# --- rows -----------------------------------------------------------------------------------------


def text(r: random.Random) -> str:
    return "".join(r.choice(r.choice((PLAIN, TEXTS))) for _ in range(r.choice((1, 1, 1, 2, 3))))


def _turns(r: random.Random, role: str = "role", content: str = "content") -> list[Any]:
    names = {"user": r.choice(("user", "human")), "assistant": r.choice(("assistant", "gpt"))}
    turns: list[Any] = []
    if r.random() < 0.3:
        turns.append({role: "system", content: text(r)})
    for i in range(r.choice((1, 2, 2, 3, 4))):
        turn: dict[str, Any] = {role: names[("user", "assistant")[i % 2]], content: text(r)}
        if i % 2 and r.random() < 0.3:
            turn[r.choice(("reasoning_content", "thinking", "reasoning"))] = text(r)
        if i % 2 and r.random() < 0.3:
            call: dict[str, Any] = {"name": text(r), "arguments": r.choice(({"a": text(r)}, {}, "{}", text(r), [1]))}
            turn["tool_calls"] = [call if r.random() < 0.5 else {"type": "function", "id": "1", "function": call}]
        if r.random() < 0.1:
            turn[r.choice(("train", "weight"))] = r.choice((True, False, 0, 1, 0.5, "x"))
        turns.append(turn)
    return turns


def _messages(r: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": _turns(r)}
    if r.random() < 0.3:
        row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"x": text(r)}}}]
    return row


def _sharegpt(r: random.Random) -> dict[str, Any]:
    return {"conversations": _turns(r, "from", "value"), "system": r.choice((None, text(r)))}


def _prompt_completion(r: random.Random) -> dict[str, Any]:
    return {
        "prompt": r.choice((text(r), _turns(r)[:1])),
        "completion": r.choice((text(r), [{"role": "assistant", "content": text(r)}])),
    }


def _tokenized(r: random.Random) -> dict[str, Any]:
    ids = [r.randrange(300) for _ in range(r.choice((0, 1, 2, 5, 100)))]
    return {"input_ids": ids, "labels": [r.choice((-100, i)) for i in ids]}


def _segments(r: random.Random) -> dict[str, Any]:
    return {"segments": [{"label": r.random() < 0.5, "text": text(r)} for _ in range(r.randrange(4))]}


FORMATS: dict[str, Any] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": lambda r: {"instruction": text(r), "input": text(r), "output": text(r), "system": text(r)},
    "prompt_completion": _prompt_completion,
    "input_output": _segments,
    "text": lambda r: {"text": text(r)},
    "tokenized": _tokenized,
}


def mutated(r: random.Random, row: Any) -> Any:
    """`row` with one place changed: another value, a key less or more, JSON as text, or a value in a list."""
    places = list(_places(row, None, None))
    container, key = r.choice(places)
    if container is None:
        return r.choice((odd_value(r), row, {"text": row}, [row]))
    value = container[key]
    match r.randrange(9):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, dict):
            container[r.choice((*ODD_TEXTS, f"{key}s"))] = container.pop(key)
        case 2:
            container[key] = json.dumps(value)
        case 3:
            container[key] = [value] if r.random() < 0.5 else {"type": "text", "text": value}
        case 4:
            container[key] = text(r) * r.choice((1, 1, 10, 1000))
        case 5:
            container[key] = r.choice(tuple(PLACES))
        case _:
            container[key] = odd_value(r)
    return row


def _places(value: Any, container: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    yield container, key
    if isinstance(value, dict | list):
        for inner, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _places(item, value, inner)
