"""Every key of transformers' TrainingArguments is honoured, fixed or refused by name: none is ignored."""

from __future__ import annotations

import dataclasses

import pytest
import transformers
from transformers import SchedulerType, trainer_optimizer
from transformers.training_args import OptimizerNames

from opensloth import run_config
from opensloth.opensloth_config import TrainingArguments
from opensloth.training_keys import (
    FIXED,
    OPTIMIZERS,
    REFUSED,
    SCHEDULERS,
    needs_bitsandbytes,
    refusal_of_transformers_key,
)

THEIRS = sorted(field.name for field in dataclasses.fields(transformers.TrainingArguments))
SEED_DEFAULTS = {
    "output_dir": "saves/loras/",
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-4,
    "gradient_accumulation_steps": 4,
    "logging_steps": 1,
    "num_train_epochs": 3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "save_total_limit": 2,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "save_only_model": False,
    "resume_from_checkpoint": None,
    "seed": 42,
    "report_to": "tensorboard",
    "eval_strategy": "no",
}


@pytest.mark.parametrize("name", THEIRS)
def test_each_key_has_exactly_one_fate(name: str) -> None:
    fates = [name in TrainingArguments.model_fields, name in FIXED, name in REFUSED]
    assert sum(fates) == 1, f"{name}: honoured, fixed, refused = {fates}"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_key_is_refused_by_name_and_with_its_reason(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: not supported: .{{8,}}"):
        TrainingArguments(**{name: "anything"})


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_fixed_key_takes_its_one_value_and_no_other(name: str) -> None:
    value, _ = FIXED[name]
    TrainingArguments(**{name: value})
    other = (not value) if isinstance(value, bool) else "something else"
    with pytest.raises(ValueError, match=f"{name}: only .* is possible: .*"):
        TrainingArguments(**{name: other})


def test_optimizers_and_schedules_are_transformers_own() -> None:
    assert set(OPTIMIZERS) <= {member.value for member in OptimizerNames}
    assert set(SCHEDULERS) <= {member.value for member in SchedulerType}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whose_optimizers_are_bitsandbytes(name: str) -> None:
    theirs = trainer_optimizer._BITSANDBYTES_OPTIMIZERS
    assert needs_bitsandbytes(name) == (OptimizerNames(name) in theirs)


@pytest.mark.parametrize(
    ("key", "value", "meant"), [("optim", "adamw_torhc", "adamw_torch"), ("lr_scheduler_type", "linaer", "linear")]
)
def test_names_of_optimizers_and_schedules_are_checked(key: str, value: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {meant}"):
        TrainingArguments(**{key: value})


def test_zero_is_not_false() -> None:
    assert refusal_of_transformers_key("fp16", 0)
    assert refusal_of_transformers_key("fp16", False) == ""


@pytest.mark.parametrize(("name", "value"), SEED_DEFAULTS.items())
def test_defaults(name: str, value: object) -> None:
    assert getattr(TrainingArguments(), name) == value


def test_refusals_reach_the_reader_of_a_file_with_their_path() -> None:
    _, problems = run_config.check(
        {
            "name": "a",
            "opensloth": {"fast_model_args": {"model_name": "m"}},
            "dataset": {"path": "d"},
            "training": {"deepspeed": "x.json", "fp16": True, "optimiser": "adam"},
        }
    )
    said = {problem.path: problem for problem in problems}
    assert "sharding" in said["training.deepspeed"].message
    assert "only false" in said["training.fp16"].message
    assert said["training.optimiser"].hint == "did you mean optim?"
