"""A pod's log: what the launcher writes is what the submitting side reads."""

from __future__ import annotations

import pytest

from opensloth.contract import Cause
from opensloth.pod_log import PodLine, format_end, format_line, launcher_rank, parse_end, parse_line


@pytest.mark.parametrize("text", ["", "step 3", "[1.0.2] nested", 'oslo.event {"event": "step"}', "two\rparts"])
def test_a_line_is_read_as_it_was_written(text: str) -> None:
    line = PodLine(attempt=2, rank=launcher_rank(1), number=17, text=text)
    assert format_line(line).startswith("[2.-2.17] ")
    assert parse_line(format_line(line)) == line


@pytest.mark.parametrize("text", ["", "Traceback (most recent call last):", "[0] step", "[1.0] x", "[1.0.2]x"])
def test_what_nobody_headed_is_told_apart(text: str) -> None:
    assert parse_line(text) is None


def test_a_last_word_is_one_sentence_and_its_hint() -> None:
    written = format_end(Cause.DATA, "row 17:\n  no answer", "set bad_rows: skip")
    assert written == "data: row 17: no answer\nset bad_rows: skip"
    assert parse_end(written) == (Cause.DATA, "row 17: no answer", "set bad_rows: skip")
    assert parse_end(format_end(Cause.ERROR, "it broke", "")) == (Cause.ERROR, "it broke", "")


def test_the_tail_of_a_log_is_no_last_word() -> None:
    assert parse_end("RuntimeError: it broke") is None
