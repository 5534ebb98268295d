"""events.jsonl while somebody writes it."""

from __future__ import annotations

import json
from pathlib import Path

from runner.event_log import parse_events, tail_events


def line(event: str, attempt: int = 1, **fields: object) -> bytes:
    return json.dumps({"event": event, "attempt": attempt, **fields}).encode() + b"\n"


def test_a_torn_tail_is_ignored() -> None:
    whole = line("step", step=1)
    for length in range(1, len(whole)):
        assert [e["step"] for e in parse_events(whole + line("step", step=2)[:length])][:1] == [1]
    assert [e["step"] for e in parse_events(whole + whole[:-1])] == [1]


def test_lines_that_are_no_events_are_ignored() -> None:
    assert list(parse_events(b'garbage\n[1]\n{"no": "kind"}\n\n' + line("note"))) == [{"event": "note", "attempt": 1}]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(line("step", step=n, pad="x" * 100) for n in range(20_000)))
    events = tail_events(path, 1)
    assert events[-1]["step"] == 19_999
    assert len(events) < 1000


def test_reads_back_to_the_last_phase(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line("phase", phase="data") + b"".join(line("note", message="x" * 200) for _ in range(2_000)))
    assert tail_events(path, 1)[0] == {"event": "phase", "attempt": 1, "phase": "data"}


def test_another_attempt_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line("step", attempt=1, step=5) + line("phase", attempt=2, phase="data"))
    assert [e["event"] for e in tail_events(path, 2)] == ["phase"]
    assert tail_events(path, 3) == []
    assert tail_events(tmp_path / "none", 1) == []
