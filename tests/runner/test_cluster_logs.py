"""A pod's log as lines for people: what was seen is not said again, and what was lost is marked."""

from __future__ import annotations

import re

import pytest

from runner.backend import LogQuery
from runner.cluster_logs import _Seen, parse, passes, to_log_line

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
