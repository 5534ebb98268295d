"""A mapping becomes a config, or all of its problems at once; and a config survives its file."""

from __future__ import annotations

from typing import Any

import pytest

from opensloth import run_config
from opensloth.errors import ConfigError

SMALLEST: dict[str, Any] = {
    "name": "sft",
    "opensloth": {"fast_model_args": {"model_name": "unsloth/Qwen2.5-0.5B-Instruct"}},
    "dataset": {"path": "train.jsonl"},
}


def paths_of(values: dict[str, Any]) -> list[str]:
    config, problems = run_config.check(values)
    assert config is None
    return sorted(problem.path for problem in problems)


def test_the_smallest_file() -> None:
    config, problems = run_config.check(SMALLEST)
    assert problems == []
    assert config is not None
    assert config.opensloth.data_cache_path == "cache"
    assert config.training.output_dir is None
    assert config.dataset is not None
    assert config.dataset[0].train_on == "assistant"


def test_all_problems_at_once() -> None:
    found = paths_of(
        {
            "name": "Not A Name",
            "opensloth": {
                "fast_model_args": {"max_seq_len": 1, "load_in_4bit": "yes"},
                "lora_args": {"r": 0, "target_modules": "q_proj"},
            },
            "dataset": [{"path": "a"}, {"weight": -1}],
            "training": {"learning_rate": "fast", "warmup_ratio": 0.1},
            "trainig": {},
        }
    )
    assert found == [
        "dataset[1].path",
        "dataset[1].weight",
        "name",
        "opensloth.fast_model_args.load_in_4bit",
        "opensloth.fast_model_args.max_seq_len",
        "opensloth.fast_model_args.model_name",
        "opensloth.lora_args.r",
        "opensloth.lora_args.target_modules",
        "trainig",
        "training.learning_rate",
        "training.warmup_ratio",
    ]


@pytest.mark.parametrize(
    ("change", "path", "said"),
    [
        ({"opensloth": None}, "opensloth", "missing"),
        ({"opensloth": 3}, "opensloth", "expected a mapping of keys, got 3"),
        ({"dataset": None}, "dataset", "nothing to train on"),
        ({"dataset": []}, "dataset", "empty list"),
        ({"training_type": "dpo"}, "opensloth.training_type", "'dpo' is not there yet"),
        ({"training": {"max_steps": 1.5}}, "training.max_steps", "expected a whole number, got 1.5"),
        ({"training": {"seed": True}}, "training.seed", "expected a whole number, got true"),
        ({"training": {"report_to": "comet"}}, "training.report_to", "expected"),
    ],
)
def test_one_problem(change: dict[str, Any], path: str, said: str) -> None:
    _, problems = run_config.check(SMALLEST | change)
    assert any(problem.path.startswith(path) and said in problem.message for problem in problems), problems


def test_an_ignored_key_is_a_problem_in_a_file() -> None:
    opensloth = SMALLEST["opensloth"] | {"lora_args": {"r": 4}, "pretrained_lora": "adapter"}
    assert paths_of(SMALLEST | {"opensloth": opensloth}) == ["opensloth"]


def test_a_config_survives_its_file_and_knows_what_was_written() -> None:
    config, _ = run_config.check(SMALLEST | {"training": {"learning_rate": 1e-5, "gradient_accumulation_steps": 2}})
    assert config is not None
    again = run_config.load(run_config.dump(config))
    assert again == config
    assert again.training.wrote("gradient_accumulation_steps")
    assert not again.training.wrote("optim")
    assert not again.opensloth.fast_model_args.wrote("load_in_4bit")
    assert "training.learning_rate" in again.explicit


def test_a_config_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="training"):
        run_config.load('{"name": "a", "opensloth": {}}')
