"""Trainings on GPUs: as runs of the launcher, and as scenarios that several ranks run, each in a fresh process.

`train_rank` forks its ranks, which a process that has asked for a CUDA device must not do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launched
import shapes
import tiny
import torch

from opensloth import hardware, run_config
from opensloth.checkpoint import OPTIMIZER
from opensloth.dist import join_world, leave_world
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.run_config import from_python
from opensloth.trainer_factory import assemble, place_in, python_events

ROW = 1024
"""Tokens of a packed row."""
STEPS = 30
LENGTHS = (150, 31, 700, 64, 410, 90, 222, 5, 1000, 130) * 6
"""Of documents in tokens."""


def engine() -> Any:
    """The fast path; on a machine without a GPU, where these tests are only tried, plain torch."""
    return "fused" if torch.cuda.is_available() else "torch"


class Run(launched.Run):
    """A run folder whose model trains on the fast path, rows of several documents."""

    def __init__(self, folder: Path, model: Path, *, optim: str = "adamw_torch") -> None:
        folder.mkdir()
        training = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 10}
        super().__init__(folder, model, rows=400, **training, optim=optim, report_to="none")
        config = run_config.load(self.config_text)
        config.opensloth.engine = engine()
        config.opensloth.fast_model_args.max_seq_length = ROW
        config.opensloth.fast_model_args.load_in_4bit = False
        (self.folder / "config.yaml").write_text(run_config.dump(config))

    def figures(self) -> dict[int, set[tuple[float, float]]]:
        """Step -> what all attempts that made it have said: loss and gradient norm."""
        found: dict[int, set[tuple[float, float]]] = {}
        for event in self.events():
            if event["event"] == "step":
                found.setdefault(event["step"], set()).add((event["loss"], event["grad_norm"]))
        return found

    def kinds_of_moments(self) -> set[torch.dtype]:
        """Of what the newest checkpoint holds of the optimizer; a run that has ended holds nothing."""
        newest = max((self.folder / "checkpoints").glob("step-*"))
        saved = torch.load(newest / OPTIMIZER, map_location="cpu", weights_only=True)
        return set(_kinds(saved["optimizer"]["state"]))


def _kinds(value: Any) -> Iterator[torch.dtype]:
    """Of all tensors, however deep: bitsandbytes puts its own one level deeper than others."""
    if isinstance(value, torch.Tensor):
        yield value.dtype
    elif isinstance(value, dict):
        for item in value.values():
            yield from _kinds(item)


def an_adapter(out: Path) -> dict[str, Any]:
    return _trained(out, shapes.ADAPTER)


def every_weight(out: Path) -> dict[str, Any]:
    return _trained(out, shapes.WHOLE)


def _trained(out: Path, trained: str) -> dict[str, Any]:
    """A few steps of four rows, however many ranks share them: losses, gradient norms, and this rank's weights."""
    whole = trained == shapes.WHOLE
    arguments = TrainingArguments(
        output_dir=str(out),
        global_batch_size=4,
        per_device_train_batch_size=1,
        optim="adamw_torch",
        learning_rate=1e-4,
        warmup_steps=0,
        max_steps=8,
        report_to="none",
        save_strategy="no",
        bf16=True,
        ddp_timeout=60,
    )
    asked = OpenSlothConfig(
        data_cache_path="-",
        engine=engine(),
        fast_model_args=FastModelArgs(
            model_name="qwen2", max_seq_length=ROW, full_finetuning=whole, load_in_4bit=False,
            use_gradient_checkpointing=False,
        ),
        lora_args=None if whole else LoraArgs(),
    )  # fmt: skip
    config, _ = hardware.bring_in_line(
        from_python(asked, arguments, "sft"), hardware.detect(arguments), model_is_loaded=True
    )
    world = join_world(cuda=torch.cuda.is_available(), timeout_seconds=arguments.ddp_timeout)
    model, place = shapes.made("qwen2", trained, world.device, out), place_in(out)
    trainer = assemble(
        model,
        tiny.make_tokenizer(),
        (shapes.documents(LENGTHS), None),
        config,
        world=world,
        place=place,
        events=python_events(place, world),
    )
    trainer.train()
    steps = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return {"engine": trainer.engine, "steps": steps, "weights": weights}


def of_ranks(scenario: Callable[[Path], Any], out: Path, world: int) -> list[Any]:
    """What each rank returned of `an_adapter` or `every_weight`, all of them with one empty folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(world), __file__, scenario.__name__, str(out)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]


def main() -> None:
    scenario = {"an_adapter": an_adapter, "every_weight": every_weight}[sys.argv[1]]
    out = Path(sys.argv[2])
    torch.save(scenario(out), out / f"rank-{os.environ['RANK']}.pt")
    leave_world()


if __name__ == "__main__":
    main()
