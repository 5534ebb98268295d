"""The logs of a run's pods as one stream of lines: read once, or followed over lost connections and new pods."""

from __future__ import annotations

import datetime as dt
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from opensloth.contract import EVENT_PREFIX
from opensloth.event_lines import render_event
from opensloth.pod_log import PodLine, launcher_rank, parse_line
from runner.backend import LogLine, LogQuery, Waiting
from runner.errors import ClusterError, UnreachableError
from runner.event_log import event_of
from runner.kube.api import PODS, Cluster
from runner.kube.errors import MissingError, RefusedError, UnavailableError
from runner.pod_facts import Manifest, has_started, node_of

_RETRY_SECONDS: Final = 1.0
_LAST_TRIES: Final = 5
"""So often in a row the log of a run that is over is asked for in vain."""
_QUIET_SECONDS: Final = 5.0
"""Between two looks at the pods while all of them run; a log that ends is looked at at once."""
_BUSY_SECONDS: Final = 1.0
"""The same while pods come or go."""


@dataclass(frozen=True)
class Timed:
    """One line of a pod's log. time: as the kubelet stamps it, RFC 3339 in UTC, which sorts as text."""

    time: str
    line: PodLine | None
    text: str
    """Without the heading, if there was one."""


@dataclass(frozen=True)
class Standing:
    """What a look at a followed run shows: its pods, whether it is over, and what it waits for."""

    pods: Sequence[Manifest]
    over: bool
    waits: str | None


def parse(raw: str) -> Timed:
    time, _, text = raw.partition(" ")
    line = parse_line(text)
    return Timed(time, line, line.text if line else text)


def to_log_line(timed: Timed, node: int) -> LogLine | None:
    """As people read it; None for an event that was torn."""
    rank = timed.line.rank if timed.line else launcher_rank(node)
    event = event_of(timed.text)
    if event is not None:
        return LogLine(rank, render_event(event), event)
    return None if timed.text.startswith(EVENT_PREFIX) else LogLine(rank, timed.text)


def read(cluster: Cluster, pods: Sequence[Manifest], query: LogQuery) -> Iterator[LogLine]:
    """The lines that are there, in the order of their times."""
    found: list[tuple[str, LogLine]] = []
    unread: list[LogLine] = []
    for pod in filter(has_started, pods):
        name, node = pod["metadata"]["name"], node_of(pod)
        try:
            found += _shown([parse(raw) for raw in cluster.log(name, since=_since(query))], node, query)
        except MissingError:  # it was deleted this very moment
            continue
        except (RefusedError, UnavailableError) as error:  # its node is out of reach, say: the others' logs are not
            unread.append(_unreadable(name, node, error))
    yield from (line for _, line in sorted(found, key=lambda pair: pair[0]))
    yield from unread


def _unreadable(pod: str, node: int, error: ClusterError) -> LogLine:
    return LogLine(launcher_rank(node), f"the log of {pod} cannot be read: {error}")


def _shown(lines: Sequence[Timed], node: int, query: LogQuery) -> list[tuple[str, LogLine]]:
    """What `query` lets pass of one pod's log, each with its time."""
    shown = [(timed.time, line) for timed in lines if (line := to_log_line(timed, node)) and passes(timed, line, query)]
    if query.tail is None:
        return shown
    ranks = {line.rank for _, line in shown}
    of_rank = {rank: [pair for pair in shown if pair[1].rank == rank] for rank in ranks}
    return [pair for pairs in of_rank.values() for pair in pairs[len(pairs) - min(query.tail, len(pairs)) :]]


def passes(timed: Timed, line: LogLine, query: LogQuery) -> bool:
    if query.rank is not None and line.rank != query.rank:
        return False
    if query.attempt is not None and (timed.line is None or timed.line.attempt != query.attempt):
        return False
    return query.grep is None or bool(query.grep.search(line.text))


def follow(cluster: Cluster, look: Callable[[], Standing], query: LogQuery) -> Iterator[LogLine | Waiting]:
    """Lines as they come until the run is over and every log has been read to its end.

    look: what is there now; it is called from this thread alone.
    """
    lines: queue.Queue[LogLine | None] = queue.Queue()
    streams: dict[str, _Stream] = {}
    said: str | None = None
    while True:
        standing = look()
        for pod in filter(has_started, standing.pods):
            if pod["metadata"]["uid"] not in streams:
                streams[pod["metadata"]["uid"]] = _Stream(cluster, pod, query, lines)
        query = replace(query, tail=None)  # it counts back from where following begins: of later pods all is shown
        if standing.over:
            for stream in streams.values():
                stream.hurry()
        if standing.waits and standing.waits != said:
            yield Waiting(standing.waits)
        said = standing.waits
        if standing.over and not any(stream.is_alive() for stream in streams.values()):
            yield from _drain(lines)
            return
        quiet = not standing.waits and not standing.over
        yield from _lines_for(_QUIET_SECONDS if quiet else _BUSY_SECONDS, lines)


