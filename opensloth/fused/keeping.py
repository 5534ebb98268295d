"""What is kept between the forward and the backward pass: memory against time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opensloth import memory_estimate
from opensloth.flops import measured_peak
from opensloth.launch import machine
from opensloth.memory_estimate import IN_HOST, Batch, Keep, Keeping, Method
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS
from opensloth.speed_estimate import copies_keep_up

_MEASURED_BYTES, _MEASURED_TIMES = 1 << 26, 4
_SHARE = 4
"""All of a node's processes together put into one part in so many of its memory what does not fit on their GPUs."""


def roomiest(
    config: Any,
    tokens: int,
    free: int,
    *,
    rank: int,
    moments: float,
    in_host: bool = False,
    speeds: Callable[[], tuple[float, float] | None] = lambda: None,
) -> Keeping:
    """The first choice that fits, the fastest ones come first.

    config: the model's. tokens: of a batch. free: bytes on the device, with the model loaded and nothing else.
    rank: of its adapter; 0: every weight is trained. moments: as `Method` has it. in_host: of the choices that keep
    something in host memory.
    speeds: operations, and bytes to host memory, a second, if they are known; asked for when they matter.
    """
    shape = ModelShape.from_config(config.to_dict())
    method = Method(rank, LORA_TARGETS, shape.bits, moments, fused=True)
    left, batch = free - memory_estimate.to_come(shape, method), Batch(tokens, tokens)
    if not in_host and (found := memory_estimate.roomiest(shape, method, batch, left, (Keep.ALL,))):
        return found
    embeddings = memory_estimate.offloaded_embeddings(shape, method, Keep.HOST)
    of_layer = tokens * memory_estimate.offloaded_bytes(shape, method, Keep.HOST)
    has_room = host_has_room(*[of_layer] * shape.layers, embeddings)
    choices: Sequence[Keep] = IN_HOST
    if not in_host:
        known = speeds() if has_room else None
        keeps_up = known is not None and copies_keep_up(shape, method, *known)
        choices = memory_estimate.order(copies_keep_up=keeps_up)
    if not has_room:
        choices = [keep for keep in choices if keep is not Keep.HOST]
    offloads_embeddings = host_has_room(embeddings)
    found = memory_estimate.roomiest(shape, method, batch, left, choices, offloads_embeddings=offloads_embeddings)
    return found or Keeping(Keep.HOST_INPUTS)


def speeds_of(device: torch.device) -> tuple[float, float] | None:
    """Operations of large products, and bytes to host memory, a second; None on a CPU."""
    operations = measured_peak(device, torch.bfloat16)
    if operations is None:
        return None
    here = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, device=device)
    there = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, pin_memory=True)
    there.copy_(here)
    started = time.perf_counter()
    for _ in range(_MEASURED_TIMES):
        there.copy_(here)
    torch.cuda.synchronize(device)
    return operations, _MEASURED_TIMES * _MEASURED_BYTES / (time.perf_counter() - started)


def host_has_room(*blocks: int) -> bool:
    """For pinned blocks of so many bytes in every process of this node, as far as it is known."""
    if (usable := machine.usable_memory()) is None:
        return True
    pinned = sum(1 << (block - 1).bit_length() for block in blocks if block)  # torch rounds them up
    return pinned * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * _SHARE <= usable
