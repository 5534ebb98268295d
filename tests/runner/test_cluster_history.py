"""Runs whose objects are gone, over a helper pod that answers as images of other versions and broken networks do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from runner import why
from runner.backend import AttemptRecord, Findings, LogQuery, RunStatus, State, Word
from runner.channel import LostError
from runner.cluster_history import ClusterHistory
from runner.errors import ClusterError


class Commands:
    """Stands in for a helper pod and for the channel to each of its commands."""

    name, stderr, exit_code = "oslo-helper-1", "", 0

    def __init__(self, *parts: bytes | Exception | None) -> None:
        self._parts = iter([*parts, b""])
        self.closed = 0

    def open(self, command: list[str]) -> Commands:
        return self

    def receive(self, timeout: float | None = None) -> bytes | None:
        assert timeout is not None
        part = next(self._parts)
        if isinstance(part, Exception):
            raise part
        return part

    def close(self) -> None:
        self.closed += 1


class Namespace:
    namespace = "oslo"


def history(commands: Commands) -> ClusterHistory:
    return ClusterHistory(Namespace(), commands)  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [b"Usage: oslo ...", b"{}", b"[]"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda subject: subject.runs(),
        lambda subject: subject.get("x-0123abcd"),
        lambda subject: list(subject.logs("x-0123abcd", LogQuery())),
        lambda subject: subject.attempts("x-0123abcd"),
    ],
)
def test_an_image_of_another_version(ask: Callable[[ClusterHistory], Any], said: bytes) -> None:
    commands = Commands(said)
    with pytest.raises(ClusterError, match="does not expect") as caught:
        ask(history(commands))
    assert "job.image" in caught.value.hint
    assert commands.closed == 1


@pytest.mark.parametrize("fault", [None, LostError("the connection was lost")])
def test_a_command_that_says_no_more(fault: Exception | None) -> None:
    commands = Commands(b"half", fault)
    with pytest.raises(LostError, match=re.escape("was lost" if fault else "has said nothing for 120 s")):
        history(commands).runs()
    assert commands.closed == 1


def test_attempts_come_as_the_image_tells_them() -> None:
    """Also keys that only a newer image knows are passed over."""
    word = Word("rank 1", "data", "row 7", 3.0)
    attempts = [AttemptRecord(1, message="lost"), AttemptRecord(2, "data", "row 7", 2.0, 4.0, 20, [word])]
    findings = Findings(RunStatus("x-0123abcd", "local://x-0123abcd", "x", State.FAILED), attempts)
    told = json.loads(json.dumps(why.explain(findings).to_json()))
    told["attempts"][0]["of_a_newer_version"] = told["attempts"][1]["words"][0]["of_a_newer_version"] = 1
    assert history(Commands(json.dumps(told).encode())).attempts("x-0123abcd") == attempts
