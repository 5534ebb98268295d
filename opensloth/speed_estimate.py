"""How fast the fast path trains, from sizes alone. Pure.

A step is matrix products, attention, element-wise work that memory bounds, and launches. What share of a card's
published figures each reaches was fitted to what an H100 and an H200 did (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from opensloth.memory_estimate import Batch, Keep, Keeping, Method, offloaded_bytes, trained_parameters
from opensloth.model_shape import ModelShape

_PRODUCTS, _ATTENTION, _CUDNN_ATTENTION = 0.66, 0.285, 0.43
"""Of the published operations; cuDNN's with heads of 64, of 128 it reaches more."""
_TRAFFIC = 0.47
"""Of the published bandwidth."""
_LINK = 0.85
"""Of the published link: an H100 reached 56 of 64 GB/s."""
_LAYER_SECONDS = 0.42e-3
"""Of a layer, whatever the batch: kernels that begin and end."""
LONG_DOCUMENT = 8192
"""Tokens from which on a document attends by cuDNN's kernels on Hopper: it is faster there, and lengths, for each of
which graphs are captured, are few."""
SPREAD = 0.9
"""Tokens that a token sees on average, in mean lengths of a document: a half, and more as lengths differ."""
_OPTIMIZER_BYTES = 12
"""AdamW reads a weight and its gradient, and writes the weight; moments are read and written."""


@dataclass(frozen=True)
class Card:
    """operations: dense, in bfloat16, a second. bandwidth, link: bytes a second, of its own memory and to the host's,
    one way. All as published. hopper: it is of that generation.
    """

    operations: float
    bandwidth: float
    link: float
    hopper: bool = False

    @property
    def reached(self) -> tuple[float, float]:
        """Operations of large products, and bytes to host memory, a second."""
        return _PRODUCTS * self.operations, _LINK * self.link


@dataclass(frozen=True)
class Step:
    """batch: of one process. accumulation: batches in a step. document: mean tokens of a document, of which none is
    longer than a row. row: its tokens.
    """

    batch: Batch
    accumulation: int
    document: float
    row: int


def copies_keep_up(shape: ModelShape, method: Method, operations: float, link: float) -> bool:
    """Whether what HOST puts into host memory has left before the next layer is made: then it costs next to no time.

    operations: that large products reach, a second. link: bytes a second to host memory.
    """
    return offloaded_bytes(shape, method, Keep.HOST) / link <= 2 * shape.layer_linear / operations


def tokens_per_second(shape: ModelShape, method: Method, step: Step, keeping: Keeping, card: Card) -> float:
    """Of one GPU in a run through the launcher. method: fused."""
    batch = step.batch
    again = 1 - keeping.whole_of(shape.layers) / shape.layers
    attended = 0 if keeping.keep is Keep.HOST else again
    seconds = (
        _products(shape, method, batch, again, attended) / (_PRODUCTS * card.operations)
        + _attention(shape, step, attended) / (_attention_reaches(step, card) * card.operations)
        + _traffic(shape, method, step, again) / (_TRAFFIC * card.bandwidth)
        + shape.layers * _LAYER_SECONDS
    )
    return batch.tokens / seconds


def _products(shape: ModelShape, method: Method, batch: Batch, again: float, attended: float) -> float:
    """Operations: two a weight forward, two for inputs' gradients, two for its own.

    again, attended: share of the layers of which the MLP, and attention, is computed again, but for the last product.
    """
    times = 6 if method.is_full else 4
    mlp = shape.layers * shape.hidden * shape.intermediate
    of_token = times * shape.linear + 2 * (again * 2 * mlp + attended * (shape.linear - 3 * mlp))
    spared = times * 3 * shape.hidden * shape.intermediate * (batch.tokens - batch.targets)  # of the last layer's MLP
    return of_token * batch.tokens + times * shape.head_parameters * batch.targets - spared


def _attention(shape: ModelShape, step: Step, attended: float) -> float:
    passes = 3.5 + attended  # the way back takes two and a half
    seen = min(SPREAD * step.document, step.row / 2)
    return passes * 4 * shape.layers * shape.attended * seen * step.batch.tokens


def _attention_reaches(step: Step, card: Card) -> float:
    """Of the published operations, as if all documents were as long as their mean."""
    return _CUDNN_ATTENTION if card.hopper and step.document >= LONG_DOCUMENT else _ATTENTION


def _traffic(shape: ModelShape, method: Method, step: Step, again: float) -> float:
    """Bytes that element-wise kernels read and write, 16 bits each."""
    width, inner, batch = shape.hidden, shape.intermediate, step.batch
    of_layer = 14 * width + 4 * shape.qkv + 9 * inner + again * (4 * width + 2 * shape.qkv + 3 * inner)
    bytes_of_batch: float = 2 * shape.layers * of_layer * batch.tokens + 2 * 3 * shape.vocabulary * batch.targets
    bytes_of_batch -= 2 * 9 * inner * (batch.tokens - batch.targets)  # of the last layer's MLP
    if method.bits == 4:  # made whole for either way
        bytes_of_batch += 2 * (0.5 + 2) * shape.linear
    of_weight = _OPTIMIZER_BYTES + 2 * method.moments
    return bytes_of_batch + of_weight * trained_parameters(shape, method) / step.accumulation
