"""RMS norm, rotary positions and SwiGLU, forward and backward: each reads its inputs once and writes its outputs once.

All work on rows that may lie in a wider buffer: the stride of a row is an argument, its elements are dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDE = 1024
"""Elements of a SwiGLU row that one program does."""
_STRIPE, _COLUMNS = 64, 256
"""Rows and columns that one program sums for a norm's weight."""


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, stride_x, stride_out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    x = tl.load(x_ptr + row * stride_x + column, mask=ok, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + column, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _rms_norm_backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, residual_ptr, out_ptr, stride_grad, stride_x, stride_residual, stride_out,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    x = tl.load(x_ptr + row * stride_x + column, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    weighted = tl.load(grad_ptr + row * stride_grad + column, mask=ok, other=0.0).to(tl.float32) * weight
    rstd = tl.load(rstd_ptr + row)
    normed = x * rstd
    dx = rstd * (weighted - normed * (tl.sum(weighted * normed, 0) / WIDTH))
    if RESIDUAL:
        dx += tl.load(residual_ptr + row * stride_residual + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + column, dx.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _norm_gradient(
    grad_ptr, x_ptr, rstd_ptr, out_ptr, stride_grad, stride_x, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stripe of rows, summed by column."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < WIDTH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    for step in range(ROWS):
        row = begin + step
        here = ok & (row < tokens)
        grad = tl.load(grad_ptr + row * stride_grad + column, mask=here, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + column, mask=here, other=0.0).to(tl.float32)
        total += grad * x * tl.load(rstd_ptr + row, mask=row < tokens, other=0.0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * WIDTH + column, total, mask=ok)


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, stride_x, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)
    column = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + token * HALF + column)[None, :]
    sin = tl.load(sin_ptr + token * HALF + column)[None, :] * sign
    at = x_ptr + token * stride_x + head[:, None] * (2 * HALF) + column[None, :]
    ok = (head < HEADS)[:, None]
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=ok)
    tl.store(at + HALF, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _norm_rotate(
    x_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, rstd_ptr, stride_x, stride_out, eps,
    QUERY: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)
    column = tl.arange(0, HALF)
    ok = (head < HEADS)[:, None]
    at = head[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(x_ptr + token * stride_x + at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + token * stride_x + at + HALF, mask=ok, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
    tl.store(rstd_ptr + token * HEADS + head, rstd, mask=head < HEADS)
    is_query = (head < QUERY)[:, None]
    w_first = tl.where(is_query, tl.load(q_weight_ptr + column)[None, :], tl.load(k_weight_ptr + column)[None, :])
    w_second = tl.where(
        is_query, tl.load(q_weight_ptr + HALF + column)[None, :], tl.load(k_weight_ptr + HALF + column)[None, :]
    )
    first = first * rstd[:, None] * w_first.to(tl.float32)
    second = second * rstd[:, None] * w_second.to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + column)[None, :]
    sin = tl.load(sin_ptr + token * HALF + column)[None, :]
    into = out_ptr + token * stride_out + at
    tl.store(into, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(into + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _norm_rotate_backward(
    grad_ptr, x_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, rstd_ptr, stride_grad, stride_x,
    QUERY: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The gradient, in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)
    column = tl.arange(0, HALF)
    ok = (head < HEADS)[:, None]
    at = head[:, None] * (2 * HALF) + column[None, :]
    cos = tl.load(cos_ptr + token * HALF + column)[None, :]
    sin = tl.load(sin_ptr + token * HALF + column)[None, :]
    into = grad_ptr + token * stride_grad + at
    d_first = tl.load(into, mask=ok, other=0.0).to(tl.float32)
    d_second = tl.load(into + HALF, mask=ok, other=0.0).to(tl.float32)
    is_query = (head < QUERY)[:, None]
    w_first = tl.where(is_query, tl.load(q_weight_ptr + column)[None, :], tl.load(k_weight_ptr + column)[None, :])
    w_second = tl.where(
        is_query, tl.load(q_weight_ptr + HALF + column)[None, :], tl.load(k_weight_ptr + HALF + column)[None, :]
    )
    turned = (d_first * cos + d_second * sin) * w_first.to(tl.float32)
    d_second = (d_second * cos - d_first * sin) * w_second.to(tl.float32)
    rstd = tl.load(rstd_ptr + token * HEADS + head, mask=head < HEADS, other=0.0)[:, None]
    first = tl.load(x_ptr + token * stride_x + at, mask=ok, other=0.0).to(tl.float32) * rstd
    second = tl.load(x_ptr + token * stride_x + at + HALF, mask=ok, other=0.0).to(tl.float32) * rstd
    mean = ((tl.sum(turned * first, 1) + tl.sum(d_second * second, 1)) / (2 * HALF))[:, None]
    dtype = grad_ptr.dtype.element_ty
    tl.store(into, (rstd * (turned - first * mean)).to(dtype), mask=ok)
    tl.store(into + HALF, (rstd * (d_second - second * mean)).to(dtype), mask=ok)


@triton.jit
def _head_norm_gradient(
    grad_ptr, x_ptr, cos_ptr, sin_ptr, rstd_ptr, out_ptr, stride_grad, stride_x, tokens,
    QUERY: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A stripe of tokens, summed over query heads and over key heads."""
    head = tl.arange(0, BLOCK)
    column = tl.arange(0, HALF)
    at = head[:, None] * (2 * HALF) + column[None, :]
    total_first = tl.zeros([BLOCK, HALF], dtype=tl.float32)
    total_second = tl.zeros([BLOCK, HALF], dtype=tl.float32)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    for step in range(ROWS):
        token = begin + step
        here = token < tokens
        ok = (head < HEADS)[:, None] & here
        cos = tl.load(cos_ptr + token * HALF + column, mask=here, other=0.0)[None, :]
        sin = tl.load(sin_ptr + token * HALF + column, mask=here, other=0.0)[None, :]
        rstd = tl.load(rstd_ptr + token * HEADS + head, mask=(head < HEADS) & here, other=0.0)[:, None]
        d_first = tl.load(grad_ptr + token * stride_grad + at, mask=ok, other=0.0).to(tl.float32)
        d_second = tl.load(grad_ptr + token * stride_grad + at + HALF, mask=ok, other=0.0).to(tl.float32)
        first = tl.load(x_ptr + token * stride_x + at, mask=ok, other=0.0).to(tl.float32) * rstd
        second = tl.load(x_ptr + token * stride_x + at + HALF, mask=ok, other=0.0).to(tl.float32) * rstd
        total_first += (d_first * cos + d_second * sin) * first
        total_second += (d_second * cos - d_first * sin) * second
    into = out_ptr + tl.program_id(0).to(tl.int64) * (4 * HALF) + column
    of_query = (head < QUERY)[:, None]
    tl.store(into, tl.sum(tl.where(of_query, total_first, 0.0), 0))
    tl.store(into + HALF, tl.sum(tl.where(of_query, total_second, 0.0), 0))
    tl.store(into + 2 * HALF, tl.sum(tl.where(of_query, 0.0, total_first), 0))
    tl.store(into + 3 * HALF, tl.sum(tl.where(of_query, 0.0, total_second), 0))


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, stride_gate_up, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < WIDTH
    gate = tl.load(gate_up_ptr + row * stride_gate_up + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_gate_up + WIDTH + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_backward(
    grad_ptr, gate_up_ptr, stride_grad, stride_gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In place: gradients of gate and up, and once more what they made."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < WIDTH
    gates = gate_up_ptr + row * stride_gate_up + column
    grads = grad_ptr + row * stride_grad + column
    gate = tl.load(gates, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gates + WIDTH, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(grads, mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(gates, dgate.to(dtype), mask=ok)
    tl.store(gates + WIDTH, (grad * silu).to(dtype), mask=ok)
    tl.store(grads, (silu * up).to(dtype), mask=ok)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, rstd: Tensor) -> None:
    """x, out: [T, D]. rstd: float32 [T], is written."""
    width = x.shape[1]
    _rms_norm[(x.shape[0],)](
        x, weight, out, rstd, x.stride(0), out.stride(0), eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor
) -> None:
    """out: gradient of x, plus `residual`; all [T, D]."""
    width = x.shape[1]
    beside = grad if residual is None else residual
    _rms_norm_backward[(x.shape[0],)](
        grad, x, weight, rstd, beside, out, grad.stride(0), x.stride(0), beside.stride(0), out.stride(0),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), RESIDUAL=residual is not None, num_warps=_warps(width),
    )  # fmt: skip


def norm_gradient(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Parts of a norm's weight gradient, float32 [n, D], to be summed. grad, x: [T, D]."""
    tokens, width = x.shape
    parts = torch.empty(triton.cdiv(tokens, _STRIPE), width, dtype=torch.float32, device=x.device)
    _norm_gradient[(parts.shape[0], triton.cdiv(width, _COLUMNS))](
        grad, x, rstd, parts, grad.stride(0), x.stride(0), tokens,
        WIDTH=width, ROWS=_STRIPE, BLOCK=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return parts


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, inverse: bool) -> None:
    """Turn the first `heads` heads of x [T, ...] in place. cos, sin: float32 [T, D / 2]."""
    _rotate[(x.shape[0],)](
        x, cos, sin, x.stride(0), -1.0 if inverse else 1.0,
        HEADS=heads, BLOCK=triton.next_power_of_2(heads), HALF=cos.shape[1], num_warps=4,
    )  # fmt: skip


def norm_rotate(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    query: int,
    out: Tensor,
    rstd: Tensor,
) -> None:
    """As `operations.norm_rotate`; out's first heads and rstd, float32 [T, heads], are written."""
    heads = rstd.shape[1]
    _norm_rotate[(x.shape[0],)](
        x, *weights, cos, sin, out, rstd, x.stride(0), out.stride(0), eps,
        QUERY=query, HEADS=heads, BLOCK=triton.next_power_of_2(heads), HALF=cos.shape[1], num_warps=4,
    )  # fmt: skip


def norm_rotate_backward(
    grad: Tensor, x: Tensor, weights: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, query: int, rstd: Tensor
) -> None:
    """As `operations.norm_rotate_backward`."""
    heads = rstd.shape[1]
    _norm_rotate_backward[(x.shape[0],)](
        grad, x, *weights, cos, sin, rstd, grad.stride(0), x.stride(0),
        QUERY=query, HEADS=heads, BLOCK=triton.next_power_of_2(heads), HALF=cos.shape[1], num_warps=4,
    )  # fmt: skip


def head_norm_gradient(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, query: int, rstd: Tensor) -> Tensor:
    """Parts of the gradients of both weights, of query and key heads, float32 [n, 2, D], to be summed.

    grad: of `norm_rotate`'s out.
    """
    tokens, heads = rstd.shape
    half = cos.shape[1]
    parts = torch.empty(triton.cdiv(tokens, _STRIPE), 2, 2 * half, dtype=torch.float32, device=x.device)
    _head_norm_gradient[(parts.shape[0],)](
        grad, x, cos, sin, rstd, parts, grad.stride(0), x.stride(0), tokens,
        QUERY=query, HEADS=heads, BLOCK=triton.next_power_of_2(heads), HALF=half, ROWS=_STRIPE, num_warps=8,
    )  # fmt: skip
    return parts


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """gate_up: [T, 2 I], gates first. out: [T, I]."""
    width = out.shape[1]
    _swiglu[(out.shape[0], triton.cdiv(width, _WIDE))](
        gate_up, out, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=_WIDE, num_warps=4
    )


def swiglu_backward_(grad: Tensor, gate_up: Tensor) -> None:
    """grad: of what swiglu made, [T, I], becomes what it made. gate_up: [T, 2 I], becomes its gradient."""
    width = grad.shape[1]
    _swiglu_backward[(grad.shape[0], triton.cdiv(width, _WIDE))](
        grad, gate_up, grad.stride(0), gate_up.stride(0), WIDTH=width, BLOCK=_WIDE, num_warps=4
    )


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8
