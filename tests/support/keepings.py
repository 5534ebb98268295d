"""What is kept for the backward pass: each way, alone, with one layer that keeps all, and with an MLP that stays where
the rest of its layer is in host memory."""

from __future__ import annotations

import pytest

from opensloth.memory_estimate import IN_HOST, Keep, Keeping

ALL_KEPT = Keeping(Keep.ALL)
EVERY = (
    ALL_KEPT,
    *(Keeping(keep, whole) for keep in (Keep.INPUTS, *IN_HOST) for whole in (0, 1)),
    Keeping(Keep.HOST, 2),
)
every_keeping = pytest.mark.parametrize("keeping", EVERY, ids=str)
