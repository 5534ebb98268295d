"""Causal attention inside documents that lie end to end, in tiles of one document each.

The grid goes over tiles, not over (longest document) x (documents): its cost is that of the documents there are,
whatever their lengths, and nothing is compiled or launched by the longest. Key and value heads are read by all
query heads of their group, never expanded. No sum is made by atomics: the same inputs give the same bits.

Scores are kept in powers of two: exp(a) = 2 ** (a * log2(e)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensloth.fused.operations import LOG2_E, Heads
from opensloth.fused.operations import TILE as BLOCK

_ROWS = 32
"""Tokens whose groups one program sums."""


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr,
    stride_qkv, stride_out, tokens, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(tiles_ptr + tile * 3)
    document = tl.load(tiles_ptr + tile * 3 + 1)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    dim = tl.arange(0, DIM)
    rows = begin + tl.arange(0, BLOCK)
    row_ok = rows < end
    kv_head = head // GROUP
    q_at = q_ptr + rows[:, None].to(tl.int64) * stride_qkv + head * DIM + dim[None, :]
    q = tl.load(q_at, mask=row_ok[:, None], other=0.0)
    total = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    highest = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK], dtype=tl.float32)
    for at in range(document, begin, BLOCK):  # whole tiles before this one: every query sees all of them
        columns = at + tl.arange(0, BLOCK)
        kv_at = columns[:, None].to(tl.int64) * stride_qkv + kv_head * DIM + dim[None, :]
        k = tl.load(k_ptr + kv_at)
        v = tl.load(v_ptr + kv_at)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        risen = tl.maximum(highest, tl.max(scores, 1))
        shrunk = tl.exp2(highest - risen)
        p = tl.exp2(scores - risen[:, None])
        weight = weight * shrunk + tl.sum(p, 1)
        total = total * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        highest = risen
    kv_at = rows[:, None].to(tl.int64) * stride_qkv + kv_head * DIM + dim[None, :]
    k = tl.load(k_ptr + kv_at, mask=row_ok[:, None], other=0.0)
    v = tl.load(v_ptr + kv_at, mask=row_ok[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(rows[:, None] >= rows[None, :], scores, -float("inf"))
    risen = tl.maximum(highest, tl.max(scores, 1))
    shrunk = tl.exp2(highest - risen)
    p = tl.exp2(scores - risen[:, None])
    weight = weight * shrunk + tl.sum(p, 1)
    total = total * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    out_at = out_ptr + rows[:, None].to(tl.int64) * stride_out + head * DIM + dim[None, :]
    tl.store(out_at, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=row_ok[:, None])
    tl.store(lse_ptr + head.to(tl.int64) * tokens + rows, risen + tl.log2(weight), mask=row_ok)


@triton.jit
def _backward_query(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    stride_qkv, stride_out, stride_grad, stride_dqkv, tokens, scale, plain_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta[head, token], for keys and values: sum over the head of output times its gradient."""
    tile, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(tiles_ptr + tile * 3)
    document = tl.load(tiles_ptr + tile * 3 + 1)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    dim = tl.arange(0, DIM)
    rows = begin + tl.arange(0, BLOCK)
    row_ok = rows < end
    kv_head = head // GROUP
    at_row = rows[:, None].to(tl.int64)
    q = tl.load(q_ptr + at_row * stride_qkv + head * DIM + dim[None, :], mask=row_ok[:, None], other=0.0)
    grad = tl.load(grad_ptr + at_row * stride_grad + head * DIM + dim[None, :], mask=row_ok[:, None], other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * tokens + rows, mask=row_ok, other=float("inf"))
    out = tl.load(out_ptr + at_row * stride_out + head * DIM + dim[None, :], mask=row_ok[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * tokens + rows, delta, mask=row_ok)
    dq = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    for at in range(document, begin, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        kv_at = columns[:, None].to(tl.int64) * stride_qkv + kv_head * DIM + dim[None, :]
        k = tl.load(k_ptr + kv_at)
        v = tl.load(v_ptr + kv_at)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    kv_at = at_row * stride_qkv + kv_head * DIM + dim[None, :]
    k = tl.load(k_ptr + kv_at, mask=row_ok[:, None], other=0.0)
    v = tl.load(v_ptr + kv_at, mask=row_ok[:, None], other=0.0)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    dq_at = dq_ptr + at_row * stride_dqkv + head * DIM + dim[None, :]
    tl.store(dq_at, (dq * plain_scale).to(dq_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def _backward_key_value(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr,
    stride_qkv, stride_grad, stride_part, tokens, scale, plain_scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query head has to say to the keys and values of a tile."""
    tile, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(tiles_ptr + tile * 3)
    end = tl.load(tiles_ptr + tile * 3 + 2)
    dim = tl.arange(0, DIM)
    columns = begin + tl.arange(0, BLOCK)
    column_ok = columns < end
    kv_at = columns[:, None].to(tl.int64) * stride_qkv + (head // GROUP) * DIM + dim[None, :]
    k = tl.load(k_ptr + kv_at, mask=column_ok[:, None], other=0.0)
    v = tl.load(v_ptr + kv_at, mask=column_ok[:, None], other=0.0)
    dk = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK, DIM], dtype=tl.float32)
    for at in range(begin, end, BLOCK):
        rows = at + tl.arange(0, BLOCK)
        row_ok = rows < end
        at_row = rows[:, None].to(tl.int64)
        q = tl.load(q_ptr + at_row * stride_qkv + head * DIM + dim[None, :], mask=row_ok[:, None], other=0.0)
        grad = tl.load(grad_ptr + at_row * stride_grad + head * DIM + dim[None, :], mask=row_ok[:, None], other=0.0)
        lse = tl.load(lse_ptr + head.to(tl.int64) * tokens + rows, mask=row_ok, other=float("inf"))
        delta = tl.load(delta_ptr + head.to(tl.int64) * tokens + rows, mask=row_ok, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        p = tl.where(rows[None, :] >= columns[:, None], p, 0.0)
        dv += tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    out_at = columns[:, None].to(tl.int64) * stride_part + head * DIM + dim[None, :]
    tl.store(dk_ptr + out_at, (dk * plain_scale).to(dk_ptr.dtype.element_ty), mask=column_ok[:, None])
    tl.store(dv_ptr + out_at, dv.to(dv_ptr.dtype.element_ty), mask=column_ok[:, None])


@triton.jit
def _sum_groups(
    part_ptr, dk_ptr, dv_ptr, stride_part, stride_out, tokens,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum over the query heads of each group, in their order: of keys, then of values, which lie `tokens` rows on."""
    rows, kv_head, which = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.program_id(2)
    ok = (rows < tokens)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    at_row = rows[:, None].to(tl.int64)
    part_at = part_ptr + (at_row + which * tokens) * stride_part + kv_head * GROUP * DIM + dim
    total = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for member in tl.static_range(GROUP):
        total += tl.load(part_at + member * DIM, mask=ok, other=0.0).to(tl.float32)
    out_ptr = dk_ptr if which == 0 else dv_ptr
    tl.store(out_ptr + at_row * stride_out + kv_head * DIM + dim, total.to(out_ptr.dtype.element_ty), mask=ok)


def forward(qkv: Tensor, tiles: Tensor, heads: Heads, out: Tensor, lse: Tensor) -> None:
    """As `operations.attention`; out and lse are written."""
    q, k, v = _parts(qkv, heads)
    _forward[(tiles.shape[0], heads.query)](
        q, k, v, out, lse, tiles, qkv.stride(0), out.stride(0), qkv.shape[0], heads.scale * LOG2_E,
        GROUP=heads.group, DIM=_dim(qkv, heads), BLOCK=BLOCK, PRECISION=_precision(qkv),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, heads: Heads, dqkv: Tensor) -> None:
    """As `operations.attention_backward`."""
    tokens, dim, group = qkv.shape[0], _dim(qkv, heads), heads.group
    q, k, v = _parts(qkv, heads)
    dq, dk, dv = _parts(dqkv, heads)
    scales = (tokens, heads.scale * LOG2_E, heads.scale)
    shape = {"GROUP": group, "DIM": dim, "BLOCK": BLOCK, "PRECISION": _precision(qkv), "num_warps": 4}
    grid, delta, ahead = (tiles.shape[0], heads.query), torch.empty_like(lse), 3 if dim <= 64 else 1
    _backward_query[grid](
        q, k, v, out, grad, lse, delta, dq, tiles,
        qkv.stride(0), out.stride(0), grad.stride(0), dqkv.stride(0), *scales, **shape, num_stages=ahead,
    )  # fmt: skip
    given, strides = (q, k, v, grad, lse, delta), (qkv.stride(0), grad.stride(0))
    if group == 1:
        _backward_key_value[grid](*given, dk, dv, tiles, *strides, dqkv.stride(0), *scales, **shape, num_stages=1)
        return
    parts = torch.empty(2, tokens, heads.query * dim, dtype=qkv.dtype, device=qkv.device)
    _backward_key_value[grid](*given, *parts, tiles, *strides, parts.stride(1), *scales, **shape, num_stages=1)
    _sum_groups[(triton.cdiv(tokens, _ROWS), heads.key_value, 2)](
        parts, dk, dv, parts.stride(1), dqkv.stride(0), tokens, GROUP=group, DIM=dim, ROWS=_ROWS, num_warps=4
    )


def _dim(qkv: Tensor, heads: Heads) -> int:
    return qkv.shape[1] // (heads.query + 2 * heads.key_value)


def _parts(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views that begin at queries, keys and values."""
    dim = _dim(qkv, heads)
    return qkv, qkv[:, heads.query * dim :], qkv[:, (heads.query + heads.key_value) * dim :]


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.element_size() == 4 else "tf32"
