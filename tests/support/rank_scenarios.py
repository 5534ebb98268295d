"""What ranks do in the tests of ranks and of resuming: see train_rank.py."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from train_rank import history, make, weights

from opensloth import checkpoint
from opensloth.dist import World
from opensloth.errors import NonFiniteError, StopRequested
from opensloth.trainer import SftTrainer

Rows = list[dict[str, list[int]]]

# --- ranks and uneven targets -------------------------------------------------------------------

STEPS = 5
ONE_A_ROW = {"packed": False, "train_sampling_strategy": "sequential"}
_TRAINED: dict[str, dict[str, Any]] = {
    "adapter, packed": {},
    "adapter, one document a row": ONE_A_ROW,
    "full, packed": {"full": True},
    "full, one document a row": ONE_A_ROW | {"full": True},
}
DEFAULT_EPSILON = {f"{case}, epsilon 1e-8": options for case, options in _TRAINED.items()}
CASES = {case: options | {"adam_epsilon": 1e-6} for case, options in _TRAINED.items()} | DEFAULT_EPSILON
"""AdamW's first update of an element is g / (|g| + epsilon): steep where the gradient g is near epsilon, and g comes
with the rounding of its tensor's largest. So each case is trained with 1e-6 too, where that is seen no more."""


def uneven_rows() -> Rows:
    """29 rows, of which many have no target or one. In order: three steps of eight rows, one of five.

    Step 1: the second of four ranks (rows 2 and 3) has no target. Step 2: the whole step has one target. Step 3: the
    first half has none. Step 4: the third of four ranks has one row, the fourth none.
    """
    rows = tiny.random_rows(29, longest=40, seed=3)
    silent = {2, 3, *range(8, 12), *range(13, 16), *range(16, 20)}
    for number, row in enumerate(rows):
        ids = row["input_ids"]
        if number in silent:
            row["labels"] = [-100] * len(ids)
        elif number in (0, 12, 25):
            row["labels"] = [*([-100] * (len(ids) - 1)), ids[-1]]
    return rows


def five_steps(out: Path) -> dict[str, dict[str, Any]]:
    """Of each case and step: the log, gradients as the optimizer gets them, how far each weight has moved, targets."""
    return {case: _recorded(out / case, **options) for case, options in CASES.items()}


def _recorded(out: Path, error: Callable[[SftTrainer], None] = lambda _: None, **options: Any) -> dict[str, Any]:
    trainer = make(out, uneven_rows(), max_steps=STEPS, **options)
    error(trainer)
    start = weights(trainer)
    gradients: list[dict[str, Tensor]] = []
    changes: list[dict[str, Tensor]] = []

    def before(*_: Any) -> None:
        named = trainer.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def after(*_: Any) -> None:
        changes.append({name: tensor - start[name] for name, tensor in weights(trainer).items()})

    trainer._optimizer.register_step_pre_hook(before)
    trainer._optimizer.register_step_post_hook(after)
    trainer.train()
    return {"history": history(trainer), "gradients": gradients, "changes": changes, "targets": _own_targets(trainer)}


ERRONEOUS = "full, one document a row"


def _counts_of_one_rank(trainer: SftTrainer) -> None:
    """Each rank divides by its own targets, times the ranks."""
    accumulate, steps = trainer.objective.accumulate, iter(_own_targets(trainer))
    begin, counts = trainer.objective.begin_step, [0]

    def begin_step() -> None:
        counts.append(next(steps))
        begin()

    trainer.objective.begin_step = begin_step  # type: ignore[method-assign]
    trainer.objective.accumulate = lambda batch, _: accumulate(  # type: ignore[method-assign]
        batch, counts[-1] * trainer.plan.shape.world
    )


def _clipped_before_the_sum(trainer: SftTrainer) -> None:
    reduce, objective = trainer.objective.reduce, trainer.objective

    def clipped(world: World) -> None:
        objective.clip(1.0)
        reduce(world)

    objective.reduce = clipped  # type: ignore[method-assign]


def _gradients_of_one_rank(trainer: SftTrainer) -> None:
    trainer.objective.reduce = lambda world: None  # type: ignore[method-assign]


