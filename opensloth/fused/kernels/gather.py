"""Rows picked from a matrix, which may lie in pinned host memory: that has one address for both, the GPU reads it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gather(source_ptr, at_ptr, out_ptr, stride_source, stride_out, width, LEAVE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(at_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (column < width) & (at >= 0)
    values = tl.load(source_ptr + at * stride_source + column, mask=there, other=0.0)
    tl.store(out_ptr + row * stride_out + column, values, mask=there if LEAVE else column < width)


def gather(source: Tensor, at: Tensor, out: Tensor, *, leave: bool) -> None:
    """As `operations.gather`."""
    if not len(at):
        return
    width = source.shape[1]
    _gather[(len(at), triton.cdiv(width, _BLOCK))](
        source, at, out, source.stride(0), out.stride(0), width, LEAVE=leave, BLOCK=_BLOCK, num_warps=4
    )
