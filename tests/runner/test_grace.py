from __future__ import annotations

from typing import Any

import pytest

from opensloth.run_config import RunConfig, check
from opensloth.training_keys import OPTIMIZERS
from runner.grace import Grace, bytes_per_parameter, derive_grace, parameters_in_name


def config(model: str, full: bool = True, **training: Any) -> RunConfig:
    values = {
        "name": "a",
        "opensloth": {"fast_model_args": {"model_name": model, "full_finetuning": full}},
        "dataset": {"path": "a/b"},
        "training": training,
    }
    checked, problems = check(values)
    assert checked is not None, problems
    return checked


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("unsloth/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("meta-llama/Llama-3.1-70B", 70e9),
        ("gpt-neo-125m", 125e6),
        ("unsloth/llama-3-8b-bnb-4bit", 8e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("google/gemma-3-270m-it", 270e6),
        ("/shared/inputs/" + "0" * 64 + "/tiny-1M", 1e6),
        ("/models/Qwen2.5-7B/snapshot", 7e9),
        ("microsoft/Phi-3-mini-128k-instruct", None),
        ("gpt2", None),
        ("a/b", None),
        ("model-4bit", None),
        ("model-0b", None),
    ],
)
def test_parameters_in_a_name(model: str, parameters: float | None) -> None:
    assert parameters_in_name(model) == parameters


@pytest.mark.parametrize(
    ("optim", "size"),
    [("adamw_torch", 12), ("adamw_8bit", 6), ("paged_adamw_32bit", 12), ("ademamix", 16), ("lion_8bit", 5), ("sgd", 4)],
)
def test_bytes_per_parameter(optim: str, size: float) -> None:
    assert bytes_per_parameter(config("a/b", optim=optim).training) == size


def test_every_optimizer_has_a_size() -> None:
    """float32 or 8 bit, up to three states; a family that is not known would count as the largest."""
    assert {optim: bytes_per_parameter(config("a/b", optim=optim).training) for optim in OPTIMIZERS} == {
        "adamw_torch": 12, "adamw_torch_fused": 12, "adamw_8bit": 6, "adamw_bnb_8bit": 6, "paged_adamw_32bit": 12,
        "paged_adamw_8bit": 6, "ademamix": 16, "ademamix_8bit": 7, "paged_ademamix_32bit": 16,
        "paged_ademamix_8bit": 7, "lion_8bit": 5, "lion_32bit": 8, "paged_lion_8bit": 5, "paged_lion_32bit": 8,
        "adafactor": 5, "adagrad": 8, "rmsprop": 8, "sgd": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("checked", "seconds"),
    [
        (config("a/model-7b", full=False), 120),
        (config("a/model-135M"), 120),
        (config("a/model-7b"), 270),  # 7e9 x 6 bytes at 200 MB/s are 210 s
        (config("a/model-7b", optim="adamw_torch"), 480),
        (config("a/model-7b", save_only_model=True), 200),
        (config("a/model-70b", optim="adamw_torch"), 4260),
        (config("a/model"), 600),
    ],
)
def test_seconds(checked: RunConfig, seconds: int) -> None:
    assert derive_grace(checked).seconds == seconds


def test_why() -> None:
    assert derive_grace(config("a/model-7b", optim="adamw_torch")) == Grace(
        480, "derived: a checkpoint of 84.0 GB at 200 MB/s"
    )
