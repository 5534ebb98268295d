"""The gate: a gradient in 16 bits is that of single documents in float32, to a cosine and a norm."""

from __future__ import annotations

from typing import Any

from measured import at_least, at_most
from torch import Tensor
from training.gradient import COSINE, NORM, agreement, judged


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def passes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return bool(judged(found, expected)["passed"])


def require(claim: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless the gradients agree, whole and tensor by tensor."""
    cosine, norm = agreement(found, expected)
    at_least(f"{claim}: cosine of the gradient", cosine, COSINE)
    at_most(f"{claim}: norm of the gradient", abs(norm - 1), NORM)
    at_most(f"{claim}: farthest tensor of the gradient", max(distances(found, expected).values()), FARTHEST)


FARTHEST = 0.1
"""Relative L2 distance of one tensor, which the whole may hide."""


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of the tensors that carry more than a thousandth of the gradient's norm."""
    sizes = {name: float(gradient.norm()) for name, gradient in expected.items()}
    least = 1e-3 * sum(size**2 for size in sizes.values()) ** 0.5
    return {n: float((found[n] - expected[n]).norm()) / sizes[n] for n in expected if sizes[n] > least}
