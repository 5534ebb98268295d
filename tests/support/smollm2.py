"""The quickstart's model and data, for tests of a real model: SmolLM2-135M-Instruct and orders in English."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensloth import run_config
from opensloth.data.build import build
from opensloth.data.prepared import PreparedDataset
from opensloth.model import load_model
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
_ENVIRONMENT = dict(os.environ)
"""As the tests were started: each of them hides the home in which the quickstart keeps its model."""


@functools.cache
def folder() -> Path:
    """The model's folder, downloaded and converted if this machine has not run the quickstart yet."""
    script = "from prepare_model import *; print(prepare(cache_folder()))"
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, cwd=QUICKSTART, env=_ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True)
    return Path(said.stdout.splitlines()[-1])


def load(*, full: bool, bf16: bool = False) -> nn.Module:
    """The model as a run on this machine loads it."""
    model_args = FastModelArgs(
        model_name=str(folder()), load_in_4bit=False, full_finetuning=full, use_gradient_checkpointing=False
    )
    asked = OpenSlothConfig(
        data_cache_path="-", fast_model_args=model_args, lora_args=None if full else LoraArgs(lora_dropout=0.1)
    )
    return load_model(asked, torch.device("cpu"), bf16=bf16)


def documents(scratch: Path, count: int) -> PreparedDataset:
    """The first rows of the quickstart's data, prepared as a run prepares them."""
    script = f"from make_data import *; write_cases(make_cases({count}, 1)[0], Path({str(scratch / 'train.jsonl')!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=QUICKSTART, check=True)
    values: dict[str, Any] = {
        "name": "quickstart",
        "opensloth": {"data_cache_path": str(scratch / "cache"), "fast_model_args": {"model_name": str(folder())}},
        "dataset": {"path": str(scratch / "train.jsonl")},
    }
    config, problems = run_config.check(values)
    assert config is not None, problems
    return PreparedDataset.open(Path(build(config, lambda *_, **__: None).path))
