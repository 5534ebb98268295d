"""Batches and steps, worked out by hand."""

from __future__ import annotations

import pytest

from opensloth.arithmetic import batch_shape, plan_warnings, step_plan
from opensloth.errors import ConfigError
from opensloth.opensloth_config import TrainingArguments


def test_rows_of_a_step() -> None:
    shape = batch_shape(TrainingArguments(), world=3)
    assert shape.rows_per_step == 2 * 4 * 3
    assert str(shape) == "2 rows x 4 accumulation x 3 processes = 24 rows a step"


def test_global_batch_size_derives_the_accumulation() -> None:
    assert batch_shape(TrainingArguments(global_batch_size=64), world=8).accumulation == 4


@pytest.mark.parametrize(("size", "near"), [(250, "240, 256"), (3, "16"), (17, "16, 32")])
def test_an_indivisible_global_batch_lists_the_nearest_sizes(size: int, near: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest sizes that can: {near}"):
        batch_shape(TrainingArguments(global_batch_size=size), world=8)


def test_two_answers_to_one_question() -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        batch_shape(TrainingArguments(global_batch_size=16, gradient_accumulation_steps=2), world=1)


def test_steps_count_the_short_one_unless_it_is_dropped() -> None:
    assert step_plan(TrainingArguments(), rows=41, world=1).steps_per_epoch == 6
    assert step_plan(TrainingArguments(dataloader_drop_last=True), rows=41, world=1).steps_per_epoch == 5
    assert step_plan(TrainingArguments(), rows=41, world=1).total_steps == 18
    assert step_plan(TrainingArguments(num_train_epochs=0.5), rows=41, world=1).total_steps == 3
    assert step_plan(TrainingArguments(max_steps=7), rows=41, world=1).total_steps == 7


def test_too_few_rows_for_a_whole_step() -> None:
    with pytest.raises(ConfigError, match="do not fill one step"):
        step_plan(TrainingArguments(dataloader_drop_last=True), rows=7, world=1)


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (0.1, 100), (10, 10), (1, 1)])
def test_warm_up_below_one_is_a_fraction(given: float, steps: int) -> None:
    assert step_plan(TrainingArguments(warmup_steps=given, max_steps=1000), rows=8, world=1).warmup_steps == steps


@pytest.mark.parametrize(
    ("arguments", "interval"),
    [
        ({"max_steps": 60}, 6),
        ({"max_steps": 100_000}, 500),
        ({"max_steps": 5}, 1),
        ({"save_steps": 7}, 7),
        ({"save_strategy": "epoch"}, 6),
        ({"save_strategy": "no"}, 0),
    ],
)
def test_checkpoints(arguments: dict[str, object], interval: int) -> None:
    assert step_plan(TrainingArguments(**arguments), rows=41, world=1).checkpoint_interval == interval


def test_evaluation_follows_the_split_unless_it_was_switched_off() -> None:
    assert step_plan(TrainingArguments(), rows=41, world=1, has_eval=True).eval_interval == 6
    assert step_plan(TrainingArguments(), rows=41, world=1).eval_interval == 0
    assert step_plan(TrainingArguments(eval_strategy="no"), rows=41, world=1, has_eval=True).eval_interval == 0
    steps = TrainingArguments(eval_strategy="steps", eval_steps=3)
    assert step_plan(steps, rows=41, world=1, has_eval=True).eval_interval == 3


def test_an_evaluation_that_was_asked_for_needs_a_split() -> None:
    with pytest.raises(ConfigError, match="no evaluation split"):
        step_plan(TrainingArguments(eval_strategy="epoch"), rows=8, world=1)


def test_warnings() -> None:
    assert plan_warnings(step_plan(TrainingArguments(max_steps=1000), rows=8, world=1)) == []
    few, warm_up = plan_warnings(step_plan(TrainingArguments(max_steps=40), rows=8, world=1))
    assert "only 40 optimizer steps" in few
    assert "10 of 40 steps" in warm_up
