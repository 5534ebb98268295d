"""Files on volumes that are no local disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from opensloth.errors import StopRequested
from opensloth.events import Events
from opensloth.files import create_json, read_json, write_json
from opensloth.orders import Orders


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "beat.json", {"beat": 7})
    read, stale = Path.read_bytes, iter([OSError(errno.ESTALE, os.strerror(errno.ESTALE))])

    def read_bytes(path: Path) -> bytes:
        if error := next(stale, None):
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert read_json(tmp_path / "beat.json") == {"beat": 7}


def test_the_first_to_create_wins_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert create_json(tmp_path / "stop.json", {"cause": "terminated"})
    assert not create_json(tmp_path / "stop.json", {"cause": "cancelled"})
    assert read_json(tmp_path / "stop.json") == {"cause": "terminated"}
    assert os.listdir(tmp_path) == ["stop.json"]


def test_the_fence_asks_for_the_folder_and_not_for_a_name_that_may_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as NFS remembers what was not there
    with pytest.raises(StopRequested):
        Orders(tmp_path / "1").fence()
    Orders(tmp_path / "2").fence()


def test_an_event_that_was_torn_swallows_none_that_follows(tmp_path: Path) -> None:
    """A volume that was full, or a machine that went away, in the middle of a line."""
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "ste')
    for step in (2, 3):
        events = Events(path, rank=0, attempt=step, say=lambda _: None)
        events.emit("step", step=step)
        events.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"event": "ste'
    assert [json.loads(line)["step"] for line in (lines[0], *lines[2:])] == [1, 2, 3]
