"""What is kept between the forward and the backward pass: memory against time."""

from __future__ import annotations

from typing import Any

from opensloth import memory_estimate
from opensloth.memory_estimate import Batch, Keep, Keeping, Method
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS

_MOMENTS_BYTES = 12
"""Of a trained weight: AdamW's, and a root of one while it steps. No optimizer takes more."""


def roomiest(config: Any, tokens: int, free: int, *, rank: int) -> Keeping:
    """The fastest choice that fits.

    config: the model's. tokens: of a batch. free: bytes on the device, with the model loaded and nothing else.
    rank: of its adapter; 0: every weight is trained.
    """
    shape = ModelShape.from_config(config.to_dict())
    method = Method(rank, LORA_TARGETS, shape.bits, _MOMENTS_BYTES, fused=True)
    left = free - memory_estimate.to_come(shape, method)
    return memory_estimate.roomiest(shape, method, Batch(tokens, tokens), left) or Keeping(Keep.HOST)
