"""The product's legs: a run folder with a config, and the launcher that pods and `oslo submit --local` start.

python -m training.oslo '{"assets": ..., "leg": ..., "steps": 200, "runs": FOLDER}'
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from opensloth import run_config
from training import ballast, process
from training.assets import Assets
from training.legs import WARM, Leg

POLL_SECONDS = 0.2


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `run` ends its launcher first
    asked = json.loads(sys.argv[1])
    assets = Assets(**{name: Path(path) for name, path in asked["assets"].items()})
    leg = Leg(**asked["leg"])
    with ballast.held(leg.room_gib):
        process.answer(run(assets, Path(asked["runs"]) / f"{time.time_ns()}", leg, asked["steps"]))


def run(assets: Assets, folder: Path, leg: Leg, timed: int) -> dict[str, Any]:
    """One run to its end. Raises RuntimeError with the end of its log."""
    folder.mkdir(parents=True)
    config = config_of(assets, folder, leg, timed)
    (folder / "config.yaml").write_text(run_config.dump(config))
    started = time.time()
    with (folder / "launcher.out").open("wb") as out:
        launcher = subprocess.Popen([sys.executable, "-m", "opensloth.launch", str(folder)], stdout=out, stderr=out)
        try:
            events = _follow(launcher, folder / "events.jsonl")
        finally:
            launcher.terminate()  # nothing to a launcher that has ended; else it ends its ranks, and the GPU is free
            launcher.wait()
    if launcher.returncode:
        log = folder / "attempts" / "1" / "rank-0.log"
        text = (log if log.exists() else folder / "launcher.out").read_text()
        raise RuntimeError(f"exit code {launcher.returncode}: {text[-1000:]}")
    return {**figures(events, leg, started), "engine": next(e["reason"] for e in events if e["event"] == "engine")}


def figures(events: list[dict[str, Any]], leg: Leg, started: float) -> dict[str, Any]:
    """From a run's events. started: seconds since 1970."""
    steps = [event for event in events if event["event"] == "step"]
    found = {
        "first_step_seconds": steps[0]["time"] - started,
        "peak_gib": (steps[-1]["memory"] or 0) / 2**30,
        "loss": steps[-1]["loss"],
    }
    if leg.start:
        return found
    timed = steps[WARM:]
    seconds = timed[-1]["time"] - steps[WARM - 1]["time"]
    return found | {
        "tokens_per_second": sum(event["tokens"] for event in timed) / seconds,
        "target_tokens_per_second": sum(event["target_tokens"] for event in timed) / seconds,
        "mfu": timed[-1]["mfu"],
    }


def _follow(launcher: subprocess.Popen[bytes], file: Path) -> list[dict[str, Any]]:
    """The run's events once it has ended; meanwhile says how far it is."""
    events: list[dict[str, Any]] = []
    while True:
        ended = launcher.poll() is not None
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        for line in lines[len(events) :]:
            events.append(json.loads(line))
            _say(events[-1])
        if ended:
            return events
        time.sleep(POLL_SECONDS)


def _say(event: dict[str, Any]) -> None:
    if event["event"] == "phase":
        process.say(event["phase"])
    elif event["event"] == "step" and process.worth_saying(event["step"]):
        process.say(f"step {event['step']}, {event['tokens_per_second']:,.0f} tokens/s")


def config_of(assets: Assets, folder: Path, leg: Leg, timed: int) -> run_config.RunConfig:
    opensloth: dict[str, Any] = {
        "data_cache_path": str(folder.parent / "cache"),
        "fast_model_args": {
            "model_name": str(assets.model),
            "max_seq_length": leg.row,
            "load_in_4bit": False,
            "full_finetuning": leg.full,
            "use_gradient_checkpointing": {"off": False, "on": True, "auto": "auto"}[leg.recompute],
        },
    }
    if not leg.full:
        opensloth["pretrained_lora"] = str(assets.adapter)
    within: dict[str, Any] = {"save_strategy": "no"}
    if leg.within:
        once = leg.middle(timed)
        within = {"save_steps": once, "eval_strategy": "steps", "eval_steps": once}
    config, problems = run_config.check(
        {
            "name": "bench",
            "opensloth": opensloth,
            "dataset": {"path": str(assets.train), "format": "tokenized", "eval_path": str(assets.evaluation)},
            "training": {
                "per_device_train_batch_size": leg.rows,
                "gradient_accumulation_steps": 1,
                "max_steps": leg.steps(timed),
                "learning_rate": 1e-5,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "optim": "adamw_8bit" if leg.eight_bit else "adamw_torch_fused",
                "max_grad_norm": 1.0,
                "logging_steps": 1,
                "report_to": "tensorboard",
                **within,
            },
        }
    )
    if config is None:
        raise ValueError(f"the benchmark's own config: {problems}")
    return config


if __name__ == "__main__":
    main()
