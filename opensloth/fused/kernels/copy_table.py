"""Many small copies in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _copy(
    table_ptr, scales_ptr, source_type: tl.constexpr, destination_type: tl.constexpr,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    source = tl.load(table_ptr + entry * 6).to(tl.pointer_type(source_type))
    destination = tl.load(table_ptr + entry * 6 + 1).to(tl.pointer_type(destination_type))
    rows = tl.load(table_ptr + entry * 6 + 2)
    columns = tl.load(table_ptr + entry * 6 + 3)
    source_stride = tl.load(table_ptr + entry * 6 + 4)
    destination_stride = tl.load(table_ptr + entry * 6 + 5)
    scale = tl.load(scales_ptr + entry)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < rows * columns
    row, column = at // columns, at % columns
    value = tl.load(source + row * source_stride + column, mask=ok, other=0.0).to(tl.float32) * scale
    into = destination + row * destination_stride + column
    if ADD:
        value += tl.load(into, mask=ok, other=0.0).to(tl.float32)
    tl.store(into, value.to(destination_type), mask=ok)


def copy(table: Tensor, scales: Tensor, source: Tensor, destination: Tensor, largest: int, *, add: bool) -> None:
    """table: int64 [n, 6], each with addresses of source and destination, rows, columns, and their row strides.

    scales: float32 [n]. source, destination: one of each, for their dtypes. largest: elements of an entry.
    """
    grid = (table.shape[0], triton.cdiv(largest, _BLOCK))
    types = tuple(getattr(tl, _TYPES[str(tensor.dtype)]) for tensor in (source, destination))
    _copy[grid](table, scales, *types, ADD=add, BLOCK=_BLOCK, num_warps=4)


_TYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
