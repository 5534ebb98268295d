"""The arithmetic that a training step cannot do without, and how fast this device multiplies: what MFU is made of.

Counted is what the loss and its gradient take: two operations for each weight and token forward, two for the
gradient of the inputs, two more for a weight that is trained; frozen weights under an adapter take four, not six.
Attention counts the half of each document's square that is seen; the head, and the last layer's MLP, only positions
that predict a target: nobody else reads what they make.
Recomputing counts for nothing: it is a means, not the work.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opensloth.data.batch import Batch
from opensloth.isolation import ATTENDING_LAYERS
from opensloth.model import base_of

_FORWARD, _INPUTS, _WEIGHTS = 2, 2, 2
_SIZE = 4096
_PRODUCTS = 20


@dataclass(frozen=True)
class Work:
    """Operations for each token, for each target, and for each token squared of a document's length."""

    token: float
    target: float
    squared: float

    def of(self, batch: Batch) -> float:
        """Operations of one batch, forward and backward."""
        return self.token * batch.tokens + self.target * len(batch.targets) + self.squared * _squares(batch)


def work_of(model: nn.Module) -> Work | None:
    """None where a token does not meet every weight, or does not attend in every layer: that is not counted."""
    config: Any = base_of(model).config.get_text_config()
    heads, layers = (getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    kinds = set(getattr(config, "layer_types", None) or ())
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    head: Any = base_of(model).get_output_embeddings()
    if experts or head is None or not isinstance(heads, int) or not layers or kinds - ATTENDING_LAYERS:
        return None
    embeddings: Any = base_of(model).get_input_embeddings()
    of_all = sum(
        _operations(weight)
        for weight in model.parameters()
        if weight.ndim == 2 and weight is not embeddings.weight and weight is not head.weight
    )
    of_targets = sum(_operations(weight) for weight in _last_mlp(model) if weight.ndim == 2)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Work(of_all - of_targets, of_targets + _operations(head.weight), 3 * _FORWARD * layers * heads * size)


def _last_mlp(model: nn.Module) -> list[nn.Parameter]:
    """Its weights; none where layers do not lie where those of most models do."""
    layers: Any = getattr(getattr(base_of(model), "model", None), "layers", None)
    mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
    return [] if mlp is None else list(mlp.parameters())


def _operations(weight: torch.Tensor) -> int:
    values = weight.numel()
    if getattr(weight, "quant_state", None) is not None:
        values *= 2 * weight.element_size()  # two of 4 bits lie in a byte
    return values * (_FORWARD + _INPUTS + (_WEIGHTS if weight.requires_grad else 0))


def _squares(batch: Batch) -> float:
    offsets = batch.inputs.get("document_offsets")
    lengths = offsets.diff() if offsets is not None else batch.inputs["attention_mask"].sum(1)
    return float(lengths.double().pow(2).sum())


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of large matrix products on this very device; None on a CPU. Takes some milliseconds once."""
    if device.type != "cuda":
        return None
    one, other = (torch.randn(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    for _ in range(3):
        torch.mm(one, other, out=out)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(_PRODUCTS):
        torch.mm(one, other, out=out)
    torch.cuda.synchronize(device)
    return _PRODUCTS * 2 * _SIZE**3 / (time.perf_counter() - started)
