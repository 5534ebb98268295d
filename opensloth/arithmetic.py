"""Batch and step arithmetic: from row counts and a config to what a run will do. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensloth.errors import ConfigError, Problem
from opensloth.opensloth_config import TrainingArguments

FEW_STEPS = 50
"""Fewer optimizer steps than this draw a warning: the learning rate hardly gets anywhere."""
MAX_CHECKPOINT_INTERVAL_STEPS = 500


@dataclass(frozen=True)
class BatchShape:
    """How one optimizer step is cut up: rows_per_step = per_device * accumulation * world."""

    per_device: int
    """Rows in a micro-batch of one process."""
    accumulation: int
    """Micro-batches of one process in a step."""
    world: int
    """Processes."""

    @property
    def rows_per_step(self) -> int:
        return self.per_device * self.accumulation * self.world

    def __str__(self) -> str:
        rows = "row" if self.per_device == 1 else "rows"
        return (
            f"{self.per_device} {rows} x {self.accumulation} accumulation x {self.world} "
            f"process{'es' if self.world > 1 else ''} = {self.rows_per_step} "
            f"{'row' if self.rows_per_step == 1 else 'rows'} a step"
        )


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps of a run over `rows` rows."""

    rows: int
    shape: BatchShape
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    checkpoint_interval: int
    """Steps between checkpoints; 0: none by step."""
    eval_interval: int
    """Steps between evaluations; 0: none by step."""


def batch_shape(training: TrainingArguments, world: int) -> BatchShape:
    """Derive the accumulation from `global_batch_size` when it is given.

    world: processes, 1 or more.
    Raises ConfigError when the rows of a step cannot be spread evenly; the hint lists the nearest sizes.
    """
    per_device = training.per_device_train_batch_size
    size = training.global_batch_size
    if size is None:
        return BatchShape(per_device, training.gradient_accumulation_steps, world)
    unit = per_device * world
    if size % unit:
        near = sorted({max(1, size // unit) * unit, (size // unit + 1) * unit})
        raise ConfigError(
            [
                Problem(
                    "training.global_batch_size",
                    f"{size} rows cannot be spread over {world} process{'es' if world > 1 else ''} "
                    f"x {per_device} rows (per_device_train_batch_size)",
                    f"nearest sizes that can: {', '.join(map(str, near))}",
                )
            ]
        )
    shape = BatchShape(per_device, size // unit, world)
    if training.wrote("gradient_accumulation_steps") and training.gradient_accumulation_steps != shape.accumulation:
        raise ConfigError(
            [
                Problem(
                    "training.gradient_accumulation_steps",
                    f"is {training.gradient_accumulation_steps}, but global_batch_size {size} needs "
                    f"{shape.accumulation}",
                    "give one of the two",
                )
            ]
        )
    return shape


def step_plan(training: TrainingArguments, rows: int, world: int, has_eval: bool = False) -> StepPlan:
    """Count the steps of a run.

    rows: packed rows of an epoch, 1 or more.
    has_eval: whether there is an evaluation split.
    """
    shape = batch_shape(training, world)
    if training.eval_strategy != "no" and not has_eval:
        raise ConfigError(
            [
                Problem(
                    "training.eval_strategy",
                    f"is {training.eval_strategy}, but there is no evaluation split",
                    "set dataset.eval_fraction or dataset.eval_path, or drop eval_strategy",
                )
            ]
        )
    whole, rest = divmod(rows, shape.rows_per_step)
    per_epoch = whole if training.dataloader_drop_last else whole + bool(rest)
    if per_epoch == 0:
        raise ConfigError(
            [
                Problem(
                    "training.dataloader_drop_last",
                    f"{rows} rows do not fill one step of {shape.rows_per_step} rows, and short steps are dropped",
                    "set it to false, or make the step smaller",
                )
            ]
        )
    epochs_steps = math.ceil(training.num_train_epochs * per_epoch)
    total = training.max_steps if training.max_steps > 0 else max(1, epochs_steps)
    return StepPlan(
        rows=rows,
        shape=shape,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=_warmup(training.warmup_steps, total),
        checkpoint_interval=_checkpoint_interval(training, total, per_epoch),
        eval_interval=_eval_interval(training, per_epoch) if has_eval else 0,
    )


def plan_warnings(plan: StepPlan) -> list[str]:
    """What a person should know before the run starts."""
    said = []
    if plan.total_steps < FEW_STEPS:
        said.append(
            f"only {plan.total_steps} optimizer steps: consider fewer rows a step "
            "(gradient_accumulation_steps, per_device_train_batch_size) or more epochs"
        )
    if plan.warmup_steps > plan.total_steps / 5:
        said.append(
            f"warm-up takes {plan.warmup_steps} of {plan.total_steps} steps, more than a fifth: "
            "consider a smaller training.warmup_steps"
        )
    return said


def _warmup(given: float, total: int) -> int:
    return math.ceil(total * given) if 0 < given < 1 else int(given)


def _checkpoint_interval(training: TrainingArguments, total: int, per_epoch: int) -> int:
    if training.save_strategy == "no":
        return 0
    if training.save_strategy == "epoch":
        return per_epoch
    return training.save_steps or max(1, min(MAX_CHECKPOINT_INTERVAL_STEPS, total // 10))


def _eval_interval(training: TrainingArguments, per_epoch: int) -> int:
    if training.eval_strategy == "steps":
        return training.eval_steps or training.logging_steps
    if training.eval_strategy == "epoch" or not training.wrote("eval_strategy"):
        return per_epoch
    return 0
