"""The benchmarks of training work: tried on a CPU, small, as they would begin on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def said(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.parametrize("extra", [(), ("--full", "--target-share", "0.4")], ids=["an adapter", "every weight"])
def test_steps_alone(extra: tuple[str, ...]) -> None:
    size = ("--shape", "tiny", "--rows", "1", "--row", "512", "--turns", "1")
    out = said("steps.py", *size, "--keep", "all,inputs:1,host:1,host_inputs", *extra)
    lines = [line for line in out.splitlines() if " ms a step; " in line]
    assert [line.partition(":")[0] for line in lines] == [
        "all",
        "all in 1 layer, inputs in the others",
        "attention in host memory, and the MLPs of 1 layer",
        "inputs in host memory",
    ]


@pytest.mark.timeout(240)  # two cases, each with a gate and two programs
def test_a_leg_is_timed_once_its_gradient_is_right(tmp_path: Path) -> None:
    """A peer may end before its gate here, or be missing, and is named then."""
    file = tmp_path / "results.json"
    short = ("--cases", "tiny,tiny-full", "--steps", "2", "--repeat", "1")
    out = said("train.py", "--results", str(file), "--folder", str(tmp_path), *short)
    found = json.loads(file.read_text())
    own = [leg for name, leg in found["legs"].items() if name.startswith("oslo")]
    assert len(own) == 2
    assert all(leg["turns"]["1"]["tokens_per_second"] > 0 for leg in own)
    assert all(gate["passed"] for gate in found["gates"].values())
    assert "which must fail: " in out
