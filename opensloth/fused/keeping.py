"""What is kept between the forward and the backward pass: memory against time."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Keep(Enum):
    """ALL: all that the backward pass reads. ATTENTION: the MLPs are computed again. INPUTS: the layers' inputs;
    the rest is computed again. HOST: as INPUTS, in host memory.
    """

    ALL = "all"
    ATTENTION = "all but the MLPs'"
    INPUTS = "inputs"
    HOST = "inputs in host memory"


def roomiest(config: Any, tokens: int, free: int) -> Keep:
    """The fastest choice that fits. config: the model's. tokens: of a batch. free: bytes on the device."""
    layers: int = config.num_hidden_layers
    return next((keep for keep, size in _bytes(config).items() if layers * size * tokens < _SHARE * free), Keep.HOST)


_SHARE = 0.7
"""Of the free memory; the rest is for logits, the optimizer, and one layer at work."""


def _bytes(config: Any) -> dict[Keep, int]:
    """What a layer keeps of a token, in 16 bits."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended, width = config.num_attention_heads * head, config.hidden_size
    qkv = attended + 2 * config.num_key_value_heads * head
    copies = 2 if config.model_type == "qwen3" else 1  # before and after the norm of its heads
    half = 3 * width + copies * qkv + attended  # x, normed, qkv, attention's output, y
    return {
        Keep.ALL: 2 * (half + width + 2 * config.intermediate_size),
        Keep.ATTENTION: 2 * half,
        Keep.INPUTS: 2 * width,
    }
