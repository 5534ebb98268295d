"""Every kind of file, read as rows; and every way in which a file can be broken, as one clear error."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_tools import write_jsonl

from opensloth.data import readers
from opensloth.data.sources import open_source
from opensloth.errors import DataError
from opensloth.opensloth_config import DatasetArgs
from opensloth.source_names import is_hub_name

ROWS = [{"text": "one"}, {"text": "zwei, «drei»"}, {"text": "a\nb"}]


def read(path: Path | str, **args: Any) -> list[dict[str, Any] | None]:
    return [row.values for row in open_source(DatasetArgs(path=str(path), **args)).rows()]


def problems(path: Path) -> list[str]:
    return [f"{row.where.removeprefix(str(path))}: {row.problem}" for row in readers.read_file(path) if row.problem]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data{kind}"
    if kind == ".jsonl":
        write_jsonl(path, ROWS)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerows([["text"], *([row["text"]] for row in ROWS)])
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


KINDS = [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert read(path) == ROWS
    count = open_source(DatasetArgs(path=str(path))).count()
    assert count is None or count >= len(ROWS)


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert read(tmp_path) == ROWS


def test_of_a_folder_with_splits_one_is_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00001.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "test.jsonl", ROWS[1:])
    assert read(tmp_path) == ROWS[:1]
    assert read(tmp_path, split="test") == ROWS[1:]
    assert "reading the split 'train', 1 of 2 files" in open_source(DatasetArgs(path=str(tmp_path))).note


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "both") == ROWS
    assert read(tmp_path / "both", split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'dev'\n  dataset\.split: one of test, train"):
        read(tmp_path / "both", split="dev")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nobody/nothing", True), ("nothing", True), ("größe/daten", True), ("a.b/c-d_e", True),
        ("here/nothing", False), ("here", False), ("-nobody/nothing", False), ("./nothing", False), ("a/b/c", False),
        ("../nothing", False), ("~/nothing", False), ("nobody/a.jsonl", False), ("nobody/a.jsonl.zst", False),
        ("nobody/a.txt", False), ("a.tsv", False), ("", False), ("pvc:a", False),
    ],
)  # fmt: skip
def test_a_hub_name_is_what_no_file_can_be_meant_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    (tmp_path / "here").mkdir()
    assert is_hub_name(text, tmp_path) is expected
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(text, Path()) is expected


def test_pvc_paths_start_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSLO_ROOT", str(tmp_path))
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert read("pvc:x.jsonl") == ROWS
    with pytest.raises(DataError, match=r"y\.jsonl: no such file.*\n  pvc: paths start at the volume's root"):
        read("pvc:y.jsonl")


def test_nulls_that_arrow_adds_are_left_out(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "x": "1"}]}, {"m": [{"role": "user"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert read(path) == [{"text": "a"}, {"text": "b"}]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\na\r\n")
    assert read(path) == [{"text": "a"}]


def test_json_lines_under_the_suffix_json(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.json", ROWS)) == ROWS


def test_a_json_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_JSON_CHUNK", 7)
    rows = [{"text": "é" * n} for n in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path / "a.json") == rows


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', ":2: not JSON: the line ends in the middle of a value"),
        (b'{"text": 1,}', ":2: not JSON: Illegal trailing comma before end of object at column 11"),
        (b"{'text': 1}", ":2: not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[1]", ":2: expected a JSON object, got a list"),
        (b'"a"', ":2: expected a JSON object, got text"),
        (b"3", ":2: expected a JSON object, got a number"),
        (b'{"text": "\xff"}', ":2: not UTF-8: byte 0xff at position 11"),
        (b'{"text": "\0"}', ":2: contains a NUL byte: is this a text file?"),
        (b'{"text": ' + b"[" * 100_000, ":2: nested too deeply"),
    ],
)
def test_lines_that_are_no_rows(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b'\n{"text": "ok"}\n')
    found = problems(path)
    assert len(found) == 1
    if "trailing comma" not in problem:  # Python 3.13 has words of its own for that
        assert found == [problem]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "\ufeff{}".encode("utf-16-le"), "is UTF-16, expected UTF-8"),
        ("a.csv", "\ufeffa".encode("utf-16-be"), "is UTF-16, expected UTF-8"),
        ("a.json", b"[{}, {", "item 2 of the list"),
        ("a.json", b'[{"a": 1} ', "the file ends before the list does"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.json", b'[{"a": ' + b"9" * 5_000 + b"}]", "item 1 of the list: Exceeds the limit"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "item 1 of the list: nested too deeply"),
        ("a.json", b'{\n "a": 1\n}', "a .json file holds a list of objects"),
        ("a.jsonl.gz", b"nonsense", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 9)[:-9], "not a whole gzip file"),
        ("a.csv", b'a,b\n1,"2\n', "not CSV: unexpected end of data"),
        ("a.csv", b"a\n\xff\n", "not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "the column 'a' appears twice"),
        ("a.parquet", b"nonsense", "not a readable Parquet file"),
        ("a.txt", b"x", "no reader for '.txt' files\n  use .jsonl"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(open_source(DatasetArgs(path=str(path))).rows())
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_csv_rows_of_another_width(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1\n\n3,4\n")
    assert problems(path) == [":3: expected 2 fields as in the header, got 1"]


def test_a_huge_line_is_passed_over_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{"text": "' + b"x" * (5 << 20) + b'"}\n{"text": "b"}\n{"text": "' + b"x" * (2 << 20)
    )
    problem = "longer than 1 MiB: is there one JSON object a line?"
    assert problems(path) == [f":2: {problem}", f":4: {problem}"]
    assert [row for row in read(path) if row] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_text_in_a_table_that_is_not_utf8(tmp_path: Path, kind: str) -> None:
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    table = pa.table({"text": text})
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"a\{kind}: not a readable .* file \(.*UTF8"):
        list(readers.read_file(path))


def test_a_column_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texé": ["a"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace("texé".encode(), b"tex\xff\xff"))
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        list(readers.read_file(path))


def test_an_arrow_file_whose_offsets_lead_astray(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["abc"]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"\0\0\0\0\3\0\0\0", b"\0\0\0\0\xff\xff\xff\x7f"))
    with pytest.raises(DataError, match=r"a\.arrow: not a readable Arrow file"):
        list(readers.read_file(path))


@pytest.mark.parametrize("path", ["/no/such/train.jsonl", "train.jsonl", "data/train.jsonl"])
def test_a_missing_file(path: str) -> None:
    with pytest.raises(DataError, match="no such file or folder\n  in a YAML file, a relative path starts"):
        read(path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files in this folder"):
        read(tmp_path)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # HF_HUB_OFFLINE, for a library that read it when it was imported.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="dataset 'nobody/nothing' cannot be loaded from the hub: "):
        read("nobody/nothing")


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return open_source(DatasetArgs(path=str(path))).fingerprint()

    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    before, of_folder = fingerprint(path), fingerprint(tmp_path)
    write_jsonl(path, [*ROWS[:2], {"text": "a\nc"}])
    assert fingerprint(path) != before
    assert fingerprint(tmp_path) != of_folder
    write_jsonl(path, ROWS)
    assert (fingerprint(path), fingerprint(tmp_path)) == (before, of_folder)
