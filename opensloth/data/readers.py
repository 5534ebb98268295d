"""Readers of single files, as streams of rows with bounded memory.

What is wrong with one row becomes a Row with a problem, which the caller may skip; what makes the whole file
unreadable raises DataError at once.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from opensloth.data.rows import TOO_DEEP, Row
from opensloth.errors import DataError

MAX_LINE_BYTES = 64 << 20
"""A longer line is not a training row: most likely the file has no line ends at all."""

_JSON_CHUNK = 1 << 20
_ROW = " row "
_FOREIGN_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one data file, by its suffix.

    Raises DataError when there is no reader for the suffix or the file as a whole is unreadable.
    """
    reader = _READERS.get(data_suffix(path))
    if reader is None:
        raise DataError(f"{path}: no reader for this kind of file", f"known kinds: {', '.join(_READERS)}")
    return reader(path)


def data_suffix(path: Path) -> str:
    """`.jsonl`, `.jsonl.gz`, `.csv` ...: what decides how a file is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def is_data_file(path: Path) -> bool:
    return data_suffix(path) in _READERS


def count_rows(path: Path) -> int | None:
    """About how many rows a file has, where that is cheap to tell; for progress only."""
    suffix = data_suffix(path)
    if suffix in (".parquet", ".arrow"):
        return _count_parquet(path) if suffix == ".parquet" else None
    if suffix not in (".jsonl", ".csv"):
        return None
    with path.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(_JSON_CHUNK), b""))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        yield from _json_lines(stream, str(path))


def _read_jsonl_gz(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path, "rb") as stream:
            yield from _json_lines(stream, str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})", "compress the file again") from error


def _json_lines(stream: BinaryIO | gzip.GzipFile, file: str) -> Iterator[Row]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = _without_bom(line, file)
        if len(line) > MAX_LINE_BYTES:
            yield Row(file, number, None, f"longer than {MAX_LINE_BYTES >> 20} MiB: is there one JSON object a line?")
            while line and not line.endswith(b"\n"):
                line = stream.readline(_JSON_CHUNK)
            continue
        if not line.isspace() and line:
            yield _json_row(line, file, number)


def _json_row(line: bytes, file: str, number: int) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(file, number, None, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
    except ValueError as error:
        return Row(file, number, None, _why_not_json(line, error))
    except RecursionError:
        return Row(file, number, None, TOO_DEEP)
    if not isinstance(values, dict):
        return Row(file, number, None, f"expected a JSON object, got {_kind(values)}")
    return Row(file, number, values)


def _why_not_json(line: bytes, error: ValueError) -> str:
    if b"\0" in line:
        return "contains a NUL byte: is this a text file?"
    if not isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"  # a number with thousands of digits
    if error.pos >= len(line.decode("utf-8").rstrip()):
        return "not JSON: the line ends in the middle of a value"
    return f"not JSON: {error.msg} at column {error.colno}"


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _without_bom(first: bytes, file: str) -> bytes:
    for bom, name in _FOREIGN_BOMS.items():
        if first.startswith(bom):
            raise DataError(f"{file}: is {name}, expected UTF-8", "save the file as UTF-8")
    return first.removeprefix(codecs.BOM_UTF8)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or JSON lines under the wrong suffix."""
    with path.open("rb") as stream:
        head = _without_bom(stream.read(_JSON_CHUNK), str(path)).lstrip()
        stream.seek(0)
        if head.startswith(b"["):
            yield from _json_list(stream, str(path))
        else:
            yield from _json_lines_or_object(stream, str(path))


def _json_lines_or_object(stream: BinaryIO, file: str) -> Iterator[Row]:
    for row in _json_lines(stream, file):
        if row.number == 1 and row.problem:
            hint = "a .json file holds a list of objects, [{...}, {...}], or one object a line"
            raise DataError(f"{row.where}: {row.problem}", hint)
        yield row


def _json_list(stream: BinaryIO, file: str) -> Iterator[Row]:
    """The items of a JSON list, decoded one by one while the file is read."""
    decode, to_text = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")()
    buffer, at, number, ended = "", 0, 0, False

    def fail(problem: str) -> DataError:
        return DataError(f"{file}: item {number + 1} of the list: {problem}", "the file must be valid JSON")

    while True:
        wanted = max(_JSON_CHUNK, len(buffer) - at)  # doubling: an item of n bytes is tried log(n) times
        try:
            chunk = stream.read(wanted)
            buffer, at, ended = buffer[at:] + to_text.decode(chunk, final=not chunk), 0, not chunk
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8: {error.reason}", "save the file as UTF-8") from error
        if number == 0 and at == 0 and buffer.lstrip().startswith("["):
            buffer = buffer.lstrip()[1:]
        while True:
            at = _skip(buffer, at, ", \t\r\n")
            if at < len(buffer) and buffer[at] == "]":
                return
            try:
                value, end = decode(buffer, at)
            except json.JSONDecodeError as error:
                if ended or len(buffer) - at > MAX_LINE_BYTES:
                    raise fail("the file ends before the list does" if at >= len(buffer) else error.msg) from error
                break
            except RecursionError as error:
                raise fail(TOO_DEEP) from error
            except ValueError as error:  # a number with thousands of digits
                raise fail(str(error)) from error
            at, number = end, number + 1
            if isinstance(value, dict):
                yield Row(file, number, value, unit=_ROW)
            else:
                yield Row(file, number, None, f"expected a JSON object, got {_kind(value)}", unit=_ROW)


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open("rb") as raw:
        _without_bom(raw.read(4), str(path))
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, strict=True)
        try:
            yield from _csv_rows(lines, str(path))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 after line {lines.line_num}: {error.reason}", "save the file as UTF-8"
            ) from error
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num}: not CSV: {error}", "are the quotes closed?") from error


def _csv_rows(lines: Any, file: str) -> Iterator[Row]:
    header = next(lines, None)
    if header is None:
        return
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{file}:1: the column {twice[0]!r} appears twice", "give each column its own name")
    for cells in lines:
        if not cells:
            continue
        if len(cells) != len(header):
            problem = f"expected {len(header)} fields as in the header, got {len(cells)}"
            yield Row(file, lines.line_num, None, problem)
        else:
            yield Row(file, lines.line_num, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            yield from _batches(table.iter_batches(batch_size=1024), str(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error


def _count_parquet(path: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return None  # whoever reads the rows says what is wrong


def _read_arrow(path: Path) -> Iterator[Row]:
    """A file of a `save_to_disk` folder: the Arrow stream format."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            yield from _batches(reader, str(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise DataError(f"{path}: not a readable Arrow file ({_first_line(error)})") from error


def _batches(batches: Any, file: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # Arrow follows offsets and lengths of a damaged file wherever they lead
        for begin in range(0, batch.num_rows, 1024):  # a batch of an Arrow file may hold the whole file
            for values in batch.slice(begin, 1024).to_pylist():
                number += 1
                yield Row(file, number, without_nulls(values), unit=_ROW)


def without_nulls(value: Any) -> Any:
    """`value` less the nulls in its objects: Arrow gives every row all the keys that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
