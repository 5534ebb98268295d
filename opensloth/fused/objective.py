"""The fast path as an objective of the training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from opensloth.data.batch import Batch
from opensloth.dist import World
from opensloth.fused.inputs import padded_tokens
from opensloth.fused.model import FusedModel
from opensloth.memory_estimate import Keeping
from opensloth.model import base_of
from opensloth.step import Objective


class FusedObjective(Objective):
    """Trains and evaluates by `FusedModel`."""

    engine = "fused"
    has_flat_gradients = True

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None,
        keeping: Keeping,
        full_batch: int = 0,
        long_document: int = 0,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(model, autocast=autocast, beat=beat)
        self._keeping, self._full_batch, self._long_document = keeping, full_batch, long_document
        self._taken_up: FusedModel | None = None

    @property
    def _fused(self) -> FusedModel:
        if self._taken_up is None:
            self._taken_up = FusedModel(
                base_of(self._model),
                keeping=self._keeping,
                full_batch=self._full_batch,
                long_document=self._long_document,
            )
        return self._taken_up

    def release(self) -> None:
        taken_up, self._taken_up = self._taken_up, None  # also where giving back fails: half of it is of no use
        if taken_up is not None:
            taken_up.release()

    def loss_sum(self, batch: Batch) -> Tensor:
        self._beat()
        return self._fused.loss_sum(batch)

    def positions(self, batch: Batch) -> int:
        return padded_tokens(super().positions(batch), self._full_batch)

    def begin_step(self) -> None:
        self._fused.begin_step()

    def accumulate(self, batch: Batch, targets: float) -> Tensor:
        self._beat()
        return self._fused.accumulate(batch, 1 / targets)

    def reduce(self, world: World) -> None:
        if world.size > 1:
            torch_dist.all_reduce(self._fused.gradient)

    def clip(self, max_norm: float) -> Tensor:
        return self._fused.clip(max_norm)
