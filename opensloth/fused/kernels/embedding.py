"""Rows of a table that may lie in host memory: the GPU reads them itself, pinned memory has one address for both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _rows(table_ptr, ids_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(ids_ptr + row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    tl.store(out_ptr + row * width + column, tl.load(table_ptr + at * width + column, mask=ok, other=0.0), mask=ok)


def rows(table: Tensor, ids: Tensor, out: Tensor) -> None:
    """table: [V, D], pinned if it lies in host memory. ids: int64 [T]. out: [T, D], is written. All are dense."""
    width = table.shape[1]
    _rows[(len(ids), triton.cdiv(width, _BLOCK))](table, ids, out, width, BLOCK=_BLOCK, num_warps=4)
