"""The log of an attempt: every rank's file and the launcher's events as one stream of lines."""

from __future__ import annotations

import heapq
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from opensloth import contract
from opensloth.contract import EVENT_PREFIX, LAUNCHER_RANK
from opensloth.event_lines import render_event
from opensloth.pod_log import launcher_rank
from runner.backend import LogLine, LogQuery
from runner.errors import NotFoundError
from runner.event_log import Event, parse_events
from runner.run_folder import LAUNCHER_OUTPUT, RunFolder

_RANK_FILE: Final = re.compile(re.escape(contract.RANK_LOG).replace(re.escape("{rank}"), r"(\d+)"))
_NODE_FILES: Final = tuple(
    re.compile(re.escape(name).replace(re.escape("{node}"), r"(\d+)"))
    for name in (contract.NODE_EVENTS, contract.NODE_LAUNCHER_LOG)
)
"""What the launchers of nodes above 0 write."""
_EVENTS_SUFFIX: Final = Path(contract.EVENTS_FILE).suffix
_POLL_SECONDS: Final = 0.1
_LAST_WORDS_SECONDS: Final = 2.0
"""A launcher says how it ended after it has written ended.json: it gets this long to leave."""


@dataclass
class _Source:
    """One file that is read on from where the last read ended."""

    path: Path
    rank: int
    only_attempt: int | None = None
    """For a file of events (all attempts and rank 0 share events.jsonl): take those of this rank and attempt."""
    _offset: int = 0
    _torn: bytes = b""
    _last_progress: str = ""

    def read(self, *, to_the_end: bool = False) -> list[LogLine]:
        """The whole lines since the last read; to_the_end: also a last line that was never finished."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        whole, newline, self._torn = (self._torn + data).rpartition(b"\n")
        if self.only_attempt is not None:
            events = parse_events(whole + newline)
            lines = [LogLine(self.rank, render_event(e), e) for e in events if self._is_mine(e)]
            return [line for line in lines if not self._is_repeated(line)]
        read = [self._line(text) for text in whole.split(b"\n")] if newline else []
        if to_the_end and self._torn:
            read.append(self._line(self._torn))
            self._torn = b""
        return [line for line in read if line is not None]

    def _is_mine(self, event: Event) -> bool:
        return event.get("attempt") == self.only_attempt and event.get("rank") == self.rank

    def _is_repeated(self, line: LogLine) -> bool:
        """Whether it says the progress that the last one said."""
        if line.event is None or line.event["event"] != "progress":
            return False
        repeated, self._last_progress = line.text == self._last_progress, line.text
        return repeated

    def _line(self, raw: bytes) -> LogLine | None:
        text = raw.decode(errors="replace").rstrip("\r")
        if not text.startswith(EVENT_PREFIX):
            return LogLine(self.rank, text)
        for event in parse_events(text.removeprefix(EVENT_PREFIX).encode() + b"\n"):
            return LogLine(self.rank, render_event(event), event)
        return None  # a torn event


@dataclass
class _Attempt:
    """The sources of one attempt; a rank's file may appear later."""

    folder: RunFolder
    number: int
    query: LogQuery
    _sources: dict[Path, _Source] = field(default_factory=dict)

    def sources(self) -> list[_Source]:
        """By rank, the launchers first."""
        attempt = self.folder.attempt_folder(self.number)
        wanted = {
            self.folder.path / contract.EVENTS_FILE: LAUNCHER_RANK,
            attempt / contract.LAUNCHER_LOG: LAUNCHER_RANK,
        }
        if attempt.is_dir():
            names = [entry.name for entry in attempt.iterdir()]
            wanted |= {attempt / match[0]: int(match[1]) for name in names if (match := _RANK_FILE.fullmatch(name))}
            nodes = (pattern.fullmatch(name) for name in names for pattern in _NODE_FILES)
            wanted |= {attempt / match[0]: launcher_rank(int(match[1])) for match in nodes if match}
        for path, rank in wanted.items():
            if path not in self._sources and self.query.rank in (None, rank):
                only = self.number if path.suffix == _EVENTS_SUFFIX else None
                self._sources[path] = _Source(path, rank, only)
        return sorted(self._sources.values(), key=lambda source: (source.rank, source.path.name))

    def read(self, *, to_the_end: bool) -> list[LogLine]:
        """What is new, in the order of its times, filtered."""
        timed = [_timed(source, source.read(to_the_end=to_the_end), self.query) for source in self.sources()]
        return [line for _, line in heapq.merge(*timed, key=lambda pair: pair[0])]


