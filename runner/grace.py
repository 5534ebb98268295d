"""How long a pod needs to save a checkpoint when it is asked to stop. Pure; seconds and bytes.

What is not known (a pod's disk, a model that is not here) is guessed on the slow side: a grace period that is too
long costs nothing while pods end by themselves, one that is too short costs the work since the last checkpoint.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from opensloth.opensloth_config import TrainingArguments
from opensloth.run_config import RunConfig

LEAST_SECONDS: Final = 120
"""Enough for an adapter: ranks agree at the end of a step, then write a few hundred megabytes at most."""
UNKNOWN_SECONDS: Final = 600
"""Full fine-tuning of a model whose name does not tell its size: 18 billion parameters with 8-bit AdamW."""
WRITE_BYTES_PER_SECOND: Final = 200_000_000
"""Writing, hashing and syncing on a network volume that others use too; a local NVMe drive is ten times faster."""
MARGIN_SECONDS: Final = 60
"""The step that is under way, and what the launcher does before and after."""
WEIGHT_BYTES: Final = 4
"""Weights that are trained whole are kept and saved in float32."""
_STATE_BYTES: Final = {"adamw": 8, "ademamix": 12, "lion": 4, "adagrad": 4, "rmsprop": 4, "adafactor": 1, "sgd": 0}
"""Optimizer state per parameter in float32, by the family in the optimizer's name; as 8 bit a quarter of it."""
_SIZE: Final = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")
_UNITS: Final = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True)
class Grace:
    """seconds: of terminationGracePeriodSeconds; why: a phrase that says where the number comes from."""

    seconds: int
    why: str


def derive_grace(config: RunConfig) -> Grace:
    """From the size of the run's checkpoints."""
    model = config.opensloth.fast_model_args
    if not model.full_finetuning:
        return Grace(LEAST_SECONDS, "derived: an adapter's checkpoint is small")
    parameters = parameters_in_name(model.model_name)
    if parameters is None:
        return Grace(UNKNOWN_SECONDS, "derived: full fine-tuning, and the model's name does not tell its size")
    size = parameters * bytes_per_parameter(config.training)
    seconds = max(LEAST_SECONDS, _rounded_up(size / WRITE_BYTES_PER_SECOND + MARGIN_SECONDS))
    speed = WRITE_BYTES_PER_SECOND // 1_000_000
    return Grace(seconds, f"derived: a checkpoint of {size / 1e9:,.1f} GB at {speed} MB/s")


def parameters_in_name(model: str) -> float | None:
    """Parameters that a model's name or path tells of: 0.5e9 of `Qwen2.5-0.5B`, 56e9 of `Mixtral-8x7B`; else None.

    The last part of a path that tells any counts, and in it the largest number: `30B-A3B` has 30e9.
    """
    for part in reversed(model.lower().split("/")):
        found = [int(times or 1) * float(number) * _UNITS[unit] for times, number, unit in _SIZE.findall(part)]
        if any(found):
            return max(found)
    return None


def bytes_per_parameter(training: TrainingArguments) -> float:
    """Of a checkpoint of full fine-tuning: the weight, and unless save_only_model the optimizer's state."""
    if training.save_only_model:
        return WEIGHT_BYTES
    state = next(
        (size for family, size in _STATE_BYTES.items() if family in training.optim), max(_STATE_BYTES.values())
    )
    return WEIGHT_BYTES + (state / 4 if training.optim.endswith("8bit") else state)


def _rounded_up(seconds: float) -> int:
    """To whole tens."""
    return math.ceil(seconds / 10) * 10
