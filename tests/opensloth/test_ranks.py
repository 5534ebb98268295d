"""Ranks as real processes over gloo: N ranks train as one does, and resume where they were."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "support" / "train_rank.py"
STEPS = 8
pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


def run(out: Path, world: int, steps: int = STEPS, checkpoint: Path | None = None) -> dict[int, float]:
    """Train with `world` ranks; returns step -> loss."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(out), str(steps), *([str(checkpoint)] if checkpoint else [])]
    ranks = []
    for rank in range(world):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        ranks.append(subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=env, stdout=subprocess.DEVNULL))
    assert [rank.wait(timeout=240) for rank in ranks] == [0] * world
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def test_two_and_four_ranks_train_as_one(tmp_path: Path) -> None:
    reference = run(tmp_path / "1", 1)
    expected = load_file(tmp_path / "1" / "weights-0.safetensors")
    for world in (2, 4):
        out = tmp_path / str(world)
        assert run(out, world) == pytest.approx(reference, rel=1e-6)
        found = load_file(out / "weights-0.safetensors")
        for name, tensor in expected.items():
            assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-5, name
        for rank in range(1, world):
            others = load_file(out / f"weights-{rank}.safetensors")
            assert all(torch.equal(others[name], found[name]) for name in found)


def test_two_ranks_resume_bit_identically_and_one_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "cut", 2, steps=STEPS)
    kept = tmp_path / "cut" / "checkpoints" / "step-00000003"
    resumed = run(tmp_path / "resumed", 2, checkpoint=kept)
    assert min(resumed) == 4
    assert resumed == {step: loss for step, loss in whole.items() if step > 3}
    expected = load_file(tmp_path / "whole" / "weights-0.safetensors")
    found = load_file(tmp_path / "resumed" / "weights-0.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    alone = run(tmp_path / "alone", 1, checkpoint=kept)
    assert alone == pytest.approx(resumed, rel=1e-6)
