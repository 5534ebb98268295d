"""What is read of a stretch of steps."""

from __future__ import annotations

import time

import pytest
import torch

from opensloth.meter import Meter
from opensloth.step import StepTotals


def test_mfu_data_wait_and_padding_are_shares_of_the_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(torch.device("cpu"), 10, peak=1e12)
    for _ in range(2):
        meter.add(StepTotals(loss_sum=8.0, targets=4, tokens=10, grad_norm=1.0))
        meter.add_work(2e12, waited=0.5, positions=16, tokens=10)
    clock[0] += 8
    reading = meter.read(2)
    assert (reading.mfu, reading.data_wait, reading.padding) == (0.5, 0.125, 0.375)
    assert (reading.tokens_per_second, reading.target_tokens_per_second) == (2.5, 1.0)
    meter.add(StepTotals(loss_sum=8.0, targets=4, tokens=10, grad_norm=1.0))
    clock[0] += 1
    later = meter.read(3)
    assert (later.mfu, later.padding) == (None, 0), "nothing is carried over, and nothing counted is nothing said"
