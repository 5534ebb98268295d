"""The optimizer and the schedule that a config names, built by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from opensloth.arithmetic import StepPlan
from opensloth.errors import ConfigError, Problem
from opensloth.opensloth_config import TrainingArguments


def make_optimizer(parameters: Sequence[nn.Parameter], arguments: Any) -> torch.optim.Optimizer:
    """Weight decay goes to matrices, not to biases and norms.

    arguments: transformers' TrainingArguments.
    Raises ConfigError when the optimizer is unknown or its package is missing.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer: torch.optim.Optimizer = kind([group for group in groups if group["params"]], **options)
    except (ValueError, ImportError, TypeError) as error:
        raise ConfigError([Problem("training.optim", f"{arguments.optim} cannot be used: {error}")]) from error
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, training: TrainingArguments, plan: StepPlan) -> Any:
    """The learning rate's schedule over the plan's steps.

    Raises ConfigError when lr_scheduler_kwargs do not fit lr_scheduler_type.
    """
    try:
        return get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=plan.warmup_steps,
            num_training_steps=plan.total_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        message = f"do not fit {training.lr_scheduler_type}: {error}"
        raise ConfigError([Problem("training.lr_scheduler_kwargs", message)]) from error
