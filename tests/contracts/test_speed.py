"""`oslo --help` answers at least as fast as the command line of torchx, which does the nearest job."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNS = 7


def seconds(command: str) -> float:
    """Wall time of `COMMAND --help` in this environment."""
    began = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name(command), "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


@pytest.mark.slow
def test_help_is_no_slower_than_torchx() -> None:
    """Medians of alternating runs: what else the machine does meanwhile meets both."""
    pairs = [(seconds("oslo"), seconds("torchx")) for _ in range(RUNS)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert ours <= theirs, f"oslo --help takes {ours * 1000:.0f} ms, torchx --help {theirs * 1000:.0f} ms"
