"""AdamW with moments in 8 bits, as bitsandbytes trains one tensor after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from opensloth.optimizer import make_optimizer

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
DECAY = 0.1


def tensor_by_tensor(parameters: Sequence[nn.Parameter]) -> Any:
    """With OPTIONS and DECAY, as a run on the plain engine has it."""
    beta1, beta2 = OPTIONS["betas"]
    arguments = TrainingArguments(
        output_dir="-", optim="adamw_8bit", use_cpu=True, learning_rate=OPTIONS["lr"], weight_decay=DECAY,
        adam_beta1=beta1, adam_beta2=beta2, adam_epsilon=OPTIONS["eps"],
    )  # fmt: skip
    return make_optimizer(parameters, arguments)
