"""A bound that a test holds, with the figure it measured: docs/correctness.md is made of these.

With OSLO_MEASURED=FILE every figure is appended there as a line of JSON; `python tests/support/measured.py FILE`
prints the table.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FILE_ENV = "OSLO_MEASURED"


def at_most(claim: str, measured: float, bound: float) -> None:
    """Fail unless `measured` <= `bound`. claim: what a reader learns, the same words for all cases of one claim."""
    _record(claim, measured, bound, "<=")
    assert measured <= bound, f"{claim}: {measured:.3g}, allowed {bound:.3g}"


def at_least(claim: str, measured: float, bound: float) -> None:
    """Fail unless `measured` >= `bound`."""
    _record(claim, measured, bound, ">=")
    assert measured >= bound, f"{claim}: {measured:.3g}, wanted {bound:.3g} or more"


def _record(claim: str, measured: float, bound: float, relation: str) -> None:
    file = os.environ.get(FILE_ENV)
    if not file:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].partition(" ")[0]
    line = {"claim": claim, "test": test, "relation": relation, "bound": bound, "measured": float(measured)}
    with Path(file).open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: one row a claim, with its worst figure and the number of cases, by the file of its test."""
    rows = []
    for claim in dict.fromkeys(line["claim"] for line in lines):
        cases = [line for line in lines if line["claim"] == claim]
        worst = (max if cases[0]["relation"] == "<=" else min)(cases, key=lambda case: case["measured"])
        tests = sorted({case["test"] for case in cases})
        bound = f"{worst['relation']} {worst['bound']:.4g}"
        rows.append((tests[0], f"| {claim} | {bound} | {worst['measured']:.3g} | {len(cases)} | {_named(tests)} |"))
    head = ["| claim | bound | worst measured | cases | test |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for _, row in sorted(rows))])


def _named(tests: list[str]) -> str:
    """The file is said once for several tests of it."""
    said, last = [], ""
    for file, _, name in (test.partition("::") for test in tests):
        said.append(f"`::{name}`" if file == last else f"`{file}::{name}`")
        last = file
    return ", ".join(said)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))  # noqa: T201
