"""Weights in 4 bits made whole, straight into their place in a wider buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from opensloth.fused.operations import FourBit

_BLOCKS = 64
"""Blocks of one program, of 64 values each as a rule."""


@triton.jit
def _dequantise(
    packed_ptr, table_ptr, largest_ptr, coarse_table_ptr, coarse_ptr, offset_ptr, out_ptr, count,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, COARSE: tl.constexpr, NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Two values lie in a byte, the first in its upper half. The stride is a constant so that stores are wide."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    within = tl.arange(0, BLOCK // 2)
    at = block[:, None] * (BLOCK // 2) + within[None, :]
    byte = tl.load(packed_ptr + at, mask=at < count // 2, other=0).to(tl.int32)
    value = tl.interleave(tl.load(table_ptr + (byte >> 4)), tl.load(table_ptr + (byte & 15)))
    ok = block * BLOCK < count
    largest = tl.load(largest_ptr + block, mask=ok, other=0)
    if NESTED:
        coarse = tl.load(coarse_ptr + block // COARSE, mask=ok, other=0.0)
        largest = tl.load(coarse_table_ptr + largest.to(tl.int32)) * coarse + tl.load(offset_ptr)
    value = (value * largest[:, None]).to(out_ptr.dtype.element_ty)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    row, column = at // WIDTH, at % WIDTH
    tl.store(out_ptr + row.to(tl.int64) * STRIDE + column, value, mask=at < count)


def dequantise(weight: FourBit, out: Tensor) -> None:
    """See `opensloth.fused.operations`. Fewer than 2**31 values."""
    state = weight.state
    coarse = state.state2 if state.nested else state  # not read where nothing is nested
    grid = (triton.cdiv(out.numel(), _BLOCKS * state.blocksize),)
    _dequantise[grid](
        weight.packed, state.code, state.absmax, coarse.code, coarse.absmax,
        state.offset if state.nested else state.absmax, out, out.numel(),
        WIDTH=out.shape[1], STRIDE=out.stride(0), BLOCK=state.blocksize, COARSE=coarse.blocksize, NESTED=state.nested,
        BLOCKS=_BLOCKS, num_warps=8,
    )  # fmt: skip
