"""A pod's log and its last word: how the launcher writes them and the submitting side reads them. Pure.

One stream carries the lines of all the pod's ranks and of its launcher. Each is headed by where it comes from,
`[<attempt>.<rank>.<line>] `, so that a reader who lost the connection drops what it has seen and notices a gap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from opensloth.contract import EXIT_CODE_OF_CAUSE, LAUNCHER_RANK

_LINE: Final = re.compile(r"\[(\d+)\.(-?\d+)\.(\d+)\] (.*)", re.DOTALL)


@dataclass(frozen=True)
class PodLine:
    """One line of a rank's log.

    rank: LAUNCHER_RANK - n is the launcher of node n. number: from 0, counted for each attempt and rank.
    """

    attempt: int
    rank: int
    number: int
    text: str


def format_line(line: PodLine) -> str:
    """The line as it stands in the pod's log, without its end."""
    return f"[{line.attempt}.{line.rank}.{line.number}] {line.text}"


def parse_line(text: str) -> PodLine | None:
    """None for what nobody headed: a crash of Python itself, or what the container's runtime says."""
    found = _LINE.fullmatch(text)
    return PodLine(int(found[1]), int(found[2]), int(found[3]), found[4]) if found else None


def launcher_rank(node: int) -> int:
    return LAUNCHER_RANK - node


def format_end(cause: str, message: str, hint: str) -> str:
    """A pod's termination message: for people in `kubectl describe pod`, and for parse_end."""
    sentence = " ".join(message.split())
    return f"{cause}: {sentence}" + (f"\n{hint}" if hint else "")


def parse_end(text: str) -> tuple[str, str, str] | None:
    """(cause, message, hint) of a termination message; None when the launcher did not write it."""
    first, _, hint = text.partition("\n")
    cause, separator, message = first.partition(": ")
    return (cause, message, hint) if separator and cause in EXIT_CODE_OF_CAUSE else None
