"""Whether packing changes what is learned: the gradient of a few documents packed, against the same ones alone.

Looked at before the first step, on the model and the device that will train. The loss could not tell: at random
initialisation documents that see each other wholly move it by 3e-5, and the gradient's cosine to 0.3.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from opensloth.check_memory import CheckMemory
from opensloth.data.batch import Batch, Documents, flat_batch, padded_batch
from opensloth.data.documents import IGNORE, Int32Array
from opensloth.data.training_data import Rows
from opensloth.dist import World, sum_over_ranks
from opensloth.errors import ConfigError, Problem
from opensloth.events import Events
from opensloth.isolation import attending_plainly, without_dropout
from opensloth.model import base_of, trainable_parameters

Accumulate = Callable[[Batch, float], object]
"""Adds the gradient of (sum of losses) / (number of targets, given) of a batch on the CPU to each .grad."""

DOCUMENTS = 3
LONGEST = 64
"""Tokens of a document that are looked at: of three such, a 7B model keeps under 1 GiB of activations."""
SHORTEST = 16
CPU_WORK = 8e9
"""Parameters x tokens that a CPU is given, packed and alone each: about a second of a core."""
USUAL_SECONDS = 5.0
"""What it takes at most, as a rule; a run that waits longer is told."""
WATCHED = 2e7
"""Elements of the gradient that are compared, about: where every weight is trained, of tensors from all over it."""


@dataclass(frozen=True)
class Bounds:
    """cosine: at least; norm: by how much of itself the packed gradient's norm may be off."""

    cosine: float
    norm: float


EXACT = Bounds(1 - 1e-7, 1e-4)
ROUNDED = Bounds(0.999, 0.01)
"""Where products are rounded to 16 bits, or to TF32."""


@dataclass(frozen=True)
class Agreement:
    """Packed against alone. cosine: of the two gradients. norm_ratio: packed / alone.

    Two gradients of zero agree. Both figures are NaN when neither gradient is finite, 0 when there is but one.
    """

    cosine: float
    norm_ratio: float

    def within(self, bounds: Bounds) -> bool:
        return self.cosine >= bounds.cosine and abs(self.norm_ratio - 1) <= bounds.norm


class Sample:
    """A few of the run's documents, each cut to a window that begins shortly before its first target."""

    def __init__(self, documents: Documents, indices: npt.NDArray[np.integer], longest: int) -> None:
        self._pairs = [_window(*documents.row(int(index)), longest) for index in indices]

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> tuple[Int32Array, Int32Array]:
        """input_ids and labels, int32[n] each, n at most `longest`."""
        return self._pairs[index]


def require_same_gradient(
    model: nn.Module,
    packed: Accumulate,
    alone: Accumulate,
    rows: Rows,
    memory: CheckMemory,
    *,
    bounds: Bounds,
    world: World,
    events: Events,
) -> None:
    """Compare on rank 0, unless this model and backend were compared before, and let every rank know.

    model: switched to isolated attention. packed: what will train, given a flat batch; alone: the model itself,
    given padded ones.
    Raises ConfigError on every rank when packing changes the gradient.
    """
    if not rows.targets:
        return
    started = time.monotonic()
    known = memory.recall() if world.is_main else None
    found = Agreement(0.0, 0.0)
    if world.is_main:
        found = Agreement(**known) if known else compare(model, packed, alone, sample_of(rows, model))
    found = Agreement(*sum_over_ranks([found.cosine, found.norm_ratio], world))
    seconds = time.monotonic() - started
    events.emit("check", check="packing", remembered=known is not None, seconds=round(seconds, 3), **vars(found))
    if seconds > USUAL_SECONDS:
        usual = f"usually at most {USUAL_SECONDS:.0f}s; what passes is remembered, and the next start does not wait"
        events.note(f"the check of packing took {seconds:.1f}s, {usual}")
    if math.isnan(found.cosine):  # the first step that meets such a document stops, and names its rows
        events.warn("packing could not be checked: the gradient of the documents looked at is not finite")
        return
    if not found.within(bounds):
        raise ConfigError([_problem(base_of(model).config.model_type, found, bounds)])
    if world.is_main and not known:
        memory.remember(vars(found))


