"""The tables of faults and of errors name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)?(?:::(\w+)[^`]*)?`")


@pytest.mark.parametrize("page", ["faults.md", "correctness.md"])
def test_every_test_that_a_table_names_is_there(page: str) -> None:
    missing: list[str] = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        file = ""
        for path, name in NAMED.findall(line):
            file = path or file
            source = ROOT / file
            if not file or not source.is_file() or (name and f"def {name}(" not in source.read_text()):
                missing.append(f"{file}::{name}")
    assert [entry for entry in missing if entry != "::"] == []
