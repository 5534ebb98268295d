"""What a training says of its progress: the watchdog must hear of every micro-batch, and of what has its own length."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.pulse import Kind, Pulse
from opensloth.trainer_factory import create_sft_trainer


def test_every_step_and_every_batch_is_a_sign_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str]] = []
    monkeypatch.setattr(Pulse, "beat", lambda pulse: heard.append((pulse._kind, pulse._doing)))
    create_sft_trainer(
        tiny.make_model(),
        tiny.make_tokenizer(),
        tiny.random_rows(12),
        OpenSlothConfig(
            data_cache_path="-",
            fast_model_args=FastModelArgs(model_name="tiny", max_seq_length=64),
            lora_args=LoraArgs(),
        ),
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            save_steps=2,
            optim="adamw_torch",
            report_to="none",
        ),
    ).train()
    steps = [said for said in heard if said != (Kind.OTHER, "the start")]  # there packing may be checked
    assert steps == [
        *[(Kind.FIRST_STEP, "step 1")] * 3,
        *[(Kind.STEP, "step 2")] * 3,
        (Kind.OTHER, "the checkpoint of step 2"),
        *[(Kind.STEP, "step 3")] * 3,
    ]
