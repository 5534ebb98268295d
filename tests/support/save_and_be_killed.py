"""Saves checkpoints of a tiny state until it is killed, TRIALS times: `save_and_be_killed.py FOLDER TRIALS SEED`.

Each time a child goes on from the newest checkpoint, saves one after the other, and is killed at a random moment; then
what is left must be a checkpoint to go on from, no older than the last that `save` had returned for. Prints one JSON
object: the trials, in how many of them something half-written was left, and the last step.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opensloth.checkpoint import Checkpoints, CheckpointState, fault_in, read_state, read_tensors, remove_leftovers
from opensloth.dist import World

WORLD = World(0, 0, 1, torch.device("cpu"))
LONGEST_SECONDS = 0.2
KEEP = 2


def save_from(folder: Path, step: int, report: int) -> None:
    checkpoints = Checkpoints(folder, keep=KEEP, world=WORLD)
    while True:
        step += 1
        value = torch.full((20_000,), float(step))
        checkpoints.save(
            CheckpointState(step=step, plan="", rows_per_step=1, world=1, targets_seen=0),
            lambda aside, value=value: save_file({"weight": value}, aside / "model.safetensors"),
            {"optimizer": value.clone()},
        )
        os.write(report, step.to_bytes(4, "big"))


def newest_step(folder: Path) -> int:
    """Of the checkpoint that a run would go on from; it is read as a run reads it."""
    found = Checkpoints(folder, keep=KEEP, world=WORLD).newest(lambda _: None)
    if found is None:
        return 0
    assert fault_in(found) is None
    step = read_state(found).step
    weight, optimizer = load_file(found / "model.safetensors")["weight"], read_tensors(found, WORLD)["optimizer"]
    assert torch.equal(weight, optimizer), found
    assert set(weight.tolist()) == {float(step)}, found
    return step


def trial(folder: Path, dice: random.Random) -> bool:
    """Whether it left something half-written."""
    before = newest_step(folder)
    begin = dice.choice([before, max(0, before - 1)])  # also as one that was set back: it writes in place of another
    heard, report = os.pipe()
    child = os.fork()
    if child == 0:
        save_from(folder, begin, report)
    os.close(report)
    time.sleep(dice.uniform(0, LONGEST_SECONDS))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "saving failed by itself"
    with os.fdopen(heard, "rb") as stream:
        steps = stream.read()
    returned = int.from_bytes(steps[-4:], "big") if steps else begin
    assert newest_step(folder) >= returned, (newest_step(folder), returned)
    half_written = any(folder.glob(".*"))
    remove_leftovers([folder])
    assert all(path.name.startswith("step-") for path in folder.iterdir())
    return half_written


def main() -> None:
    folder, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder.mkdir()
    dice = random.Random(seed)
    half_written = sum(trial(folder, dice) for _ in range(trials))
    answer = {"trials": trials, "half_written": half_written, "step": newest_step(folder)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
