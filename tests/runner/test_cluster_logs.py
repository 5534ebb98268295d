"""A pod's log as lines for people: what was seen is not said again, and what was lost is marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from runner.backend import LogLine, LogQuery
from runner.cluster_logs import Standing, _Seen, follow, parse, passes, read, to_log_line
from runner.kube.errors import MissingError, UnavailableError

TIME = "2027-01-15T08:00:00.000000001Z"


def test_a_line_of_a_rank() -> None:
    timed = parse(f"{TIME} [2.3.17] loading the model")
    line = to_log_line(timed, node=0)
    assert (timed.time, timed.line.attempt, line.rank, line.text) == (TIME, 2, 3, "loading the model")


def test_an_event_is_rendered_and_a_torn_one_left_out() -> None:
    event = to_log_line(parse(TIME + ' [1.0.1] oslo.event {"event": "phase", "phase": "train"}'), node=0)
    assert (event.text, event.event["phase"]) == ("-- training", "train")
    assert to_log_line(parse(f'{TIME} [1.0.1] oslo.event {{"event": "ph'), node=0) is None


def test_what_nobody_headed_is_the_launchers_of_that_node() -> None:
    assert to_log_line(parse(f"{TIME} Traceback (most recent call last):"), node=1).rank == -2


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        (LogQuery(), True),
        (LogQuery(rank=0), True),
        (LogQuery(rank=1), False),
        (LogQuery(attempt=1), True),
        (LogQuery(attempt=2), False),
        (LogQuery(grep=re.compile("los.")), True),
        (LogQuery(grep=re.compile("gain")), False),
    ],
)
def test_filters(query: LogQuery, shown: bool) -> None:
    timed = parse(f"{TIME} [1.0.4] the loss")
    assert passes(timed, to_log_line(timed, 0), query) is shown


def test_after_a_lost_connection_lines_come_once_and_gaps_are_counted() -> None:
    seen = _Seen()
    first, again, later = (parse(f"{TIME} [1.0.{n}] x") for n in (4, 4, 8))
    assert seen.missing_before(first) == 0  # where following began, what came before is not missed
    seen.note(first)
    assert seen.missing_before(again) is None
    assert seen.missing_before(later) == 3
    assert seen.missing_before(parse(f"{TIME} [1.1.0] another rank")) == 0
    assert seen.missing_before(parse(f"{TIME} [2.0.0] the next attempt")) == 0
    assert seen.missing_before(parse(f"{TIME} no heading, seen")) is None
    assert seen.missing_before(parse("2027-01-15T08:00:01Z no heading, new")) == 0


class Pods:
    """Stands in for a cluster: the logs of pods that have ended, by name; an error instead of lines is raised."""

    def __init__(self, **logs: list[str] | Exception) -> None:
        self.logs = logs
        self.asked = 0

    def log(self, pod: str, *, tail: int | None = None, since: str | None = None) -> list[str]:
        self.asked += 1
        found = self.logs[pod]
        if isinstance(found, Exception):
            raise found
        return found

    def follow_log(self, pod: str, *, since: str | None = None) -> Iterator[str]:
        yield from self.log(pod)

    def get(self, resource: object, pod: str) -> dict[str, Any]:
        return {"metadata": {"name": pod, "uid": pod}, "status": {"phase": "Succeeded"}}


def pod_called(name: str, node: int = 0) -> dict[str, Any]:
    kind, index = ("worker", str(node - 1)) if node else ("master", "0")
    labels = {"training.kubeflow.org/replica-type": kind, "training.kubeflow.org/replica-index": index}
    container = {"name": "pytorch", "state": {"terminated": {"exitCode": 0}}}
    return {"metadata": {"name": name, "uid": name, "labels": labels}, "status": {"containerStatuses": [container]}}


def line(second: int, number: int, text: str, attempt: int = 1) -> str:
    return f"2027-01-15T08:00:{second:02}Z [{attempt}.0.{number}] {text}"


def followed(pods: Pods, looks: list[list[str]], query: LogQuery) -> list[str]:
    """looks: the pods that are there at each look; the run is over at the last."""
    standings = iter(
        Standing([pod_called(name) for name in names], number == len(looks), None)
        for number, names in enumerate(looks, 1)
    )
    last = Standing([pod_called(name) for name in looks[-1]], True, None)
    found = follow(pods, lambda: next(standings, last), query)  # type: ignore[arg-type]
    return [item.text for item in found if isinstance(item, LogLine)]


def test_a_node_out_of_reach_hides_no_other_log() -> None:
    pods = Pods(
        a=[line(1, 0, "hello")], b=UnavailableError("dial tcp 10.0.0.5:10250: no route to host"), c=MissingError("gone")
    )
    shown = [item.text for item in read(pods, [pod_called("a"), pod_called("b", 1), pod_called("c", 2)], LogQuery())]  # type: ignore[arg-type]
    assert shown == ["hello", "the log of b cannot be read: dial tcp 10.0.0.5:10250: no route to host"]


def test_the_tail_counts_from_where_following_begins() -> None:
    pods = Pods(a=[line(n, n, f"first {n}") for n in range(5)], b=[line(9, n, f"second {n}", 2) for n in range(5)])
    shown = followed(pods, [["a"], ["b"]], LogQuery(tail=2))
    assert shown == ["first 3", "first 4", *(f"second {n}" for n in range(5))]


def test_a_line_that_comes_while_the_tail_is_read_is_shown_once() -> None:
    pods = Pods(a=[line(1, 0, "first")])
    grows = pods.log
    pods.log = lambda pod, **options: [*grows(pod), *(line(2, n, f"later {n}") for n in range(1, pods.asked + 1))]  # type: ignore[method-assign]
    shown = followed(pods, [["a"]], LogQuery(tail=10))
    assert len(shown) == len(set(shown)), shown
    assert shown[:2] == ["first", "later 1"]


def test_a_run_that_is_over_does_not_wait_for_a_log_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.cluster_logs._RETRY_SECONDS", 0.01)
    shown = followed(Pods(a=UnavailableError("no route to host")), [["a"]], LogQuery())
    assert shown == ["the log of a cannot be read: no route to host"]
