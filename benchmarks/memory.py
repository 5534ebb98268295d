"""Peak memory of preparing few and many rows, which should hardly differ.

    python benchmarks/memory.py [--data FILE] [--rows 100000 1000000] [--output FILE]

Peak memory is the largest sum of the resident memory of a build and all processes that it starts, each number of
rows in a fresh process; part of the rows are for evaluation.
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
    return found


def report(source: str, found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each number of rows, and the last as a multiple of the first."""
    date, versions = f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}", f"opensloth {version('opensloth')}"
    lines = [
        f"{date}, {workload.processor()}, {os.cpu_count()} cores, {versions}.",
        f"Rows of {source}, SmolLM2's tokenizer; {EVAL_FRACTION:.0%} of the documents are for evaluation.",
        "",
        "| rows | peak memory, MiB | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {one['rows']:,} | {one['peak_bytes'] / MIB:,.0f} | {one['seconds']:,.0f} |" for one in found]
    ratio = found[-1]["peak_bytes"] / found[0]["peak_bytes"]
    lines += ["", f"The last is {ratio:.3f} times the first. Wanted: {BOUND_RATIO}, and {BOUND_MIB:,} MiB."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of preparation for numbers of rows.")
    parser.add_argument("--data", type=Path, default=workload.ROWS, help="JSON lines; default: the quickstart's rows")
    parser.add_argument("--model", type=Path, help="default: the quickstart's")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--output", type=Path, help="where the report is written as well")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument("--worker", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(workload.build(*arguments.worker, EVAL_FRACTION)))
        return
    found = measure(arguments.data, arguments.model or workload.quickstart_model(), arguments.rows)
    text = report("the quickstart" if arguments.data == workload.ROWS else arguments.data.name, found)
    print(json.dumps(found) if arguments.json else text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