ERRORS = {
    "counts of one rank": _counts_of_one_rank,
    "clipped before the sum": _clipped_before_the_sum,
    "gradients of one rank": _gradients_of_one_rank,
}


def with_errors(out: Path) -> dict[str, dict[str, Any]]:
    """As five_steps, of one case, with errors put in."""
    return {name: _recorded(out / name, error, **CASES[ERRONEOUS]) for name, error in ERRORS.items()}


def _own_targets(trainer: SftTrainer) -> list[int]:
    """This rank's targets in each step."""
    micro = [trainer._order.micro_batches(step, trainer._world.rank) for step in range(trainer.plan.total_steps)]
    rows = trainer._train_rows
    return [sum(len(rows.batch(chosen).targets) for chosen in of_step if len(chosen)) for of_step in micro]


FEW = {
    "one row": {"rows": 1, "eval_rows": 1},
    "three rows": {"rows": 3, "eval_rows": 3},
    "nine rows, the last step has one": {"rows": 9, "eval_rows": 2},
}


def too_few_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Of each case: its log with evaluations, and the seconds it took."""
    found = {}
    for case, counts in FEW.items():
        started = time.monotonic()
        trainer = make(
            out / case,
            tiny.random_rows(counts["rows"]),
            eval_rows=tiny.random_rows(counts["eval_rows"], seed=5),
            packed=False,
            max_steps=4,
            eval_strategy="steps",
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train()
        found[case] = {"history": history(trainer), "seconds": time.monotonic() - started}
    return found


# --- not finite ---------------------------------------------------------------------------------

POISON = tiny.VOCABULARY - 1
"""An id whose embedding is infinite in a poisoned model; one row holds it."""
BAD_STEP = 4


def ranks(out: Path) -> dict[str, Any]:
    """All of test_ranks.py."""
    two = os.environ.get("WORLD_SIZE") == "2"
    found = {"steps": five_steps(out / "steps"), "few": too_few_rows(out / "few")}
    return found | ({"spoiled": not_finite(out / "spoiled"), "errors": with_errors(out / "errors")} if two else {})


def not_finite(out: Path) -> dict[str, Any]:
    """A run that saves every step; then runs in which one rank meets a loss or a gradient that is not finite."""
    rows = _rows_without_poison()
    options: dict[str, Any] = {"packed": False, "dropout": 0.1, "max_steps": 7, "train_sampling_strategy": "sequential"}
    first = 8 * (BAD_STEP - 1)
    rows[first + 2]["input_ids"][1] = POISON  # of the second rank
    whole = make(out / "whole", rows, save_strategy="steps", save_steps=1, save_total_limit=10, **options)
    whole.train()
    found: dict[str, Any] = {"whole": (weights(whole), history(whole))}
    found["loss"] = _gives_up(make(out / "loss", rows, spoil=_poisoned, **options))
    bad = make(out / "gradient", rows, **options)
    _one_infinite_gradient(bad)
    found["gradient"] = _gives_up(bad)
    for name in ("loss", "gradient"):
        resumed = make(out / name, rows, **options)
        resumed.train(resume_from_checkpoint=True)
        found[f"{name}, resumed"] = (weights(resumed), history(resumed))
    return found


def _rows_without_poison() -> Rows:
    rows = tiny.random_rows(8 * 8)
    for row in rows:
        for column in ("input_ids", "labels"):
            row[column] = [POISON - 1 if token == POISON else token for token in row[column]]
    return rows


def _poisoned(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.inf


def _one_infinite_gradient(trainer: SftTrainer) -> None:
    """On the last rank, in its first micro-batch of the bad step, while its loss is finite."""
    calls = 0

    def spoiled(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        micro_batches = trainer.plan.shape.accumulation
        bad = calls == (BAD_STEP - 1) * micro_batches + 1 and trainer._world.rank == trainer._world.size - 1
        return torch.full_like(gradient, torch.inf) if bad else gradient

    next(p for name, p in trainer.model.named_parameters() if "lora_B" in name).register_hook(spoiled)


def _gives_up(trainer: SftTrainer) -> tuple[str, str, int]:
    """Message, hint, and the steps that were done."""
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    return caught.value.message, caught.value.hint, trainer.state.global_step


# --- resuming -----------------------------------------------------------------------------------

TOTAL = 7
"""Two epochs of three steps, the last of each short, and the beginning of a third."""
RESUMED: dict[str, dict[str, Any]] = {
    "adapter": {"kind": "llama", "dropout": 0.1},
    "full": {"kind": "gpt2", "full": True, "dropout": 0.1},
    "adapter, cosine, logged every third step": {
        "kind": "llama",
        "dropout": 0.1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 3,
    },
}


def _small(out: Path, case: str, **options: Any) -> SftTrainer:
    """A run with evaluations and checkpoints in between."""
    chosen = {
        "max_steps": TOTAL,
        "global_batch_size": 4,
        "per_device_train_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    return make(out, tiny.random_rows(26), eval_rows=tiny.random_rows(3, seed=5), **(chosen | RESUMED[case] | options))


def _end(trainer: SftTrainer) -> dict[str, Any]:
    moments = {
        f"{number}.{name}": torch.as_tensor(value)
        for number, state in trainer._optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {"history": history(trainer), "weights": weights(trainer), "moments": moments}


def interrupted_everywhere(out: Path) -> dict[str, dict[str, Any]]:
    """Of each case: an uninterrupted run; one stopped after step k and resumed, for every k; one stopped after each."""
    found: dict[str, dict[str, Any]] = {}
    for case in RESUMED:
        folder = out / case
        found[case] = {"whole": uninterrupted(folder / "whole", case)}
        for step in range(1, TOTAL):
            found[case][f"stopped after {step}"] = _in_parts(folder / f"after-{step}", case, [step])
        found[case]["stopped after each"] = _in_parts(folder / "each", case, list(range(1, TOTAL)))
        found[case]["killed in step 6"] = _killed(folder / "killed", case)
    return found


def uninterrupted(folder: Path, case: str) -> dict[str, Any]:
    trainer = _small(folder, case, save_strategy="no", save_steps=None)
    trainer.train()
    return _end(trainer)


def _in_parts(folder: Path, case: str, stops: list[int]) -> dict[str, Any]:
    for step in stops:
        stop_after(folder, case, step)
    return finish(folder, case, stops[-1])


def stop_after(folder: Path, case: str, step: int) -> None:
    """With a new model, as a new process has it, and with random states that are not the old ones."""
    torch.manual_seed(1000 + step)
    trainer = _small(folder, case)
    _terminate_one_rank(trainer, step)
    with pytest.raises(StopRequested, match=f"terminated after step {step} of"):
        trainer.train(resume_from_checkpoint=True)


def finish(folder: Path, case: str, step: int) -> dict[str, Any]:
    """Go on from the checkpoint of `step`, which is to be the newest."""
    trainer = _small(folder, case)
    newest = trainer.newest_checkpoint()
    assert newest is not None
    assert newest.name == f"step-{step:08d}"
    trainer.train(resume_from_checkpoint=True)
    return _end(trainer)


def _terminate_one_rank(trainer: SftTrainer, step: int) -> None:
    """SIGTERM to one rank alone, in the middle of its step."""
    if trainer._world.rank != step % trainer._world.size:
        return
    trainer._optimizer.register_step_post_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if trainer.state.global_step == step - 1 else None
    )


REDUCTIONS = ("one flat buffer", "DDP", "DDP, made anew in the uninterrupted run too")


def reduced_by_each(out: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Of ours and DDP: the weights of an uninterrupted run, and of one stopped after step 3 and resumed."""
    return {reduction: _reduced_by(reduction, out / reduction) for reduction in REDUCTIONS}


