"""Which engine trains a model: the fast path where it computes the same, else plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from opensloth.data.training_data import Rows
from opensloth.errors import ConfigError, Problem
from opensloth.fused.support import reason_against
from opensloth.opensloth_config import OpenSlothConfig
from opensloth.step import Objective


def choose(
    model: nn.Module,
    rows: Rows,
    config: OpenSlothConfig,
    *,
    autocast: torch.dtype | None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Objective, str]:
    """The objective of the engine that `config` asks for, and why it is this one.

    Raises ConfigError when `engine: fused` is asked for and cannot be had.
    """
    if config.engine == "torch":
        return Objective(model, autocast=autocast, beat=beat), "asked for"
    longest = int(rows.documents.lengths[rows.members].max())
    reason = reason_against(model, packed=rows.packed, longest_document=longest, autocast=autocast)
    if reason is None:
        from opensloth.fused.objective import FusedObjective

        recompute = bool(config.fast_model_args.use_gradient_checkpointing)
        why = "asked for" if config.engine == "fused" else "forward and backward by hand, in few kernels"
        return FusedObjective(model, autocast=autocast, recompute=recompute, beat=beat), why
    if config.engine == "fused":
        hint = "--set opensloth.engine=auto takes the next best"
        raise ConfigError([Problem("opensloth.engine", f"the fast path cannot train this: {reason}", hint)])
    return Objective(model, autocast=autocast, beat=beat), f"the fast path cannot train this: {reason}"
