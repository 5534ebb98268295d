"""Attention inside long documents by cuDNN's kernels, which are faster there than tiles of documents of any length.

Each is copied to places of its own, with room behind it: kernels are made for lengths, and captured with them, so these
have to come again. No token sees the room, since it comes later, and the room's gradient is zero.

cuDNN adds up gradients of queries in whatever order they come: the same batch need not give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensloth.fused import operations
from opensloth.fused.operations import Documents, Heads, LongDocuments
from opensloth.model_shape import ModelShape

LEAST = 8192
"""Tokens from which on a document is long."""
_TRIED = 700
"""Tokens of the document by which cuDNN is tried."""
_BOUND = 0.02
"""Relative L2 distance from our own kernels, both in bfloat16."""
_LOG2_E = 1 / math.log(2)


def attention(qkv: Tensor, long: LongDocuments, heads: Heads, out: Tensor, lse: Tensor) -> None:
    """As `operations.attention`: rows of `out`, and columns of `lse`, of long documents are written."""
    alone = _in_places(qkv, long)
    of_each = [_attend(one, heads) for one in alone.split(long.lengths)]
    outs, sums = zip(*of_each, strict=True)
    operations.gather(_joined(outs), long.places, out, leave=True)
    lse.copy_(torch.where(long.places >= 0, torch.cat(sums, 1)[:, long.places.clamp(min=0)], lse))


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, long: LongDocuments, heads: Heads, dqkv: Tensor
) -> None:
    """As `operations.attention_backward`: rows of `dqkv` of long documents are written."""
    grads, qkvs, outs = (_in_places(matrix, long).split(long.lengths) for matrix in (grad, qkv, out))
    sums = torch.where(long.rows >= 0, lse[:, long.rows.clamp(min=0)], 0.0).split(long.lengths, dim=1)
    of_each = [_attend_backward(*one, heads) for one in zip(grads, qkvs, outs, sums, strict=True)]
    operations.gather(_joined(of_each), long.places, dqkv, leave=True)


def _in_places(matrix: Tensor, long: LongDocuments) -> Tensor:
    """[S, width], zeros in room."""
    out = matrix.new_empty(len(long.rows), matrix.shape[1])
    operations.gather(matrix, long.rows, out)
    return out


def _joined(parts: Any) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """(out, lse) of one document, as `operations.attend` has them."""
    if not qkv.is_cuda:
        return operations.attend(qkv, heads)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_by_head(qkv, heads), None, True, 0.0, True, False, scale=heads.scale
    )
    return _by_token(found[0]), found[1].reshape(heads.query, -1) * _LOG2_E


def _attend_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: Heads) -> Tensor:
    """As `operations.attend_backward`."""
    if not qkv.is_cuda:
        return operations.attend_backward(grad, qkv, out, lse, heads)
    count, natural = len(qkv), (lse / _LOG2_E)[None, :, :, None]
    unused = torch.empty((), dtype=torch.int64, device=qkv.device)  # what only dropout reads
    whole, given = Heads(heads.query, 0, heads.scale), _by_head(qkv, heads)
    (g, *_), (o, *_) = _by_head(grad, whole), _by_head(out, whole)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        g, *given, o, natural, unused, unused, None, None, None, count, count, 0.0, True, scale=heads.scale
    )
    return torch.cat([_by_token(part) for part in found], dim=1)


def _by_head(rows: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Queries, keys and values of [n, (query + 2 key_value) * D], each [1, heads, n, D], nothing copied."""
    counts = (heads.query, heads.key_value, heads.key_value)
    return rows.unflatten(1, (sum(counts), -1)).transpose(0, 1)[None].split(counts, dim=1)


def _by_token(heads: Tensor) -> Tensor:
    """[1, heads, n, D] as [n, heads * D]."""
    return heads[0].transpose(0, 1).flatten(1)


# --- whether it can be had -----------------------------------------------------------------------------


def least_for(base: Any, longest: int) -> tuple[int, str]:
    """Tokens from which on a document is to be treated as long, 0: none is; and what there is to say about that.

    base: transformers' model. longest: tokens, of all documents.
    """
    if longest < LEAST or base.device.type != "cuda":
        return 0, ""
    shape = ModelShape.from_config(base.config.to_dict())
    heads = Heads(shape.heads, shape.key_value_heads, shape.head**-0.5)
    reason = _reason_against(base.device, heads, shape.head)
    if reason is None:
        return LEAST, f"; documents of {LEAST:,} tokens and more attend by cuDNN's kernels"
    return 0, f"; long documents attend as others do: {reason}"


def _reason_against(device: torch.device, heads: Heads, size: int) -> str | None:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "on a GPU this old cuDNN was not compared"
    try:
        off = difference(device, heads, size, _TRIED)
    except (RuntimeError, TypeError, AttributeError) as error:  # of private functions, which may come to differ
        return f"cuDNN does not compute it ({str(error).splitlines()[0]})"
    return None if off < _BOUND else f"cuDNN computes something else ({off:.3g} off)"


def difference(device: torch.device, heads: Heads, size: int, tokens: int) -> float:
    """How far from our own kernels are cuDNN's, captured and replayed, by the largest relative L2 distance.

    Of output, sums and gradient of one document of so many random tokens.
    """
    generator = torch.Generator(device).manual_seed(0)
    widths = (heads.query + 2 * heads.key_value) * size, heads.query * size
    qkv, grad = (torch.randn(tokens, width, device=device, generator=generator).bfloat16() for width in widths)
    with torch.cuda.device(device):
        expected = _computed(grad, qkv, _tiled(tokens, device), heads)
        documents, graph = _long(tokens, device), torch.cuda.CUDAGraph()
        _computed(grad, qkv, documents, heads)  # kernels are chosen, which must not happen while they are captured
        with torch.cuda.graph(graph):
            found = _computed(grad, qkv, documents, heads)
        graph.replay()
        offs = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(found, expected, strict=True)]
        return max(float(off) for off in offs)


def _tiled(tokens: int, device: torch.device) -> Documents:
    """One document that is not long."""
    nothing, tiles = torch.empty(0), operations.tiles_of(np.array([0, tokens]))
    return Documents([0, tokens], torch.from_numpy(tiles).to(device), nothing, nothing)


def _long(tokens: int, device: torch.device) -> Documents:
    """One that is."""
    nothing, one = torch.empty(0), operations.long_documents_of([(0, tokens)], tokens)
    moved = LongDocuments(one.lengths, one.rows.to(device), one.places.to(device))
    return Documents([0, tokens], torch.empty(0, 3, dtype=torch.int32), nothing, nothing, moved)


def _computed(grad: Tensor, qkv: Tensor, documents: Documents, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, gradient of qkv)."""
    out, dqkv = torch.empty_like(grad), torch.empty_like(qkv)
    lse = operations.attention(qkv, documents, heads, out)
    operations.attention_backward(grad, qkv, out, lse, documents, heads, dqkv)
    return out, lse, dqkv
