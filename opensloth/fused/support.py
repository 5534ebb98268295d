"""What the fast path can train, and why it cannot train what it cannot."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from opensloth.model import base_of
from opensloth.model_shape import EXACT, ModelShape
from opensloth.opensloth_config import LORA_TARGETS

FOUR_BITS = "Linear4bit"
"""bitsandbytes' layer, by name: the package may be missing."""


def reason_against(
    model: nn.Module, *, packed: bool, longest_document: int, autocast: torch.dtype | None
) -> str | None:
    """Why `model` must be trained by the plain engine; None when the fast one computes the same."""
    reason = _machine(model, packed, autocast) or reason_against_model(model, longest_document)
    return reason or _adapters(model)


def _machine(model: nn.Module, packed: bool, autocast: torch.dtype | None) -> str | None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    if not packed:
        return "the rows are not packed"
    expected = torch.bfloat16 if hasattr(model, "peft_config") else torch.float32
    if autocast is not torch.bfloat16 or base_of(model).dtype is not expected:
        return "it computes in bfloat16 only"
    return None


def reason_against_model(model: nn.Module, longest_document: int) -> str | None:
    """Why the architecture is not one that the fast path knows; None when it is."""
    config: Any = base_of(model).config
    if config.model_type not in EXACT:
        return f"it does not know {config.model_type} models"
    try:
        shape = ModelShape.from_config(config.to_dict())
    except ValueError as error:
        return str(error)
    if shape.reason_against_fused is None and shape.window is not None and shape.window < longest_document:
        return f"documents of up to {longest_document} tokens are longer than the attention window of {shape.window}"
    return shape.reason_against_fused


def _adapters(model: nn.Module) -> str | None:
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    if not adapters:
        whole = all(p.requires_grad and p.dtype is torch.float32 for p in model.parameters())
        return None if whole else "only some of the weights are trained"
    if len(adapters) != 1:
        return "there is more than one adapter"
    (lora,) = adapters.values()
    if lora.peft_type != "LORA":
        return f"it does not know {getattr(lora.peft_type, 'value', lora.peft_type)} adapters"
    if lora.lora_dropout:
        return "it has no adapter dropout"
    if lora.use_dora or lora.lora_bias or lora.bias != "none" or lora.modules_to_save:
        return "the adapter trains more than two low-rank matrices"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, kind = name.partition(".lora_")
            if layer.rpartition(".")[2] not in LORA_TARGETS or kind[:1] not in "AB":
                return f"the adapter trains {name}"
            if parameter.dtype is not torch.float32:
                return "the adapter is not float32"
    return _precision(model)


def _precision(model: nn.Module) -> str | None:
    kinds = {
        type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and ".lora_" not in name
    }
    if kinds - {"Linear", FOUR_BITS}:
        return f"its linear layers are {', '.join(sorted(kinds))}"
    if type(base_of(model).lm_head) is not nn.Linear:
        return "its head is quantised"
    return "only some of its linear layers are in 4 bits" if len(kinds) > 1 else None
