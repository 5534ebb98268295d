"""Weights in 4 bits made whole, straight into their place in a wider buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from opensloth.fused.operations import FourBit

_ELEMENTS = 4096


@triton.jit
def _dequantise(
    packed_ptr, table_ptr, largest_ptr, coarse_table_ptr, coarse_ptr, offset_ptr, out_ptr, count, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COARSE: tl.constexpr, NESTED: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Two values lie in a byte, the first in its upper half."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    ok = at < count
    byte = tl.load(packed_ptr + at // 2, mask=ok, other=0).to(tl.int32)
    value = tl.load(table_ptr + ((byte >> (4 - 4 * (at % 2))) & 15))
    block = at // BLOCK
    largest = tl.load(largest_ptr + block, mask=ok, other=0)
    if NESTED:
        coarse = tl.load(coarse_ptr + block // COARSE, mask=ok, other=0.0)
        largest = tl.load(coarse_table_ptr + largest.to(tl.int32)) * coarse + tl.load(offset_ptr)
    row, column = at // WIDTH, at % WIDTH
    place = out_ptr + row.to(tl.int64) * stride + column
    tl.store(place, (value * largest).to(out_ptr.dtype.element_ty), mask=ok)


def dequantise(weight: FourBit, out: Tensor) -> None:
    """See `opensloth.fused.operations`. Fewer than 2**31 values."""
    state = weight.state
    coarse = state.state2 if state.nested else state  # not read where nothing is nested
    grid = (triton.cdiv(out.numel(), _ELEMENTS),)
    _dequantise[grid](
        weight.packed, state.code, state.absmax, coarse.code, coarse.absmax,
        state.offset if state.nested else state.absmax, out, out.numel(), out.stride(0),
        WIDTH=out.shape[1], BLOCK=state.blocksize, COARSE=coarse.blocksize, NESTED=state.nested, ELEMENTS=_ELEMENTS,
        num_warps=8,
    )  # fmt: skip