def read(folder: RunFolder, query: LogQuery) -> Iterator[LogLine]:
    """The lines of an attempt that are there now.

    Raises NotFoundError when the run has no such attempt.
    """
    numbers = folder.attempt_numbers()
    if query.attempt is not None and query.attempt not in numbers:
        has = f"it has {', '.join(map(str, numbers))}" if numbers else "none has started"
        raise NotFoundError(f"{folder.handle} has no attempt {query.attempt}", has)
    if not numbers:  # what the launcher said before it could make an attempt
        yield from _Source(folder.path / LAUNCHER_OUTPUT, LAUNCHER_RANK).read(to_the_end=True)
    else:
        number = query.attempt if query.attempt is not None else numbers[-1]
        yield from _Attempt(folder, number, query).read(to_the_end=True)


def follow(folder: RunFolder, query: LogQuery) -> Iterator[LogLine | None]:
    """Lines as they come, over all coming attempts, until the run is over or deleted.

    Yields None after each look, so that the caller can say what the run waits for.
    """
    seen = 0
    while True:
        numbers = [number for number in folder.attempt_numbers() if number > seen]
        if query.attempt is not None and not seen:
            numbers = [number for number in numbers if number >= query.attempt]
        elif not seen:
            numbers = numbers[-1:]
        for number in numbers:
            yield from _follow_attempt(_Attempt(folder, number, query))
            seen = number
        if not numbers:
            yield None
            if not folder.exists() or folder.status().state.is_over:
                return
            time.sleep(_POLL_SECONDS)


def _follow_attempt(attempt: _Attempt) -> Iterator[LogLine | None]:
    folder, tail = attempt.folder, attempt.query.tail
    last_words_until: float | None = None
    while True:
        facts = folder.attempt(attempt.number)
        if facts.ended is not None and last_words_until is None:
            last_words_until = time.monotonic() + _LAST_WORDS_SECONDS
        too_late = last_words_until is not None and time.monotonic() > last_words_until
        # Looked at before reading: what it wrote before it left is read after.
        over = (facts.started is not None and not facts.alive) or too_late
        newer = folder.attempt_numbers()[-1:] > [attempt.number]
        lines = attempt.read(to_the_end=over)
        yield from lines
        if tail is not None:  # counts back from where following begins
            attempt.query = LogQuery(attempt.query.attempt, attempt.query.rank, None, None, attempt.query.grep)
            tail = None
        if over or newer or not folder.exists():
            return
        yield None
        if facts.started is None and folder.status().state.is_over:
            return
        time.sleep(_POLL_SECONDS)


def _timed(source: _Source, lines: list[LogLine], query: LogQuery) -> list[tuple[float, LogLine]]:
    """Each line with the time of the last event before it in its file, less what `query` leaves out.

    Lines of a file without events go last: they are a rank's words about its end.
    """
    timed: list[tuple[float, LogLine]] = []
    has_events = any(line.event for line in lines)
    at = -math.inf if has_events else math.inf
    for line in lines:
        if line.event:
            at = max(at, float(line.event.get("time", at)))
        timed.append((at, line))
    if query.since is not None:
        if not has_events:
            recent = source.path.exists() and source.path.stat().st_mtime >= query.since
            timed = timed if recent else []
        timed = [pair for pair in timed if pair[0] >= query.since]
    if query.grep is not None:
        timed = [pair for pair in timed if query.grep.search(pair[1].text)]
    return timed if query.tail is None else timed[len(timed) - min(query.tail, len(timed)) :]
