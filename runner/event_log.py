"""Reads events.jsonl while somebody writes it: whole lines only, from the end, without reading it all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from opensloth.contract import EVENT_PREFIX

_BLOCK_BYTES: Final = 64 * 1024
Event = dict[str, Any]


def parse_events(data: bytes) -> Iterator[Event]:
    """The events of whole lines; a last line without its end, or one that is no object, is left out."""
    for line in data.split(b"\n")[:-1]:
        event = _parse(line)
        if event is not None:
            yield event


def event_of(line: str) -> Event | None:
    """The event that a log line carries, if it does."""
    return _parse(line.removeprefix(EVENT_PREFIX).encode()) if line.startswith(EVENT_PREFIX) else None


def tail_events(path: Path, attempt: int) -> list[Event]:
    """The last events of `attempt`: at least so many that they hold its last phase or step, if it has one.

    A file that is not there has no events. Step events come several a second over days: of a long file only
    the end is read.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return []
    with stream:
        size = stream.seek(0, 2)
        span = _BLOCK_BYTES
        while True:
            begin = max(0, size - span)
            stream.seek(begin)
            data = stream.read(size - begin)
            if begin:
                data = data.partition(b"\n")[2]
            events = list(parse_events(data))
            mine = [event for event in events if event.get("attempt") == attempt]
            older = len(mine) < len(events)
            if begin == 0 or older or any(event["event"] in ("phase", "step") for event in mine):
                return mine
            span *= 4


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
