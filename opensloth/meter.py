"""What a stretch of steps achieved: loss, speed, memory, time left."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opensloth.step import StepTotals

RU_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Reading:
    """loss: nats a target, over the stretch. grad_norm: of its last step. eta: seconds. memory: peak bytes.

    padding: share of the computed positions that are no tokens. data_wait: share of the time in which batches were
    waited for. mfu: share of the device's measured speed that went into the operations counted by `opensloth.flops`;
    None where either is unknown. All three of this rank.
    """

    loss: float
    grad_norm: float
    target_tokens: int
    tokens: int
    target_tokens_per_second: float
    tokens_per_second: float
    memory: int
    padding: float
    data_wait: float
    mfu: float | None
    eta: float


class Meter:
    """Sums up steps between two readings; evaluation and checkpoints count as time, as they do for a person."""

    def __init__(self, device: torch.device, total_steps: int, peak: float | None = None) -> None:
        """peak: operations a second of which the device is capable; None: unknown."""
        self._device, self._total_steps, self._peak = device, total_steps, peak
        self._waited = self._operations = 0.0
        self._positions = self._tokens = 0
        self._since = time.monotonic()
        self._earlier: list[StepTotals] = []
        self._steps: list[StepTotals] = []
        self._seconds_per_step: float | None = None

    def add(self, totals: StepTotals) -> None:
        self._steps.append(totals)

    def add_work(self, operations: float, waited: float, positions: int, tokens: int) -> None:
        """Of this rank in a step: operations, seconds that it waited for its batches, their positions and tokens."""
        self._operations += operations
        self._waited += waited
        self._positions += positions
        self._tokens += tokens

    @property
    def pending(self) -> list[tuple[float, int, int, float]]:
        """What the next reading will be of, for a checkpoint: fields of StepTotals."""
        return [(t.loss_sum, t.targets, t.tokens, t.grad_norm) for t in (*self._earlier, *self._steps)]

    def take_up(self, pending: Sequence[tuple[float, int, int, float]]) -> None:
        """Steps that another process has made since its last reading: they count for the loss, not for the speed."""
        self._earlier = [StepTotals(*fields) for fields in pending]

    def read(self, done: int) -> Reading:
        """The stretch since the last reading, at least one step. done: steps of the run so far."""
        now = time.monotonic()
        seconds, self._since = max(1e-9, now - self._since), now
        own, steps = self._steps, self._earlier + self._steps
        self._earlier, self._steps = [], []
        waited, operations, self._waited, self._operations = self._waited, self._operations, 0.0, 0.0
        padding = 1 - self._tokens / self._positions if self._positions else 0.0
        self._positions = self._tokens = 0
        targets = sum(s.targets for s in steps)
        return Reading(
            loss=sum(s.loss_sum for s in steps) / max(1, targets),
            grad_norm=steps[-1].grad_norm,
            target_tokens=targets,
            tokens=sum(s.tokens for s in steps),
            target_tokens_per_second=round(sum(s.targets for s in own) / seconds, 1),
            tokens_per_second=round(sum(s.tokens for s in own) / seconds, 1),
            memory=peak_memory_bytes(self._device),
            padding=round(padding, 4),
            data_wait=round(waited / seconds, 4),
            mfu=round(operations / seconds / self._peak, 4) if self._peak and operations else None,
            eta=round(self._pace(seconds / len(own)) * (self._total_steps - done), 1),
        )

    def _pace(self, seconds_per_step: float) -> float:
        """Seconds a step, smoothed: the first steps are slow and should be forgotten."""
        before = self._seconds_per_step
        self._seconds_per_step = seconds_per_step if before is None else 0.8 * before + 0.2 * seconds_per_step
        return self._seconds_per_step


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator; on the CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RU_MAXRSS_BYTES
