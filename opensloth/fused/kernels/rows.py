"""Rows taken from a matrix, or put into one.

What they are taken from may lie in pinned host memory, which has one address for both: the GPU reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gather(source_ptr, at_ptr, out_ptr, stride_source, stride_out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(at_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    values = tl.load(source_ptr + at * stride_source + column, mask=ok & (at >= 0), other=0.0)
    tl.store(out_ptr + row * stride_out + column, values, mask=ok)


@triton.jit
def _scatter(source_ptr, at_ptr, out_ptr, stride_source, stride_out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(at_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = (column < width) & (at >= 0)
    values = tl.load(source_ptr + row * stride_source + column, mask=ok, other=0.0)
    tl.store(out_ptr + at * stride_out + column, values, mask=ok)


def gather(source: Tensor, at: Tensor, out: Tensor) -> None:
    """As `operations.gather`."""
    grid, sizes = _division(source, at, out)
    _gather[grid](source, at, out, *sizes, BLOCK=_BLOCK, num_warps=4)


def scatter(source: Tensor, at: Tensor, out: Tensor) -> None:
    """As `operations.scatter`."""
    grid, sizes = _division(source, at, out)
    _scatter[grid](source, at, out, *sizes, BLOCK=_BLOCK, num_warps=4)


def _division(source: Tensor, at: Tensor, out: Tensor) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """A kernel's grid, and the strides and the width that it is given."""
    width = source.shape[1]
    return (len(at), triton.cdiv(width, _BLOCK)), (source.stride(0), out.stride(0), width)
