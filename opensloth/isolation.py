"""Which models can be packed, and the switch that makes packed documents invisible to each other.

Rules know architectures that leak; `opensloth.packing_check` then looks at what the model at hand computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from opensloth import attention
from opensloth.model import base_of, plain_attention

ATTENDING_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
"""Layer kinds that `opensloth.attention` isolates."""
TOKENWISE_LAYERS = frozenset({"dense", "sparse", "mlp", "moe"})
"""Layer kinds that mix no tokens. Whatever is in neither set may carry one document into the next."""


def isolate_documents(model: nn.Module, longest_document: int) -> str | None:
    """Switch the model to attention that packed documents cannot see through.

    longest_document: tokens of the longest document that will be packed.
    Returns None, or why this model cannot be packed; it is then left as it was.
    """
    base = base_of(model)
    reason = _obstacle(base, longest_document)
    if reason:
        return reason
    before = base.config._attn_implementation
    attention.register()
    base.set_attn_implementation(attention.NAME)
    reason = _refusal(model)
    if reason:
        base.set_attn_implementation(before)
    return reason


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """For as long as it is open the model computes as in evaluation; then each module is in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def attending_plainly(model: nn.Module) -> Iterator[None]:
    """For as long as it is open the model attends by transformers' own functions, as for rows of one document."""
    base = base_of(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(plain_attention(base.config))
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _obstacle(base: PreTrainedModel, longest_document: int) -> str | None:
    kind = base.config.model_type
    config = base.config.get_text_config()
    leaking = set(getattr(config, "layer_types", None) or ()) - ATTENDING_LAYERS - TOKENWISE_LAYERS
    named = f" ({', '.join(sorted(leaking))})" if leaking else ""
    if getattr(base, "_is_stateful", False):
        return f"{kind} has layers{named} whose state runs on from one document into the next"
    if leaking:
        return f"{kind} has layers{named} that are not known to keep documents apart"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{kind} has an attention that cannot be replaced by one that respects documents"
    rope, original = _length_keyed_rope(config)
    if rope and longest_document > original:
        return (
            f"the rotary embedding of {kind} ({rope}) changes for every document of a row as soon as one of them is "
            f"over {original} tokens, and the longest has {longest_document}"
        )
    return None


def _length_keyed_rope(config: Any) -> tuple[str, int]:
    """(kind, tokens up to which it is constant) of a rotary embedding that goes by the longest position, or ("", 0)."""
    given = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in given.values() if isinstance(value, dict)]
    for rope in by_layer_type or [given]:
        kind = str(rope.get("rope_type", "default"))
        if kind == "longrope":
            return kind, int(rope["original_max_position_embeddings"])
        if "dynamic" in kind:
            return kind, int(config.max_position_embeddings)
    return "", 0


def _refusal(model: nn.Module) -> str | None:
    """What a row of two short documents shows: some models ask for masks or sinks, or hand no offsets on."""
    attended: set[int | None] = set()
    masked: set[int | None] = set()

    def attend(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        attended.add(sliding_window)
        return attention.packed_attention(*args, sliding_window=sliding_window, **kwargs)

    def mask(*_: Any, local_size: int | None = None, **__: Any) -> None:
        masked.add(local_size)

    attention.register(attend, mask)
    try:
        with torch.no_grad(), without_dropout(model):
            model(**_two_documents(base_of(model).device), use_cache=False)
    except (NotImplementedError, TypeError, ValueError) as error:
        return f"{base_of(model).config.model_type} cannot attend by documents: {error}"
    finally:
        attention.register()
    unsaid = masked - attended - {None}
    if unsaid:
        return (
            f"{base_of(model).config.model_type} keeps its window of {unsaid.pop()} tokens in a mask, and has no other"
        )
    return None


def _two_documents(device: torch.device) -> dict[str, Any]:
    return {
        "input_ids": torch.zeros(1, 3, dtype=torch.long, device=device),
        "position_ids": torch.tensor([[0, 1, 0]], device=device),
        "document_offsets": torch.tensor([0, 2, 3], dtype=torch.int32, device=device),
        "longest_document": 2,
    }
