"""Which dtype this machine trains the model fastest in, found by trying."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

TRIAL_TOKENS = 256
ADVANTAGE = 1.1
"""bfloat16 is taken when it is so many times as fast: less is not worth its coarser numbers."""


def choose_dtype(model_folder: Path) -> tuple[torch.dtype, str]:
    """The dtype to train in, and why.

    On a GPU it is bfloat16 wherever the GPU has it. CPUs differ: some compute it twice as fast as float32, some
    only emulate it.
    """
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32, torch.cuda.get_device_name()
    in_float32 = tokens_per_second(model_folder, torch.float32)
    in_bfloat16 = tokens_per_second(model_folder, torch.bfloat16)
    why = f"a trial step ran at {in_float32:,.0f} tokens/s in float32, {in_bfloat16:,.0f} in bfloat16"
    return torch.bfloat16 if in_bfloat16 > ADVANTAGE * in_float32 else torch.float32, why


def tokens_per_second(model_folder: Path, dtype: torch.dtype) -> float:
    """Forward and backward on one row with an adapter, as in training: the second of two steps."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    row = torch.randint(base.config.vocab_size, (1, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    _step(model, row, dtype)
    started = time.monotonic()
    _step(model, row, dtype)
    return TRIAL_TOKENS / (time.monotonic() - started)


def _step(model: Any, row: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=row, labels=row, use_cache=False).loss
    loss.backward()
