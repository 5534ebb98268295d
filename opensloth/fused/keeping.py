"""What is kept between the forward and the backward pass: memory against time."""

from __future__ import annotations

import os
from typing import Any

from opensloth import memory_estimate
from opensloth.launch import machine
from opensloth.memory_estimate import IN_HOST, Batch, Keep, Keeping, Method
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS

_MOMENTS_BYTES = 12
"""Of a trained weight: AdamW's, and a root of one while it steps. No optimizer takes more."""
_SHARE = 4
"""All of a node's processes together put into one part in so many of its memory what does not fit on their GPUs."""


def roomiest(config: Any, tokens: int, free: int, *, rank: int, in_host: bool = False) -> Keeping:
    """The fastest choice that fits.

    config: the model's. tokens: of a batch. free: bytes on the device, with the model loaded and nothing else.
    rank: of its adapter; 0: every weight is trained. in_host: of the choices that keep something in host memory.
    """
    shape = ModelShape.from_config(config.to_dict())
    method = Method(rank, LORA_TARGETS, shape.bits, _MOMENTS_BYTES, fused=True)
    choices = [keep for keep in (IN_HOST if in_host else Keep) if _host_has_room(shape, method, tokens, keep)]
    left = free - memory_estimate.to_come(shape, method)
    return memory_estimate.roomiest(shape, method, Batch(tokens, tokens), left, choices) or Keeping(Keep.HOST_INPUTS)


def _host_has_room(shape: ModelShape, method: Method, tokens: int, keep: Keep) -> bool:
    """As far as it is known; inputs alone always have."""
    if keep is not Keep.HOST or (usable := machine.usable_memory()) is None:
        return True
    of_layer = tokens * memory_estimate.parked_bytes(shape, method, keep)
    pinned = 1 << (of_layer - 1).bit_length()  # torch rounds up what is pinned
    return shape.layers * pinned * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * _SHARE <= usable
