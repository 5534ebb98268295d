"""AdamW whose moments are kept in 8 bits as bitsandbytes keeps them, in one pass over memory.

A code stands for a value of a fixed map, times the largest of its block. The map's values lie in seven decades, evenly
in each of them, so the nearest one is computed; the package searches for it, which takes longer than all the rest.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256
"""Values that are scaled together."""
_BLOCKS = 8
"""Of one program."""
_DECADES = 7


@triton.jit
def _code(value, largest, decades_ptr, SIGNED: tl.constexpr, DECADES: tl.constexpr):
    """The nearest value's place in the map. Zeros and the only 1 have codes of their own.

    Without a sign only zero itself is rounded to zero: a second moment that is lost makes the next step a leap.
    """
    x = value / tl.where(largest > 0, largest, 1.0)[:, None]
    size = tl.abs(x)
    scale = tl.load(decades_ptr + 1)
    cells = tl.load(decades_ptr + 2)
    for decade in tl.static_range(1, DECADES):
        above = size >= tl.load(decades_ptr + 3 * decade)
        scale = tl.where(above, tl.load(decades_ptr + 3 * decade + 1), scale)
        cells = tl.where(above, tl.load(decades_ptr + 3 * decade + 2), cells)
    place = tl.floor((size * scale - 0.1) * (cells / 0.9))
    place = tl.minimum(tl.maximum(place, 0.0), cells - 1.0)
    place = (place + cells).to(tl.int32)  # of all positive values, from 1 with a sign and from 2 without
    if SIGNED:
        code = tl.where(size < tl.load(decades_ptr), 127, tl.where(x < 0, 127 - place, 127 + place))
    else:
        code = tl.where(value == 0, 0, place - 1)
    return tl.where(x >= tl.load(decades_ptr + 3 * DECADES), 255, code)


@triton.jit
def _step(
    p_ptr, g_ptr, codes1_ptr, codes2_ptr, largest1_ptr, largest2_ptr, map1_ptr, map2_ptr, decades1_ptr, decades2_ptr,
    beta1, rest1, beta2, rest2, eps, pace, root, shrink, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DECADES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    ok = block < blocks
    at = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = ok[:, None]
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    first = tl.load(map1_ptr + tl.load(codes1_ptr + at, mask=inside, other=0).to(tl.int32))
    second = tl.load(map2_ptr + tl.load(codes2_ptr + at, mask=inside, other=0).to(tl.int32))
    first = first * tl.load(largest1_ptr + block, mask=ok, other=0.0)[:, None] * beta1 + g * rest1
    second = second * tl.load(largest2_ptr + block, mask=ok, other=0.0)[:, None] * beta2 + g * g * rest2
    p = tl.load(p_ptr + at, mask=inside, other=0.0) * shrink
    tl.store(p_ptr + at, p - pace * first / (tl.sqrt(second) * root + eps), mask=inside)
    largest1, largest2 = tl.max(tl.abs(first), axis=1), tl.max(second, axis=1)
    tl.store(largest1_ptr + block, largest1, mask=ok)
    tl.store(largest2_ptr + block, largest2, mask=ok)
    code1 = _code(first, largest1, decades1_ptr, True, DECADES)
    code2 = _code(second, largest2, decades2_ptr, False, DECADES)
    tl.store(codes1_ptr + at, code1.to(tl.uint8), mask=inside)
    tl.store(codes2_ptr + at, code2.to(tl.uint8), mask=inside)


def step(p: Tensor, grad: Tensor, state: dict[str, Any], config: dict[str, Any]) -> None:
    """One step of AdamW, decay before the update. p, grad: float32 [n], n a multiple of 256; finite.

    state, config: as bitsandbytes has them for `p`; state["step"] counts this step too.
    """
    (beta1, beta2), rate, count = config["betas"], float(config["lr"]), state["step"]
    maps = (state["qmap1"], state["qmap2"])
    decades = (_decades(True, p.device), _decades(False, p.device))
    blocks = p.numel() // _BLOCK
    _step[(triton.cdiv(blocks, _BLOCKS),)](
        p, grad, state["state1"], state["state2"], state["absmax1"], state["absmax2"], *maps, *decades,
        beta1, 1 - beta1, beta2, 1 - beta2, config["eps"],
        rate / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count), 1 - rate * config["weight_decay"], blocks,
        BLOCK=_BLOCK, BLOCKS=_BLOCKS, DECADES=_DECADES, num_warps=8,
    )  # fmt: skip


def knows(map1: Tensor, map2: Tensor) -> bool:
    """Whether these are the maps, of the first moment and of the second, whose codes it computes."""
    return all(
        torch.allclose(found.cpu(), torch.tensor(_values(signed)), rtol=1e-5, atol=0)
        for found, signed in ((map1, True), (map2, False))
    )


def _values(signed: bool) -> list[float]:
    """By their codes."""
    positive = [value for decade in range(_DECADES) for value in _values_of(decade, signed)]
    return [*(sorted(-value for value in positive) if signed else []), 0.0, *positive, 1.0]


def _values_of(decade: int, signed: bool) -> list[float]:
    """The middles of the cells that a decade is divided into, upwards: each has twice as many as the one below."""
    cells = _cells(decade, signed)
    return [10.0 ** (decade + 1 - _DECADES) * (0.1 + 0.9 * (place + 0.5) / cells) for place in range(cells)]


def _cells(decade: int, signed: bool) -> int:
    return int(2 ** (decade if signed else decade + 1))


@functools.cache
def _decades(signed: bool, device: torch.device) -> Tensor:
    """float32 [8, 3]: from which size on a value is nearer to this decade's than to the one below, what makes it lie
    between 0.1 and 1, and how many cells there are. The last row is that of 1 itself.
    """
    groups = [[0.0], *(_values_of(decade, signed) for decade in range(_DECADES)), [1.0]]
    begins = [(below[-1] + group[0]) / 2 for below, group in itertools.pairwise(groups)]
    rows = [(begin, 10.0 ** (_DECADES - 1 - i), float(_cells(i, signed))) for i, begin in enumerate(begins)]
    return torch.tensor(rows, dtype=torch.float32, device=device)
