"""Whole runs on the fast path: through the launcher, interrupted and resumed; from Python; on two GPUs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_runs
import launched
import packing
import pytest
import shapes
import torch
from cards import CUDA, DEVICE, NEEDS_BITSANDBYTES, NEEDS_GPU, NEEDS_TWO
from measured import at_most
from peft import AutoPeftModelForCausalLM
from train_rank import identical, largest_distance

from opensloth import packing_check, run_config
from opensloth.data.build import build
from opensloth.data.prepared import PreparedDataset
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.train import train

pytestmark = [*NEEDS_GPU, pytest.mark.timeout(600)]


@pytest.mark.parametrize("optim", ["adamw_torch", pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES)])
def test_an_interrupted_run_goes_on_to_the_same_bits(optim: str, tmp_path: Path) -> None:
    """Asked to stop, then killed between two checkpoints: every loss and gradient norm, and the result."""
    model = shapes.save(tmp_path / "model", "qwen2")
    whole, parts = (gpu_runs.Run(tmp_path / name, model, optim=optim) for name in ("whole", "parts"))
    assert whole.finish() == 0, whole.said()
    assert {e["engine"] for e in whole.events() if e["event"] == "engine"} == {"fused" if CUDA else "torch"}

    parts.env = launched.with_faults(steps_per_second=5)
    parts.start()
    parts.until_step(7)
    assert parts.process is not None
    parts.process.send_signal(signal.SIGTERM)
    assert parts.wait() != 0
    assert (torch.uint8 in parts.kinds_of_moments()) == (optim == "adamw_8bit")
    parts.start()
    parts.until_step(14)
    os.kill(parts.ranks()[0], signal.SIGKILL)
    assert parts.wait() != 0
    parts.env = {}
    assert parts.finish() == 0, parts.said()

    resumed = [event["step"] for event in parts.events() if event["event"] == "resumed"]
    assert len(resumed) == 2
    assert 7 <= resumed[0] <= 10 <= resumed[1] < gpu_runs.STEPS
    assert parts.figures() == whole.figures()
    assert len(whole.figures()) == gpu_runs.STEPS
    assert all(len(said) == 1 for said in parts.figures().values())
    assert identical(parts.weights(), whole.weights())


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_from_python(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has learned is there when plain transformers and peft load the result in float32."""
    model = shapes.save(tmp_path / "model", kind)
    (tmp_path / "train.jsonl").write_text("".join(launched.row(i) for i in range(300)))
    data = prepared(tmp_path, model)
    asked = OpenSlothConfig(
        data_cache_path=str(data),
        engine=gpu_runs.engine(),
        fast_model_args=FastModelArgs(model_name=str(model), max_seq_length=gpu_runs.ROW, load_in_4bit=False),
        lora_args=LoraArgs(),
    )
    arguments: dict[str, Any] = dict(
        gradient_accumulation_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, warmup_steps=2,
        optim="adamw_torch", report_to="none", save_strategy="no",
    )  # fmt: skip
    first = TrainingArguments(output_dir=str(tmp_path / "first"), max_steps=1, **arguments)
    train(asked, first)  # compiles the kernels
    monkeypatch.setenv("OSLO_ROOT", str(tmp_path / "root"))  # where no check is remembered
    out = tmp_path / "out"
    result = train(asked, TrainingArguments(output_dir=str(out), max_steps=30, **arguments))
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    steps = [event["loss"] for event in events if event["event"] == "step"]
    assert next(event for event in events if event["event"] == "engine")["engine"] == gpu_runs.engine()
    (check,) = (event for event in events if event["event"] == "check")
    assert not check["remembered"]
    at_most("the check before the first step on a GPU, with its kernels compiled: seconds", check["seconds"], 5)
    assert result.loss is not None
    assert result.loss < 0.7 * steps[0]
    loaded = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(DEVICE)
    documents = PreparedDataset.open(data)
    losses = packing.losses(loaded, packing.alone(documents)[:40])
    assert sum(losses) / len(losses) == pytest.approx(result.loss, rel=0.2)


@pytest.mark.parametrize("scenario", [gpu_runs.an_adapter, gpu_runs.every_weight])
def test_all_is_trained_though_the_check_looks_at_a_part(
    scenario: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not looked at is frozen meanwhile. It is trained afterwards, and was not rounded to 16 bits."""
    monkeypatch.setattr(packing_check, "WATCHED", 1e4)
    monkeypatch.setenv("OSLO_ROOT", str(tmp_path / "root"))  # where no check is remembered
    found = scenario(tmp_path)
    assert found["engine"] == gpu_runs.engine()
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
    assert [name for name, weight in found["weights"].items() if torch.equal(weight, weight.bfloat16().float())] == []
    assert len(found["steps"]) == 8


def prepared(folder: Path, model: Path) -> Path:
    values: dict[str, Any] = {
        "name": "tiny",
        "opensloth": {"data_cache_path": str(folder / "cache"), "fast_model_args": {"model_name": str(model)}},
        "dataset": {"path": str(folder / "train.jsonl")},
    }
    config, problems = run_config.check(values)
    assert config is not None, problems
    return Path(build(config, lambda *_, **__: None).path)


@NEEDS_TWO
@pytest.mark.enable_socket
@pytest.mark.parametrize("scenario", [gpu_runs.an_adapter, gpu_runs.every_weight])
def test_two_gpus_train_as_one_does(scenario: Callable[[Path], Any], tmp_path: Path) -> None:
    """Both hold the same bits; they differ from one GPU's by the order of sums alone."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = scenario(tmp_path / "one")
    first, second = gpu_runs.of_ranks(scenario, tmp_path / "two", 2)
    assert {rank["engine"] for rank in (alone, first, second)} == {gpu_runs.engine()}
    assert first["steps"] == second["steps"]
    assert identical(first["weights"], second["weights"])
    pairs = list(zip(first["steps"], alone["steps"], strict=True))
    assert len(pairs) == 8
    for i, (what, bound) in enumerate((("losses", 1e-3), ("gradient norms", 1e-2))):
        off = max(abs(one[i] / other[i] - 1) for one, other in pairs)
        at_most(f"two GPUs train as one does: {what}", off, bound)
    at_most("two GPUs train as one does: weights", largest_distance(first["weights"], alone["weights"]), 0.05)
