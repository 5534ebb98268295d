"""One optimizer step: sum of the targets' losses over all micro-batches and ranks, divided by their number."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensloth.data.batch import Batch
from opensloth.dist import World, sum_gradients, sum_over_ranks
from opensloth.model import base_of, trainable_parameters


class StepTotals(NamedTuple):
    """Sums over all ranks of one step.

    loss_sum: negative log-likelihood of all targets, nats. targets, tokens: counts. grad_norm: L2 norm of
    the whole gradient before clipping.
    """

    loss_sum: float
    targets: int
    tokens: int
    grad_norm: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a target, nats."""
        return self.loss_sum / max(1, self.targets)


class Objective:
    """The supervised loss of a model on a batch, and its gradient: autograd, in plain torch."""

    engine = "torch"
    has_flat_gradients = False
    """Whether every parameter has a gradient after each step, and they lie as `opensloth.flat` arranges them."""

    def __init__(
        self, model: nn.Module, *, autocast: torch.dtype | None, beat: Callable[[], None] = lambda: None
    ) -> None:
        """autocast: compute in this dtype; None: in the weights' own. beat: called with every batch."""
        self._model = model
        self._parameters = trainable_parameters(model)
        self._autocast, self._beat = autocast, beat
        self._selects = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum of the targets' negative log-likelihoods: float32 scalar, nats.

        Only the positions that predict a target go through the model's head. batch: on the CPU.
        """
        self._beat()
        device = base_of(self._model).device
        batch = batch.to(device)
        computing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._autocast is not None:
            computing = torch.autocast(device.type, dtype=self._autocast)
        columns = batch.predictors
        length = batch.inputs["input_ids"].shape[1]
        kept: dict[str, Any] = {}
        if self._selects:
            kept_columns, place = torch.unique(columns % length, return_inverse=True)
            kept, columns = {"logits_to_keep": kept_columns}, (columns // length) * len(kept_columns) + place
        with computing:
            logits = self._model(**batch.inputs, use_cache=False, **kept).logits
        chosen = logits.flatten(0, 1)[columns]
        return F.cross_entropy(chosen.float(), batch.targets, reduction="sum")

    def positions(self, batch: Batch) -> int:
        """How many are computed for the batch's tokens, padding included."""
        return int(batch.inputs["input_ids"].numel())

    def begin_step(self) -> None:
        """Called before the batches of a step; gradients are zero or None."""

    def accumulate(self, batch: Batch, targets: float) -> Tensor:
        """Add the gradient of (sum of losses) / `targets` to .grad; returns the sum, float32 scalar, nats.

        batch: on the CPU.
        """
        loss = self.loss_sum(batch)
        (loss / targets).backward()
        return loss.detach()

    def release(self) -> None:
        """Leave the model as others expect it; the next use takes it up again."""

    def reduce(self, world: World) -> None:
        """Replace each .grad by its sum over all ranks."""
        sum_gradients(self._parameters, world)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` (0: leave it); returns its L2 norm before that, float32 scalar."""
        bound = max_norm if max_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(self._parameters, bound)


def accumulate_gradients(
    objective: Objective, batches: Sequence[Batch], world: World, max_norm: float = 0.0
) -> StepTotals:
    """Leave in .grad the gradient of (sum of losses) / (number of targets), both over the whole step, clipped.

    batches: this rank's micro-batches; none is fine, and so is one without targets. max_norm: 0: not clipped.
    The device is waited for once, when all of this has been launched.
    """
    mine = [
        float(sum(len(batch.targets) for batch in batches)),
        float(sum(batch.tokens for batch in batches)),
    ]
    targets, tokens = sum_over_ranks(mine, world)
    objective.begin_step()
    losses = [objective.accumulate(batch, targets) for batch in batches if len(batch.targets)]
    objective.reduce(world)
    norm = objective.clip(max_norm)
    *of_batches, grad_norm = torch.stack([*losses, norm]).tolist()
    (loss_sum,) = sum_over_ranks([sum(of_batches, 0.0)], world)
    return StepTotals(loss_sum, int(targets), int(tokens), grad_norm)
