"""Rows as they come out of a data file, before anyone knows what their columns mean."""

from __future__ import annotations

from typing import Any, NamedTuple

from opensloth.errors import one_line

TOO_DEEP = "nested too deeply"
"""JSON of some hundred levels: whatever walks down it, ours or a template, does so by calls."""


class Row(NamedTuple):
    """One row of a source, or what is wrong with it.

    file: as a message names it. number: from 1, a line where the file has lines, else a row.
    values: column to value; None when the row could not be read, then `problem` says why.
    """

    file: str
    number: int
    values: dict[str, Any] | None
    problem: str = ""
    unit: str = ":"
    """What stands between the file and the number: ":" before a line, " row " before a row."""

    @property
    def where(self) -> str:
        return f"{self.file}{self.unit}{self.number}"


class RowProblem(Exception):
    """This row cannot be used: one sentence, without the place."""

    def __init__(self, problem: str) -> None:
        super().__init__(one_line(problem))  # it quotes the row