def compare(model: nn.Module, packed: Accumulate, alone: Accumulate, documents: Documents) -> Agreement:
    """The gradient of all documents in one flat batch, against the sum of those of each in a batch of its own.

    The model is left as it was, gradients, modes and random state included.
    """
    device = base_of(model).device
    everything = np.arange(len(documents))
    singles = [padded_batch(documents, everything[i : i + 1], pad_id=0) for i in everything]
    with (
        without_dropout(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _watching(trainable_parameters(model)) as watched,
    ):
        with attending_plainly(model):
            reference = _gradient(watched, alone, singles)
        found = _gradient(watched, packed, [flat_batch(documents, everything)])
        return _agreement(found, reference)


@contextlib.contextmanager
def _watching(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
    """Those of the trained parameters that get a gradient while it is open; then all have what they had."""
    every = math.ceil(sum(p.numel() for p in parameters) / WATCHED)
    watched = parameters[every // 2 :: every] or parameters
    kept = [None if p.grad is None else (p.grad, p.grad.clone()) for p in parameters]
    chosen = set(watched)
    for parameter in parameters:
        parameter.requires_grad_(parameter in chosen)
    try:
        yield watched
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = None if before is None else before[0].copy_(before[1])  # an engine may own its place


def sample_of(rows: Rows, model: nn.Module) -> Sample:
    """Documents from all over the plan, fewer tokens of each the slower this device gets through the model."""
    order = rows.members[rows.plan.documents]
    order = order[rows.documents.targets[order] > 0]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, DOCUMENTS).astype(int))]
    if len(chosen) == 1:
        chosen = np.repeat(chosen, 2)
    longest = LONGEST
    if base_of(model).device.type == "cpu":
        affordable = CPU_WORK / sum(p.numel() for p in model.parameters()) / DOCUMENTS
        longest = int(min(LONGEST, max(SHORTEST, affordable)))
    return Sample(rows.documents, chosen, longest)


def bounds_of(model: nn.Module, autocast: torch.dtype | None) -> Bounds:
    """What may be asked of this model's gradients, given the type that it computes in."""
    rounded = autocast is not None or any(parameter.dtype != torch.float32 for parameter in model.parameters())
    on_cuda = base_of(model).device.type == "cuda"
    return ROUNDED if rounded or (on_cuda and torch.backends.cuda.matmul.allow_tf32) else EXACT


def _gradient(
    parameters: Sequence[nn.Parameter], accumulate: Accumulate, batches: Sequence[Batch]
) -> list[Tensor | None]:
    """Of the mean loss of all targets, as training accumulates it."""
    for parameter in parameters:
        parameter.grad = None
    targets = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        accumulate(batch, targets)
    return [parameter.grad for parameter in parameters]


def _agreement(found: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> Agreement:
    one, other, apart = 0.0, 0.0, 0.0
    for packed, alone in zip(found, reference, strict=True):
        one += _square(packed)
        other += _square(alone)
        apart += _square(packed if alone is None else alone if packed is None else packed - alone)
    if not math.isfinite(one) and not math.isfinite(other):
        return Agreement(math.nan, math.nan)
    if one == other == 0:
        return Agreement(1.0, 1.0)
    if not math.isfinite(apart) or not one or not other:
        return Agreement(0.0, 0.0)
    # By way of the distance: a dot product over millions of elements would drown in its own rounding.
    return Agreement((one + other - apart) / (2 * math.sqrt(one * other)), math.sqrt(one / other))


def _square(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(torch.linalg.vector_norm(tensor)) ** 2


def _window(ids: Int32Array, labels: Int32Array, longest: int) -> tuple[Int32Array, Int32Array]:
    if len(ids) <= longest:
        return ids, labels
    first_target = int(np.argmax(labels[1:] != IGNORE)) + 1
    begin = min(max(0, first_target - longest // 2), len(ids) - longest)
    return ids[begin : begin + longest], labels[begin : begin + longest]


def _problem(kind: str, found: Agreement, bounds: Bounds) -> Problem:
    return Problem(
        "opensloth.sequence_packing",
        f"packed documents of this {kind} train differently from single ones: gradient cosine {found.cosine:.6f} "
        f"(at least {bounds.cosine:.7g}), norm {found.norm_ratio:.4f} times as large (1 +- {bounds.norm:g})",
        "--set opensloth.sequence_packing=false",
    )
