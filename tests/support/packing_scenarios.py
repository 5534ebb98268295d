"""What ranks do when packing is checked at their start: see `train_rank`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny
from train_rank import make

from opensloth import attention, packing_check
from opensloth.errors import ConfigError


def leaks_on_one_rank(out: Path) -> dict[str, Any]:
    """Documents see each other on rank 0, then on rank 1 alone; then nowhere, twice."""
    found: dict[str, Any] = {"compared": 0}
    right, compare = attention._one_by_one, packing_check.compare
    os.environ["OSLO_ROOT"] = str(out / "root")

    def leaking(query: Any, key: Any, value: Any, offsets: Any, *options: Any) -> Any:
        return right(query, key, value, offsets[[0, -1]], *options)

    def counted(*given: Any) -> Any:
        found["compared"] += 1
        return compare(*given)

    packing_check.compare = counted
    rows = tiny.random_rows(40, longest=30)
    for name, rank in (("rank 0", 0), ("rank 1", 1), ("none", None), ("none again", None)):
        attention._one_by_one = leaking if os.environ["RANK"] == str(rank) else right
        try:
            found[name] = make(out / name, rows, max_steps=2).train().steps
        except ConfigError as error:
            found[name] = str(error)
    return found
