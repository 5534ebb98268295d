"""Many tensors end to end in one, so that one launch does for all of them.

Each begins at a multiple of `BLOCK`, with zeros before it: what works on blocks of a tensor works on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

BLOCK = 256
"""Elements that bitsandbytes scales together."""
SMALL = 4096
"""Tensors of fewer elements have moments in 32 bits there."""
MOST = 1 << 30
"""Elements of one part, unless a single tensor has more: kernels count them in 32 bits."""


@dataclass(frozen=True)
class Part:
    """Parameters that are treated alike, end to end from `begin` on. starts: of each, from there."""

    parameters: tuple[nn.Parameter, ...]
    starts: tuple[int, ...]
    begin: int
    size: int
    is_matrices: bool
    is_small: bool


def arrange(parameters: Sequence[nn.Parameter], most: int = MOST) -> list[Part]:
    """Matrices first, then vectors; of both the large ones first. Parts follow one another without a gap."""
    parts: list[Part] = []
    for (is_vector, is_small), alike in groupby(sorted(parameters, key=_kind), key=_kind):
        taken: list[nn.Parameter] = []
        starts: list[int] = []
        size = 0
        for parameter in alike:
            if taken and size + parameter.numel() > most:
                parts.append(_part(parts, taken, starts, size, is_vector, is_small))
                taken, starts, size = [], [], 0
            taken.append(parameter)
            starts.append(size)
            size += -(-parameter.numel() // BLOCK) * BLOCK
        parts.append(_part(parts, taken, starts, size, is_vector, is_small))
    return parts


def _kind(parameter: nn.Parameter) -> tuple[bool, bool]:
    return parameter.ndim < 2, parameter.numel() < SMALL


def _part(
    before: list[Part], taken: list[nn.Parameter], starts: list[int], size: int, is_vector: bool, is_small: bool
) -> Part:
    begin = before[-1].begin + before[-1].size if before else 0
    return Part(tuple(taken), tuple(starts), begin, size, not is_vector, is_small)


def size_of(parts: Sequence[Part]) -> int:
    return parts[-1].begin + parts[-1].size if parts else 0


def views(part: Part, whole: Tensor) -> list[Tensor]:
    """Each parameter's place in `whole`, which holds this part alone."""
    return [whole[start : start + p.numel()].view_as(p) for p, start in zip(part.parameters, part.starts, strict=True)]


def whole_gradient(part: Part) -> Tensor:
    """The part's gradients as the one tensor that they are views of.

    Raises RuntimeError when they do not lie as `arrange` has it.
    """
    first = part.parameters[0].grad
    if first is not None and lie_from(part, [parameter.grad for parameter in part.parameters], first.data_ptr()):
        begin, storage = int(first.storage_offset()), first.untyped_storage()
        if (begin + part.size) * first.element_size() <= storage.nbytes():  # so all of them lie in it
            return first.new_empty(0).set_(storage, begin, (part.size,), (1,))
    raise RuntimeError("gradients do not lie end to end")


def lie_from(part: Part, tensors: Sequence[Tensor | None], address: int) -> bool:
    """Whether each of `tensors`, one of a parameter, has its place in a tensor that begins at `address`."""
    places = zip(tensors, part.starts, strict=True)
    return all(t is not None and t.data_ptr() == address + start * t.element_size() for t, start in places)
