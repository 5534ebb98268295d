"""The product's legs: a run folder with a config, and the launcher that pods and `oslo submit --local` start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from opensloth import run_config
from training.assets import WARM, Assets


def run(assets: Assets, folder: Path, leg: dict[str, Any]) -> dict[str, Any]:
    """One run to its end; `leg`: rows, steps, full, recompute, row, and `within`: one checkpoint and evaluation."""
    folder.mkdir(parents=True)
    config = config_of(assets, folder, leg)
    (folder / "config.yaml").write_text(run_config.dump(config))
    started = time.time()
    command = [sys.executable, "-m", "opensloth.launch", str(folder)]
    with (folder / "launcher.out").open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=out, check=False, env=dict(os.environ)).returncode
    if code:
        log = folder / "attempts" / "1" / "rank-0.log"
        raise RuntimeError(
            f"exit code {code}: {(log if log.exists() else folder / 'launcher.out').read_text()[-2000:]}"
        )
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    timed = [event for event in steps if event["step"] > WARM]
    seconds = timed[-1]["time"] - steps[WARM - 1]["time"]
    return {
        "tokens_per_second": sum(event["tokens"] for event in timed) / seconds,
        "peak_gib": timed[-1]["memory"] / 2**30,
        "first_step_seconds": steps[0]["time"] - started,
        "mfu": timed[-1]["mfu"],
        "loss": timed[-1]["loss"],
        "engine": next(event["reason"] for event in events if event["event"] == "engine"),
    }


def config_of(assets: Assets, folder: Path, leg: dict[str, Any]) -> run_config.RunConfig:
    full = bool(leg.get("full"))
    opensloth: dict[str, Any] = {
        "engine": leg.get("engine", "auto"),
        "data_cache_path": str(folder.parent / "cache"),
        "fast_model_args": {
            "model_name": str(assets.model),
            "max_seq_length": leg["row"],
            "load_in_4bit": False,
            "full_finetuning": full,
            "use_gradient_checkpointing": leg["recompute"],
        },
    }
    if not full:
        opensloth["pretrained_lora"] = str(assets.adapter)
    half = (leg["steps"] + WARM) // 2
    within = {"save_steps": half, "eval_strategy": "steps", "eval_steps": half} if leg.get("within") else {}
    config, problems = run_config.check(
        {
            "name": "bench",
            "opensloth": opensloth,
            "dataset": {"path": str(assets.train), "format": "tokenized", "eval_path": str(assets.evaluation)},
            "training": {
                "per_device_train_batch_size": leg["rows"],
                "gradient_accumulation_steps": 1,
                "max_steps": leg["steps"] + WARM,
                "learning_rate": 1e-5,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "optim": "adamw_torch_fused",
                "max_grad_norm": 1.0,
                "logging_steps": 1,
                "report_to": "tensorboard",
                **(within or {"save_strategy": "no"}),
            },
        }
    )
    if config is None:
        raise ValueError(f"the benchmark's own config: {problems}")
    return config
