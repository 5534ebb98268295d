"""Cross-entropy that leaves the gradient where the logits were."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _cross_entropy(
    logits_ptr, targets_ptr, losses_ptr, scale_ptr, stride, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    counts = target >= 0
    scale = tl.where(counts, tl.load(scale_ptr), 0.0)
    highest = -float("inf")
    total = 0.0
    for begin in range(0, VOCABULARY, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < VOCABULARY, other=-float("inf")).to(tl.float32)
        risen = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - risen) + tl.sum(tl.exp(z - risen), 0)
        highest = risen
    lse = highest + tl.log(total)
    said = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(counts, lse - said, 0.0))
    tl.debug_barrier()  # the target's logit is read before its place is written
    for begin in range(0, VOCABULARY, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        ok = column < VOCABULARY
        z = tl.load(logits + column, mask=ok, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(z - lse) - tl.where(column == target, 1.0, 0.0)) * scale
        tl.store(logits + column, gradient.to(logits_ptr.dtype.element_ty), mask=ok)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, losses: Tensor) -> None:
    """losses: float32 [n], nats, is written; logits [n, V] become their gradient times `scale`.

    A negative target counts for nothing.
    """
    _cross_entropy[(logits.shape[0],)](
        logits, targets, losses, scale, logits.stride(0), VOCABULARY=logits.shape[1], BLOCK=_BLOCK, num_warps=8
    )
