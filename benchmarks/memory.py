"""Peak memory of preparing few and many rows, which should hardly differ.

    python benchmarks/memory.py [--data FILE] [--rows 100000 1000000] [--output FILE]

Peak memory is the largest sum of the resident memory of a build and all processes that it starts, each number of
rows in a fresh process; part of the rows are for evaluation. Ends with 1 where a bound is exceeded.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import workload

EVAL_FRACTION = 0.02
MIB = 2**20
BOUND_MIB, BOUND_RATIO = 1536, 1.2


def measure(source: Path, model: Path, counts: list[int]) -> list[dict[str, Any]]:
    """For each number of rows: {rows, seconds, peak_bytes}."""
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "train.jsonl"
            workload.write_rows(source, data, count)
            taken = workload.measured("memory.py", "--worker", data, model, Path(folder) / "cache")
        found.append({"rows": count, **taken})
        print(json.dumps(found[-1]), flush=True)
    return found


def report(source: str, found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each number of rows, and the ratio of most to fewest."""
    date, versions = f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}", f"opensloth {version('opensloth')}"
    lines = [
        f"{date}, {workload.processor()}, {os.cpu_count()} cores, {versions}.",
        f"Rows of {source}, SmolLM2's tokenizer; {EVAL_FRACTION:.0%} of the documents are for evaluation.",
        "",
        "| rows | peak memory, MiB | of it no file's | seconds |",
        "|---|---|---|---|",
    ]
    for one in found:
        memory, own = one["peak_bytes"] / MIB, one["peak_own_bytes"] / MIB
        lines.append(f"| {one['rows']:,} | {memory:,.0f} | {own:,.0f} | {one['seconds']:,.0f} |")
    lines += ["", f"Most rows / fewest: {growth(found):.3f}. Wanted: at most {BOUND_RATIO}, and {BOUND_MIB:,} MiB."]
    return "\n".join(lines) + "\n"


def growth(found: list[dict[str, Any]]) -> float:
    """Peak memory of the most rows over that of the fewest."""
    fewest, most = (pick(found, key=lambda one: one["rows"])["peak_bytes"] for pick in (min, max))
    return float(most / fewest)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of preparation for numbers of rows.")
    parser.add_argument("--data", type=Path, default=workload.ROWS, help="JSON lines; default: the quickstart's rows")
    parser.add_argument("--model", type=Path, help="default: the quickstart's")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--output", type=Path, help="where the report is written as well")
    parser.add_argument("--worker", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(workload.build(*arguments.worker, EVAL_FRACTION)))
        return
    found = measure(arguments.data, arguments.model or workload.quickstart_model(), arguments.rows)
    text = report("the quickstart" if arguments.data == workload.ROWS else arguments.data.name, found)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    if growth(found) > BOUND_RATIO or max(one["peak_bytes"] for one in found) > BOUND_MIB * MIB:
        raise SystemExit("missed: the bounds above")


if __name__ == "__main__":
    main()
