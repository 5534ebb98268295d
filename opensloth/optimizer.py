"""The optimizer and the schedule that a config names, built by transformers, and put back from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from opensloth.arithmetic import StepPlan
from opensloth.errors import ConfigError, DataError, Problem
from opensloth.opensloth_config import TrainingArguments


def make_optimizer(
    parameters: Sequence[nn.Parameter], arguments: Any, *, flat_gradients: bool = False
) -> torch.optim.Optimizer:
    """Weight decay goes to matrices, not to biases and norms.

    arguments: transformers' TrainingArguments. flat_gradients: they will lie as `flat.arrange` has it.
    Raises ConfigError when the optimizer is unknown or its package is missing.
    """
    try:
        kind, options = choose_optimizer(arguments)
        if flat_gradients and arguments.optim in _FLAT and not arguments.optim_args:
            from opensloth.flat_optimizer import FlatAdamW

            return FlatAdamW(parameters, weight_decay=arguments.weight_decay, **options)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = kind([group for group in groups if group["params"]], **options)
    except (ValueError, ImportError, TypeError) as error:
        raise ConfigError([Problem("training.optim", f"{arguments.optim} cannot be used: {error}")]) from error
    return optimizer


_FLAT = ("adamw_8bit", "adamw_bnb_8bit")
_ADAMW: dict[str, dict[str, Any]] = {"adamw_torch": {}, "adamw_torch_fused": {"fused": True}}


def choose_optimizer(arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The class and its options, as transformers' Trainer chooses them.

    torch's own AdamW is said here: the Trainer imports datasets and pandas, a third of a second of every start.
    """
    if arguments.optim in _ADAMW and not arguments.optim_args:
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        options = {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
        return torch.optim.AdamW, options | _ADAMW[arguments.optim]
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind, options


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


_HINT = "resume where and as it was trained (training.optim, opensloth.engine), or start anew"


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """By which a checkpoint knows it."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def kept(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """What a checkpoint holds of them."""
    return {"kind": kind_of(optimizer), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


def restore(optimizer: torch.optim.Optimizer, scheduler: Any, saved: dict[str, Any]) -> None:
    """Put back the moments and the place in the schedule; rates, decay and betas are the config's.

    A checkpoint holds those too: they would silently undo a learning rate that was made smaller since.
    saved: as `kept` makes it.
    Raises DataError when it is of another kind of optimizer: what 8-bit AdamW keeps depends on the engine too.
    """
    kind = saved.get("kind", kind_of(optimizer))  # of an older version: not said
    if kind != kind_of(optimizer):
        raise DataError(f"the checkpoint holds the moments of {kind}, and this run has {kind_of(optimizer)}", _HINT)
    given = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    rates = list(scheduler.base_lrs)
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise DataError(f"the checkpoint's moments are of other parameters: {error}", _HINT) from error
    scheduler.load_state_dict(saved["scheduler"] | {"base_lrs": rates})
    parts = zip(optimizer.param_groups, given, rates, scheduler.lr_lambdas, strict=True)
    for group, options, rate, factor in parts:
        group.update(options, lr=rate * factor(scheduler.last_epoch))
