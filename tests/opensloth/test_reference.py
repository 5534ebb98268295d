"""The trainer against a plain loop of forty lines: torch, transformers' model, and of oslo only which row is which."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from measured import at_most
from torch import Tensor
from train_rank import distance, history, largest_distance, make

from opensloth.data import order
from opensloth.trainer import SftTrainer

DOCUMENTS = tiny.random_rows(52, longest=30, seed=4)
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "adam_epsilon": 1e-5,  # clipped, gradients are a tenth: see rank_scenarios.CASES
    "num_train_epochs": 2,
    "seed": 7,
}
CASES: dict[str, dict[str, Any]] = {
    "linear, clipped": {"lr_scheduler_type": "linear", "max_grad_norm": 0.5},
    "cosine, decay, clipped": {"lr_scheduler_type": "cosine", "weight_decay": 0.5, "max_grad_norm": 0.5},
    "constant with warm-up, decay": {"lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.5},
}


def reference(rows: list[list[int]], rows_per_step: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each step: loss, rate, gradient norm before clipping, and the weights after it. rows: documents of each."""
    model, steps = tiny.make_model(), []
    parameters = dict(model.named_parameters())
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": options["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=options["adam_epsilon"])
    total, warm = options["num_train_epochs"] * math.ceil(len(rows) / rows_per_step), options["warmup_steps"]
    for epoch in range(options["num_train_epochs"]):
        drawn = np.random.default_rng((options["seed"], epoch)).permutation(len(rows))
        for begin in range(0, len(rows), rows_per_step):
            losses, targets = [], 0
            for document in (d for row in drawn[begin : begin + rows_per_step] for d in rows[row]):
                ids, labels = (torch.tensor(DOCUMENTS[document][name]) for name in ("input_ids", "labels"))
                logits = model(input_ids=ids[None]).logits[0, :-1]
                losses.append(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
                targets += int((labels[1:] != -100).sum())
            loss = torch.stack(losses).sum() / targets
            loss.backward()
            norm = float(torch.cat([p.grad.flatten() for p in parameters.values()]).norm())
            if options["max_grad_norm"]:
                for p in parameters.values():
                    p.grad *= min(1.0, options["max_grad_norm"] / norm)
            done = len(steps)
            past = (done - warm) / (total - warm)
            fall = {"linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2, "constant_with_warmup": 1.0}
            rate = options["learning_rate"] * (done / warm if done < warm else fall[options["lr_scheduler_type"]])
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            weights = {name: p.detach().clone() for name, p in parameters.items()}
            steps.append({"loss": loss.item(), "learning_rate": rate, "grad_norm": norm, "weights": weights})
    return steps


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_a_plain_loop(tmp_path: Path, case: str, packed: bool) -> None:
    """Accumulation, two epochs, a short last step; packed and one document a row."""
    options = OPTIONS | CASES[case]
    trainer = make(tmp_path, DOCUMENTS, full=True, packed=packed, **options)
    off = _distances(trainer, options)
    for key, bound in (("loss", 1e-6), ("grad_norm", 1e-5), ("learning_rate", 1e-12)):
        at_most(f"a plain loop of forty lines, every step: {key}", off[key], bound)
    at_most("a plain loop of forty lines, every step: how far each weight has moved", off["weights"], 1e-5)
    assert (trainer.plan.shape.accumulation, trainer.plan.rows % trainer.plan.shape.rows_per_step > 0) == (4, True)
    if options["max_grad_norm"]:
        norms = [entry["grad_norm"] for entry in history(trainer)]
        assert min(norms) > options["max_grad_norm"], "clipping is to be active"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_every_split_of_a_step_trains_alike(tmp_path: Path, full: bool, packed: bool) -> None:
    """1 x 8, 2 x 4 and 8 x 1 (rows x accumulation), two epochs with a short last step each."""
    runs = []
    for rows in (1, 2, 8):
        options = OPTIONS | CASES["cosine, decay, clipped"] | {"per_device_train_batch_size": rows}
        trainer = make(tmp_path / str(rows), DOCUMENTS, full=full, packed=packed, **options)
        assert trainer.plan.shape.accumulation * rows == 8
        assert trainer.plan.rows % 8
        start = _weights(trainer)
        trainer.train()
        moved = {name: tensor - start[name] for name, tensor in _weights(trainer).items()}
        runs.append((history(trainer), {name: tensor for name, tensor in moved.items() if tensor.any()}))
    (first, expected), *others = runs
    for logged, moved in others:
        off = max(_off(a["loss"], b["loss"]) for a, b in zip(logged, first, strict=True))
        at_most("1 x 8, 2 x 4 and 8 x 1, two epochs: loss of every step", off, 1e-6)
        far = largest_distance(moved, expected)
        at_most("1 x 8, 2 x 4 and 8 x 1, two epochs: how far each weight has moved", far, 1e-5)


def _mean_of_means(trainer: SftTrainer, _: pytest.MonkeyPatch) -> None:
    accumulate, shape = trainer.objective.accumulate, trainer.plan.shape
    trainer.objective.accumulate = lambda batch, _: accumulate(  # type: ignore[method-assign]
        batch, len(batch.targets) * shape.accumulation
    )


def _clipped_before_the_sum(trainer: SftTrainer, _: pytest.MonkeyPatch) -> None:
    accumulate, objective = trainer.objective.accumulate, trainer.objective

    def clipped(*arguments: Any) -> Tensor:
        loss = accumulate(*arguments)
        objective.clip(0.5)
        return loss

    objective.accumulate = clipped  # type: ignore[method-assign]


def _decay_of_everything(trainer: SftTrainer, _: pytest.MonkeyPatch) -> None:
    for group in trainer._optimizer.param_groups:
        group["weight_decay"] = 0.5


def _the_schedule_a_step_ahead(trainer: SftTrainer, _: pytest.MonkeyPatch) -> None:
    trainer._scheduler.step()


def _one_order_for_all_epochs(_: SftTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = order.epoch_order
    monkeypatch.setattr(order, "epoch_order", lambda rows, seed, _, shuffle: draw(rows, seed, 0, shuffle=shuffle))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "error",
    [
        _mean_of_means,
        _clipped_before_the_sum,
        _decay_of_everything,
        _the_schedule_a_step_ahead,
        _one_order_for_all_epochs,
    ],
)
def test_an_error_of_a_step_is_seen_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[SftTrainer, pytest.MonkeyPatch], None]
) -> None:
    options = OPTIONS | CASES["cosine, decay, clipped"]
    trainer = make(tmp_path, DOCUMENTS, full=True, packed=False, **options)
    error(trainer, monkeypatch)
    assert _distances(trainer, options)["weights"] > 1e-3


def _distances(trainer: SftTrainer, options: dict[str, Any]) -> dict[str, float]:
    """The largest of all steps, of a training and the plain loop."""
    start = _weights(trainer)
    weights: list[dict[str, Tensor]] = []
    trainer._optimizer.register_step_post_hook(lambda *_: weights.append(_weights(trainer)))
    trainer.train()
    rows = trainer._train_rows
    documents = [rows.members[rows.plan.row(number)].tolist() for number in range(len(rows))]
    expected, found = reference(documents, trainer.plan.shape.rows_per_step, options), history(trainer)
    assert len(found) == len(expected) == len(weights) == trainer.plan.total_steps
    off = {
        key: max(_off(a[key], b[key]) for a, b in zip(found, expected, strict=True))
        for key in ("loss", "grad_norm", "learning_rate")
    }
    off["weights"] = 0.0
    for mine, step in zip(weights, expected, strict=True):
        moved, should = ({name: tensor - start[name] for name, tensor in w.items()} for w in (mine, step["weights"]))
        off["weights"] = max(off["weights"], largest_distance(moved, should))
    return off


def _weights(trainer: SftTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def _off(found: float, expected: float) -> float:
    return distance(torch.tensor(found), torch.tensor(expected))