def _reduced_by(reduction: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    whole, stopped, resumed = (_one_a_rank(folder / name) for name in ("whole", "parts", "parts"))
    if reduction.startswith("DDP"):
        for trainer in (whole, stopped, resumed):
            _by_ddp(trainer)
    if reduction.endswith("too"):
        whole._optimizer.register_step_post_hook(lambda *_: whole.state.global_step == 2 and _wrap(whole))
    whole.train()
    _terminate_one_rank(stopped, 3)
    with pytest.raises(StopRequested):
        stopped.train()
    resumed.train(resume_from_checkpoint=True)
    return {"whole": weights(whole), "resumed": weights(resumed)}


def _one_a_rank(folder: Path) -> SftTrainer:
    """Six steps in which each of four ranks has one micro-batch, as DDP wants it."""
    options = {"full": True, "packed": False, "global_batch_size": 4, "per_device_train_batch_size": 1, "max_steps": 6}
    return make(folder, tiny.random_rows(16), **options)


def _by_ddp(trainer: SftTrainer) -> None:
    """Gradients are averaged by DDP while they arrive."""
    objective: Any = trainer.objective
    accumulate, size = objective.accumulate, trainer._world.size
    _wrap(trainer)
    objective.accumulate = lambda batch, targets: accumulate(batch, targets / size)
    objective.reduce = lambda world: None


def _wrap(trainer: SftTrainer) -> None:
    objective: Any = trainer.objective
    objective._model = None  # the hooks of an earlier one go before others come
    gc.collect()
    objective._model = torch.nn.parallel.DistributedDataParallel(trainer.model)


def _killed(folder: Path, case: str) -> dict[str, Any]:
    """All ranks vanish in step 6 without saving: it goes on from the checkpoint of step 3."""

    class Killed(Exception):
        pass

    def vanish(*_: Any) -> None:
        if trainer.state.global_step == 5:
            raise Killed

    trainer = _small(folder, case)
    trainer._optimizer.register_step_pre_hook(vanish)
    with pytest.raises(Killed):
        trainer.train()
    return finish(folder, case, 3)


def resumed(out: Path) -> dict[str, Any]:
    """All of test_resume.py but the return to one rank."""
    return {"interrupted": interrupted_everywhere(out / "interrupted"), "taken over": taken_over(out)}


def taken_over(out: Path) -> dict[str, dict[str, Any]]:
    """Of adapter and full, dropout off: an uninterrupted run of this many ranks, and the rest of one of fewer or more.

    Two ranks go on with what one began, four with that of two, and one, run again, with that of four.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    before = out.with_name({1: "of-4", 2: "of-1", 4: "of-2"}[size])
    found: dict[str, dict[str, Any]] = {}
    for case in ("adapter", "full"):
        with _said() as lines:
            whole = _small(out / "taken-over" / case, case, dropout=0.0, log_level="debug")
            whole.train()
        found[case] = {"whole": _end(whole), "whole rows": _rows_said(lines)}
        if (before / "taken-over").exists():
            with _said() as lines:
                resumed = _small(out / "taken-over" / f"{case}-resumed", case, dropout=0.0, log_level="debug")
                resumed.train(resume_from_checkpoint=before / "taken-over" / case / "checkpoints" / "step-00000003")
            found[case] |= {"resumed": _end(resumed), "resumed rows": _rows_said(lines)}
    return found


@contextlib.contextmanager
def _said() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        yield lines


def _rows_said(lines: io.StringIO) -> dict[int, list[int]]:
    """Step -> the rows of this rank, as its log has them."""
    found = re.findall(r"^step (\d+) rows(.*)$", lines.getvalue(), re.MULTILINE)
    return {int(step): [int(row) for row in rows.split()] for step, rows in found}


def together(of_ranks: list[dict[int, list[int]]]) -> dict[int, list[int]]:
    """Step -> its rows over all ranks, in the order of the whole step: micro-batches of one row in turn."""
    steps = of_ranks[0].keys()
    longest = max(len(rows[step]) for rows in of_ranks for step in steps)
    return {
        step: [rows[step][micro] for micro in range(longest) for rows in of_ranks if micro < len(rows[step])]
        for step in steps
    }


def checkpoint_of(run: Path, step: int) -> dict[str, Any]:
    """Every file of a checkpoint as it can be compared: tensors as tensors, the rest as bytes, times left out."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    assert checkpoint.fault_in(folder) is None
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            found[path.name] = repr(_listed(torch.load(path, weights_only=True)))
        elif path.name not in (checkpoint.MANIFEST, "trainer_state.json"):
            found[path.name] = path.read_bytes()
    return found


def _listed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return np.ascontiguousarray(value.numpy()).tobytes()
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
