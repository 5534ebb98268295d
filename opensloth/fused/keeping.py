"""What is kept between the forward and the backward pass: memory against time."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Keep(Enum):
    """ALL: all that the backward pass reads. INPUTS: the layers' inputs; the rest is computed again.

    HOST: as INPUTS, in host memory.
    """

    ALL = "all"
    INPUTS = "inputs"
    HOST = "inputs in host memory"


def roomiest(config: Any, tokens: int, free: int) -> Keep:
    """The fastest choice that fits. config: the model's. tokens: of a batch. free: bytes on the device."""
    layers: int = config.num_hidden_layers
    for keep, bytes_of_a_token in ((Keep.ALL, _all(config)), (Keep.INPUTS, 2 * config.hidden_size)):
        if layers * bytes_of_a_token * tokens < _SHARE * free:
            return keep
    return Keep.HOST


_SHARE = 0.7
"""Of the free memory; the rest is for logits, the optimizer, and one layer at work."""


def _all(config: Any) -> int:
    """Bytes that a layer keeps of a token: x, both norms' outputs, y, qkv, attention's output, gate and up."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended = config.num_attention_heads * head
    return 2 * (
        4 * config.hidden_size + 2 * attended + 2 * config.num_key_value_heads * head + 2 * config.intermediate_size
    )
