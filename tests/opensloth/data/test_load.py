"""Bounds of preparation under load: memory that does not grow with the rows, a cache that opens at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_tools import Events, chat, write_jsonl
from measured import at_most

from opensloth.arithmetic import BatchShape
from opensloth.data.batch import Batch
from opensloth.data.build import build
from opensloth.data.built import BuiltData
from opensloth.data.order import RowOrder
from opensloth.data.prepared import PreparedDataset
from opensloth.data.training_data import Rows, make_rows
from opensloth.run_config import RunConfig

MEMORY = Path(__file__).parents[3] / "benchmarks" / "memory.py"
MIB = 2**20

pytestmark = pytest.mark.slow  # two minutes together


@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, model_folder: Path) -> None:
    """The benchmark itself, with fewer and shorter rows; a million real ones are in benchmarks/results."""
    few, many = 10_000, 100_000
    source = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(f"say {i}", f"{i} " * 20)} for i in range(1000)])
    command = [sys.executable, MEMORY, "--data", source, "--model", model_folder, "--rows", few, many]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=True)
    first, last = (json.loads(line) for line in done.stdout.splitlines()[:2])
    at_most("preparation: peak memory, MiB", last["peak_bytes"] / MIB, 1536)
    at_most("preparation: peak memory of ten times the rows", last["peak_bytes"] / first["peak_bytes"], 1.2)
    growth = (last["peak_own_bytes"] - first["peak_own_bytes"]) / (many - few)
    at_most("preparation: bytes of memory for one row more", growth, 600)


@pytest.mark.timeout(600)
def test_a_cache_of_100_000_rows_opens_at_once(
    tmp_path: Path, make_config: Callable[..., RunConfig], events: Events
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat(f"say {i}", f"{i}")} for i in range(100_000)])
    entry = build(make_config(source), events).path
    ways = {
        "packed": make_config(source),
        "one document a row": make_config(source, packing=False),
        "as a prepared dataset": make_config(cache=entry),
    }
    for config in ways.values():
        started = time.perf_counter()
        found, rows, batch = first_batch(config, events)
        seconds = time.perf_counter() - started
        assert found.reused
        assert batch.tokens > 0
        assert len(rows) == found.rows
        at_most("a cache of 100,000 rows: seconds from opening to the first batch, imports apart", seconds, 2.0)


def first_batch(config: RunConfig, events: Events) -> tuple[BuiltData, Rows, Batch]:
    """What training does with its data before the first step."""
    found = build(config, events)
    options = config.opensloth
    rows = make_rows(
        PreparedDataset.open(found.path),
        options.fast_model_args.max_seq_length,
        packed=options.sequence_packing,
        pad_id=0,
    )
    order = RowOrder(len(rows), BatchShape(per_device=2, accumulation=1, world=1), seed=3407)
    return found, rows, rows.batch(order.step_rows(0))
