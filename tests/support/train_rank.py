"""Trainings on several ranks, as real processes that meet over gloo.

A scenario (`rank_scenarios.py`) runs many small trainings in one process group, because starting torch takes longer
than they do. It gets a folder that all ranks share and returns what its tests compare. `of_ranks` starts the ranks and
collects that, by way of `train_rank.py SCENARIO OUT RANKS...`, which forks them.
"""

from __future__ import annotations

import importlib
import math
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from opensloth import hardware
from opensloth.dist import join_world, leave_world
from opensloth.model import attach_adapter
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.run_config import from_python
from opensloth.trainer import SftTrainer
from opensloth.trainer_factory import assemble, place_in, python_events

DEFAULTS: dict[str, Any] = {
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "ddp_timeout": 30,  # a rank that waits in vain says so, and the test does not wait for its own limit
}
_LORA_TARGETS = {"gpt2": ["c_attn", "c_fc"]}


def make(
    out: Path,
    rows: list[dict[str, list[int]]],
    *,
    eval_rows: list[dict[str, list[int]]] | None = None,
    kind: str = "llama",
    full: bool = False,
    packed: bool = True,
    dropout: float = 0.0,
    log_level: str = "info",
    load: Callable[[str], Any] = tiny.make_model,
    spoil: Callable[[Any], None] = lambda model: None,
    **training: Any,
) -> SftTrainer:
    """A trainer on `rows`; rows without any target are taken as they are.

    load: makes the base model of this kind. spoil: is given it.
    """
    arguments = TrainingArguments(output_dir=str(out), **(DEFAULTS | training))
    asked = OpenSlothConfig(
        data_cache_path="-",
        sequence_packing=packed,
        log_level=log_level,  # type: ignore[arg-type]
        fast_model_args=FastModelArgs(model_name=kind, max_seq_length=64, full_finetuning=full),
        lora_args=None
        if full
        else LoraArgs(lora_dropout=dropout, target_modules=_LORA_TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])),
    )
    config, _ = hardware.bring_in_line(
        from_python(asked, arguments, "sft"), hardware.detect(arguments), model_is_loaded=True
    )
    world = join_world(cuda=False, timeout_seconds=arguments.ddp_timeout)
    model = load(kind)
    tiny.set_dropout(model, dropout)
    spoil(model)
    model.config.use_cache = False
    place = place_in(out)
    return assemble(
        model if full else attach_adapter(model, config.opensloth),
        tiny.make_tokenizer(),
        (tiny.Documents(rows), tiny.Documents(eval_rows) if eval_rows is not None else None),
        config,
        world=world,
        place=place,
        events=python_events(place, world),
    )


def weights(trainer: SftTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


SAID = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_targets")


def history(trainer: SftTrainer) -> list[dict[str, float]]:
    """What was logged, without what depends on the clock."""
    return [{key: entry[key] for key in SAID if key in entry} for entry in trainer.state.log_history]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; infinite when something is found where nothing is expected."""
    difference, size = float((found.double() - expected.double()).norm()), float(expected.double().norm())
    if not difference:
        return 0.0
    return difference / size if size else math.inf


def largest_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(distance(found[name], expected[name]) for name in expected)


def identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def of_ranks(
    scenario: Callable[[Path], Any], out: Path, worlds: Sequence[int], *, seconds: float
) -> dict[int, list[Any]]:
    """Ranks -> what each of them returned of a scenario in folder `of-<ranks>`; one rank is this process.

    seconds: the limit for all of those that are several.
    """
    for world in worlds:
        (out / f"of-{world}").mkdir(parents=True, exist_ok=True)
    found = {world: [scenario(out / f"of-{world}")] for world in worlds if world == 1}
    several = [world for world in worlds if world > 1]
    if several:
        name = f"{scenario.__module__.rpartition('.')[2]}.{scenario.__name__}"
        command = [sys.executable, __file__, name, str(out), *map(str, several)]
        try:
            subprocess.run(command, check=True, timeout=seconds, stdin=subprocess.DEVNULL)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(out.glob("of-*/rank-*.log")))
            raise AssertionError(f"{error}\n{said}") from error
    for world in several:
        saved = [out / f"of-{world}" / f"rank-{rank}.pt" for rank in range(world)]
        found[world] = [torch.load(path, weights_only=False) for path in saved]
    return found


def _rank(name: str, out: Path, rank: int, world: int, port: int) -> None:
    """A rank's whole life, in a process of its own."""
    log = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    module, _, function = name.rpartition(".")
    torch.save(getattr(sys.modules[module], function)(out), out / f"rank-{rank}.pt")
    leave_world()


def _fork(name: str, out: Path, world: int) -> bool:
    """Whether all ranks came to their end; torch was imported once for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            code = 1
            try:
                _rank(name, out, rank, world, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return all([os.waitpid(child, 0)[1] == 0 for child in children])


def main() -> int:
    name, out = sys.argv[1], Path(sys.argv[2])
    importlib.import_module(name.rpartition(".")[0])
    return 0 if all(_fork(name, out / f"of-{world}", int(world)) for world in sys.argv[3:]) else 1


if __name__ == "__main__":
    sys.exit(main())
