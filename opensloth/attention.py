"""Attention that never crosses a document boundary, for rows in which whole documents lie end to end.

Registered with transformers as the implementation "opensloth"; a model loaded with it is called with
`document_offsets` and `longest_document` besides its usual inputs, and with position_ids that restart at 0
in each document. No mask is built: on CUDA torch's variable-length flash kernel takes the offsets, elsewhere
each document is attended by itself, which is exact and costs the sum of the squared lengths.

Shapes: H query heads, K key-value heads, T tokens of all documents, D head size, N documents.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "opensloth"
"""What `attn_implementation` is given."""

VARLEN_DTYPES = (torch.bfloat16, torch.float16)


def packed_attention(  # noqa: PLR0913 - transformers' interface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_offsets: Tensor | None = None,
    longest_document: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, with transformers' interface for attention functions.

    query: [1, H, T, D]; key, value: [1, K, T, D].
    document_offsets: int32[N + 1], from 0 to T, on the query's device.
    longest_document: tokens, at least the longest document's.
    Returns [1, T, H, D] and no weights.
    Raises ValueError for what it would get wrong: no offsets, several lines, keys of a cache; NotImplementedError
    for what it does not have.
    """
    if document_offsets is None or longest_document is None:
        raise ValueError(f"{type(module).__name__} was given no document_offsets and longest_document")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f'attention "opensloth" takes one line of documents and no cache, got queries {list(query.shape)} '
            f"and keys {list(key.shape)}"
        )
    if attention_mask is not None or unused.get("s_aux") is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{type(module).__name__} asks for a mask, sinks or non-causal attention")
    if torch.is_autocast_enabled(query.device.type):  # weights in float32 leave norms and rotary embeddings in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if query.is_cuda and query.dtype in VARLEN_DTYPES and not softcap and not dropout:
        attended = _varlen(query, key, value, document_offsets, longest_document, scaling, sliding_window)
    else:
        attended = _one_by_one(query, key, value, document_offsets, scaling, dropout, sliding_window, softcap)
    return attended, None


def no_mask(*_: Any, **__: Any) -> None:
    """transformers' mask function: isolation comes from the offsets."""


def register(attend: Callable[..., Any] = packed_attention, mask: Callable[..., Any] = no_mask) -> None:
    """Make the implementation known to transformers, in the place of what was registered before."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # [1, heads, T, D] -> [T, heads, D]; the kernel wants a dense last dimension.
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    attend: Callable[..., Any] = varlen_attn
    if q.shape[1] != k.shape[1]:
        if _varlen_takes_gqa():
            attend = functools.partial(attend, enable_gqa=True)
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    left = -1 if window is None else window - 1
    attended: Tensor = attend(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(left, 0))
    return attended.unsqueeze(0)


@functools.cache
def _varlen_takes_gqa() -> bool:
    """torch 2.11 does not yet; later versions do."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attended = []
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != query.shape[2]:
        raise ValueError(f"document_offsets go from {bounds[0]} to {bounds[-1]}, the tokens from 0 to {query.shape[2]}")
    for begin, end in itertools.pairwise(bounds):
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        mask = _window_mask(end - begin, window, query.device)
        if softcap:
            attended.append(_softcapped(q, k, v, mask, scale, softcap, dropout))
        else:
            attended.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
                )
            )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()  # as the others do: some models view it


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool[length, length], true where a query may look; None when the window is longer than the document."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    """Attention with scores bent to +-softcap (Gemma 2), which the fused kernels do not offer here."""
    length = q.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=dropout) @ v