def _lines_for(seconds: float, lines: queue.Queue[LogLine | None]) -> Iterator[LogLine]:
    """What comes within about `seconds`; a log that ends (None) ends it early."""
    timer = threading.Timer(seconds, lines.put, [None])
    timer.daemon = True
    timer.start()
    while (line := lines.get()) is not None:
        yield line
    timer.cancel()


def _drain(lines: queue.Queue[LogLine | None]) -> Iterator[LogLine]:
    while not lines.empty():
        line = lines.get()
        if line is not None:
            yield line


@dataclass
class _Seen:
    """What of a pod's log has been handed on."""

    time: str = ""
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    """(attempt, rank) -> number of the last line."""

    def missing_before(self, timed: Timed) -> int | None:
        """How many lines were lost before this one; None: it has been seen."""
        if timed.line is None:
            return None if timed.time <= self.time else 0
        key = (timed.line.attempt, timed.line.rank)
        last = self.numbers.get(key)
        if last is not None and timed.line.number <= last:
            return None
        return 0 if last is None else timed.line.number - last - 1

    def note(self, timed: Timed) -> None:
        self.time = max(self.time, timed.time)
        if timed.line is not None:
            self.numbers[timed.line.attempt, timed.line.rank] = timed.line.number


class _Stream(threading.Thread):
    """Hands on the lines of one pod until its container has ended and all was read; None when it has."""

    def __init__(self, cluster: Cluster, pod: Manifest, query: LogQuery, lines: queue.Queue[LogLine | None]) -> None:
        super().__init__(daemon=True)
        self._cluster, self._query, self._lines = cluster, query, lines
        self._name, self._uid, self._node = pod["metadata"]["name"], pod["metadata"]["uid"], node_of(pod)
        self._seen = _Seen()
        self._over = threading.Event()
        self._misses = 0
        self.start()

    def hurry(self) -> None:
        """The run is over: a log that cannot be read is not waited for much longer."""
        self._over.set()

    def run(self) -> None:
        try:
            while not self._once():
                pass
        except MissingError:
            pass  # it was deleted: what it said since the last line is in the volume's files
        except ClusterError as error:
            self._lines.put(_unreadable(self._name, self._node, error))
        finally:
            self._lines.put(None)

    def _once(self) -> bool:
        """One connection; whether the log has been read to its end."""
        try:
            if self._query.tail is not None:
                self._hand_on_tail()
            for raw in self._cluster.follow_log(self._name, since=self._since()):
                self._take(parse(raw))
            self._misses = 0
            ended = self._has_ended()
            if ended:  # what came between the end of the stream and the end of the container
                for raw in self._cluster.log(self._name, since=self._since()):
                    self._take(parse(raw))
        except (UnreachableError, RefusedError):  # the API server restarts; the container has just been made
            self._misses += 1
            if self._over.is_set() and self._misses >= _LAST_TRIES:
                raise
            time.sleep(_RETRY_SECONDS)
            return False
        return ended

    def _since(self) -> str | None:
        return self._seen.time or _since(self._query)

    def _has_ended(self) -> bool:
        """Raises MissingError when the pod is gone, or another has its name."""
        pod = self._cluster.get(PODS, self._name)
        if pod["metadata"]["uid"] != self._uid:
            raise MissingError(f"{self._name} was replaced")
        return pod["status"].get("phase") in ("Succeeded", "Failed")

    def _hand_on_tail(self) -> None:
        lines = [parse(raw) for raw in self._cluster.log(self._name, since=_since(self._query))]
        for timed in lines:
            self._seen.note(timed)
        for _, line in _shown(lines, self._node, self._query):
            self._lines.put(line)
        self._query = replace(self._query, tail=None)

    def _take(self, timed: Timed) -> None:
        missing = self._seen.missing_before(timed)
        if missing is None:
            return
        line = to_log_line(timed, self._node)
        if missing and line is not None:
            what = "1 line is" if missing == 1 else f"{missing} lines are"
            self._lines.put(LogLine(line.rank, f"... {what} missing here: the run's folder on the volume has them"))
        self._seen.note(timed)
        if line is not None and passes(timed, line, self._query):
            self._lines.put(line)


def _since(query: LogQuery) -> str | None:
    return dt.datetime.fromtimestamp(query.since, dt.UTC).isoformat() if query.since is not None else None
