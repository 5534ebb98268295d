"""Attention inside long documents by cuDNN's kernels, which are faster there than tiles of documents of any length.

Each is copied to places of its own, with room behind it: kernels are made for lengths, and captured with them, so these
have to come again. No token sees the room, since it comes later, and the room's gradient is zero.

cuDNN adds up gradients of queries in whatever order they come: the same batch need not give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensloth.errors import one_line
from opensloth.fused import operations
from opensloth.fused.inputs import long_documents_of
from opensloth.fused.operations import LOG2_E, Documents, Heads, LongDocuments
from opensloth.model_shape import ModelShape
from opensloth.speed_estimate import LONG_DOCUMENT

LEAST = LONG_DOCUMENT
"""Tokens from which on a document is long."""
_HOPPER = 9
"""Its compute capability."""
_TRIED, _FAR = 700, 140.0
"""Tokens of the document by which cuDNN is tried, and what is added to its scores or taken from them."""
_BOUND = 0.03
"""Relative L2 distance from our own kernels, both in bfloat16."""


def attention(qkv: Tensor, long: LongDocuments, heads: Heads, out: Tensor, lse: Tensor) -> None:
    """As `operations.attention`: rows of `out`, and columns of `lse`, of long documents are written."""
    sums = []
    for rows in long.rows.split(long.lengths):
        attended, of_one = _attend(_in_places(qkv, rows), heads)
        operations.scatter(attended, rows, out)
        sums.append(of_one)
    lse.copy_(torch.where(long.places >= 0, torch.cat(sums, 1)[:, long.places.clamp(min=0)], lse))


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, long: LongDocuments, heads: Heads, dqkv: Tensor
) -> None:
    """As `operations.attention_backward`: rows of `dqkv` of long documents are written."""
    for rows in long.rows.split(long.lengths):
        sums = torch.where(rows >= 0, lse[:, rows.clamp(min=0)], 0.0)
        found = _attend_backward(_in_places(grad, rows), _in_places(qkv, rows), _in_places(out, rows), sums, heads)
        widths = [part.shape[1] for part in found]
        for part, place in zip(found, dqkv.split(widths, dim=1), strict=True):
            operations.scatter(part, rows, place)
        del found, part  # before the next one's are made


def _in_places(matrix: Tensor, rows: Tensor) -> Tensor:
    """[n, width], zeros in room."""
    out = matrix.new_empty(len(rows), matrix.shape[1])
    operations.gather(matrix, rows, out)
    return out


def _attend(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """(out, lse) of one document, as `operations.attend` has them."""
    if not qkv.is_cuda:
        return operations.attend(qkv, heads)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_queries_keys_values(qkv, heads), None, True, 0.0, True, False, scale=heads.scale
    )
    return _by_token(found[0]), found[1].reshape(heads.query, -1) * LOG2_E


def _attend_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Parts, side by side, of what `operations.attend_backward` returns. grad, out: dense, since cuDNN misreads these
    two, and only these, where rows lie in a wider buffer (torch 2.11: it wrote outside of its memory).
    """
    if not qkv.is_cuda:
        return (operations.attend_backward(grad, qkv, out, lse, heads),)
    count, natural = len(qkv), (lse / LOG2_E)[None, :, :, None]
    unused = torch.empty((), dtype=torch.int64, device=qkv.device)  # what only dropout reads
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _by_head(grad, heads.query), *_queries_keys_values(qkv, heads), _by_head(out, heads.query), natural,
        unused, unused, None, None, None, count, count, 0.0, True, scale=heads.scale,
    )  # fmt: skip
    return tuple(_by_token(part) for part in found)


def _queries_keys_values(qkv: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Each [1, heads, n, D], nothing copied. qkv: [n, (query + 2 key_value) * D]."""
    counts = (heads.query, heads.key_value, heads.key_value)
    return _by_head(qkv, sum(counts)).split(counts, dim=1)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """[n, heads * D] as [1, heads, n, D]."""
    return rows.unflatten(1, (heads, -1))[None].transpose(1, 2)


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
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return "cuDNN's kernels were compared on Hopper only"
    try:
        off = difference(device, heads, size, _TRIED)
    except (RuntimeError, TypeError, AttributeError) as error:  # of private functions, which may come to differ
        return f"cuDNN's attention fails ({one_line(str(error).partition(chr(10))[0])})"
    return None if off < _BOUND else f"cuDNN computes something else ({off:.3g} off)"


def difference(device: torch.device, heads: Heads, size: int, tokens: int) -> float:
    """How far from our own kernels are cuDNN's, captured and replayed, by the largest relative L2 distance.

    Of output, sums and gradient of one document of so many random tokens: by turns with scores far below zero and far
    above it.
    """
    generator = torch.Generator(device).manual_seed(0)
    widths = (heads.query + 2 * heads.key_value) * size, heads.query * size
    qkv, grad = (torch.randn(tokens, width, device=device, generator=generator).bfloat16() for width in widths)
    queries, keys, _ = (part[0] for part in _queries_keys_values(qkv, heads))  # [heads, n, D], views
    apart = math.sqrt(_FAR / (size * heads.scale))
    queries += apart
    keys[0::2] -= apart
    keys[1::2] += apart
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        expected = _computed(grad, qkv, _tiled(tokens, device), heads)
        documents, graph = _long(tokens, device), torch.cuda.CUDAGraph()
        _computed(grad, qkv, documents, heads)  # kernels are chosen, which must not happen while they are captured
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = _computed(grad, qkv, documents, heads)
        graph.replay()
        return farthest(found, expected)


def farthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 distance; NaN if any is."""
    offs = [
        (one.float() - other.float()).norm() / other.float().norm() for one, other in zip(found, expected, strict=True)
    ]
    return float(torch.stack(offs).max())


def _tiled(tokens: int, device: torch.device) -> Documents:
    """One document that is not long."""
    nothing, tiles = torch.empty(0), operations.tiles_of(np.array([0, tokens]))
    return Documents([0, tokens], torch.from_numpy(tiles).to(device), nothing, nothing)


def _long(tokens: int, device: torch.device) -> Documents:
    """One that is."""
    nothing, one = torch.empty(0), long_documents_of([(0, tokens)], tokens)
    moved = LongDocuments(one.lengths, one.rows.to(device), one.places.to(device))
    return Documents([0, tokens], torch.empty(0, 3, dtype=torch.int32), nothing, nothing, moved)


def _computed(grad: Tensor, qkv: Tensor, documents: Documents, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, gradient of qkv)."""
    out, dqkv = torch.empty_like(grad), torch.empty_like(qkv)
    lse = operations.attention(qkv, documents, heads, out)
    operations.attention_backward(grad, qkv, out, lse, documents, heads, dqkv)
    return out, lse, dqkv
