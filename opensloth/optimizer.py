"""The optimizer that a config names, built by transformers' own table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from opensloth.errors import ConfigError, Problem


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
