"""The fast path as an objective of the training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from opensloth.data.batch import Batch
from opensloth.dist import World
from opensloth.fused.keeping import Keep
from opensloth.fused.model import FusedModel
from opensloth.model import base_of
from opensloth.step import Objective


class FusedObjective(Objective):
    """Trains and evaluates by `FusedModel`."""

    engine = "fused"

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None,
        keep: Keep,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(model, autocast=autocast, beat=beat)
        self._fused = FusedModel(base_of(model), keep=keep)

    def loss_sum(self, batch: Batch) -> Tensor:
        self._beat()
        return self._fused.loss_sum(batch.to(torch.device("cpu")))

    def begin_step(self) -> None:
        self._fused.begin_step()

    def accumulate(self, batch: Batch, targets: float, world: World) -> Tensor:
        self._beat()
        return self._fused.accumulate(batch, 1 / targets)

    def reduce(self, world: World) -> None:
        if world.size > 1:
            torch_dist.all_reduce(self._fused.gradient)

    def clip(self, max_norm: float) -> float:
        return float(self._fused.clip(max_norm))
