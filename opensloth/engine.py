"""Which engine trains a model: the fast path where it computes the same, else plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from opensloth.data.training_data import Rows
from opensloth.errors import ConfigError, Problem
from opensloth.fused.keeping import roomiest, speeds_of
from opensloth.fused.long_documents import least_for
from opensloth.fused.support import reason_against
from opensloth.memory_estimate import Keep, Keeping
from opensloth.model import base_of
from opensloth.opensloth_config import FastModelArgs, OpenSlothConfig
from opensloth.step import Objective
from opensloth.training_keys import moment_bytes


def choose(
    model: nn.Module,
    rows: Rows,
    config: OpenSlothConfig,
    *,
    optim: str,
    longest_document: int,
    rows_per_batch: int,
    autocast: torch.dtype | None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Objective, str]:
    """The objective of the engine that `config` asks for, and why it is this one.

    optim: as TrainingArguments name it. longest_document: tokens, of all that it will train on or evaluate.
    Raises ConfigError when `engine: fused` is asked for and cannot be had.
    """
    if config.engine == "torch":
        return Objective(model, autocast=autocast, beat=beat), "asked for"
    reason = reason_against(model, packed=rows.packed, longest_document=longest_document, autocast=autocast)
    if reason is None:
        from opensloth.fused.objective import FusedObjective

        full = rows_per_batch * rows.capacity
        long_document, of_long = least_for(base_of(model), longest_document)  # loads kernels: before memory is counted
        keeping = _keeping(model, config.fast_model_args, full, moment_bytes(optim))
        why = "asked for" if config.engine == "fused" else "forward and backward by hand, in few kernels"
        objective = FusedObjective(
            model, autocast=autocast, keeping=keeping, full_batch=full, long_document=long_document, beat=beat
        )
        return objective, f"{why}; keeps {keeping}{of_long}"
    if config.engine == "fused":
        hint = "--set opensloth.engine=auto takes the next best"
        raise ConfigError([Problem("opensloth.engine", f"the fast path cannot train this: {reason}", hint)])
    return Objective(model, autocast=autocast, beat=beat), f"the fast path cannot train this: {reason}"


def _keeping(model: nn.Module, args: FastModelArgs, tokens: int, moments: int) -> Keeping:
    """use_gradient_checkpointing: false keeps all, true the layers' inputs, "unsloth" something in host memory."""
    asked = args.use_gradient_checkpointing
    if isinstance(asked, bool):
        return Keeping(Keep.INPUTS if asked else Keep.ALL)
    ranks = [lora.r for lora in getattr(model, "peft_config", {}).values()]
    rank = max(ranks, default=0)
    base = base_of(model)
    return roomiest(
        base.config,
        tokens,
        _free_bytes(base.device),
        rank=rank,
        moments=moments,
        in_host=asked == "unsloth",
        speeds=lambda: speeds_of(base.device),
    )


def _free_bytes(device: torch.device) -> int:
    """For this process on a GPU; a CPU has no end."""
    if device.type != "cuda":
        return sys.maxsize
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)
