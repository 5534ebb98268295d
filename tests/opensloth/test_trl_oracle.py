"""TRL's SFT on the same rows: losses, rates, gradient norms of every step, and the weights. Half a minute.

TRL's head is a Triton kernel, which TRITON_INTERPRET=1 runs on a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from measured import at_most
from torch import Tensor
from train_rank import history, largest_distance, make, weights

from opensloth.data.pack import best_fit_decreasing
from opensloth.trainer import SftTrainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PEER = Path(__file__).parents[1] / "support" / "trl_peer.py"
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 2,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "adam_epsilon": 1e-5,  # clipped, gradients are a tenth: see rank_scenarios.CASES
    "optim": "adamw_torch",
}
CASES: dict[str, dict[str, Any]] = {
    "full, padded": {"full": True, "packed": False, "lr_scheduler_type": "linear"},
    "full, packed": {"full": True, "packed": True, "lr_scheduler_type": "cosine"},
    "adapter, padded": {"full": False, "packed": False, "lr_scheduler_type": "cosine"},
    "adapter, packed": {"full": False, "packed": True, "lr_scheduler_type": "linear"},
}


def rows() -> list[dict[str, list[int]]]:
    """Uneven, so that a mean of means is wrong; in some the first token is labelled, which predicts nothing."""
    made = tiny.random_rows(51, seed=8)
    for number, row in enumerate(made):
        if number % 5 == 0:
            row["labels"] = [*([-100] * (len(row["labels"]) - 1)), row["input_ids"][-1]]
        elif number % 5 == 1:
            row["labels"] = list(row["input_ids"])
    return made


def packed_rows(documents: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The rows that oslo packs these documents into, as TRL's own packing writes them."""
    plan = best_fit_decreasing(np.array([len(d["input_ids"]) for d in documents], dtype=np.int32), 64)
    made = []
    for number in range(len(plan)):
        chosen = [documents[i] for i in plan.row(number)]
        made.append({column: [i for d in chosen for i in d[column]] for column in ("input_ids", "labels")})
        made[-1]["seq_lengths"] = [len(d["input_ids"]) for d in chosen]
    return made


def ours(folder: Path, case: dict[str, Any]) -> SftTrainer:
    return make(
        folder,
        rows(),
        global_batch_size=None,
        train_sampling_strategy="sequential",
        **(SHARED | case),
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SftTrainer, dict[str, Any]]]:
    """Case -> our trainer when it is done, and TRL's answer."""
    folder = tmp_path_factory.mktemp("trl")
    tiny.save(folder / "model")
    trainers = {name: ours(folder / f"{name}-ours", case) for name, case in CASES.items()}
    trainers["adapter, padded"].model.save_pretrained(str(folder / "adapter"))  # type: ignore[operator]
    tasks = {}
    for name, case in CASES.items():
        own = SHARED | {"lr_scheduler_type": case["lr_scheduler_type"], "padding_free": case["packed"]}
        given = packed_rows(rows()) if case["packed"] else rows()
        tasks[name] = {"rows": given, "adapter": not case["full"], "arguments": own}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    env = os.environ | {"TRITON_INTERPRET": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    with (folder / "said").open("wb") as said:
        found = subprocess.run([sys.executable, str(PEER), str(folder)], env=env, stdout=said, stderr=said)
    assert found.returncode == 0, (folder / "said").read_text()[-3000:]
    for trainer in trainers.values():
        trainer.train()
    return {name: (trainers[name], torch.load(folder / f"{name}.pt", weights_only=False)) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_trl_trains_the_same_rows_alike(answers: dict[str, tuple[SftTrainer, dict[str, Any]]], case: str) -> None:
    """Accumulation with a short last step, two epochs, warm-up, decay, clipping."""
    trainer, theirs = answers[case]
    shape, rows_of_epoch = trainer.plan.shape, trainer.plan.rows
    steps = history(trainer)
    assert len(steps) == len(theirs["logs"]) == trainer.plan.total_steps
    assert rows_of_epoch % shape.rows_per_step, "the last step of an epoch is to be short"
    for key in ("loss", "grad_norm"):
        off = max(abs(a[key] - b[key]) / b[key] for a, b in zip(steps, theirs["logs"], strict=True))
        at_most(f"TRL's SFT on the same rows: {key} of every step", off, 1e-5)
    assert [a["learning_rate"] for a in steps] == pytest.approx([b["learning_rate"] for b in theirs["logs"]])
    assert max(entry["grad_norm"] for entry in steps) > SHARED["max_grad_norm"]
    far = largest_distance(_moved(weights(trainer), case), _moved(theirs["weights"], case))
    at_most("TRL's SFT on the same rows: how far each weight has moved", far, 1e-5)


def _moved(trained: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    """From where both began; of an adapter the weights themselves, because B begins at zero."""
    if "adapter" in case:
        return trained
    start = dict(tiny.make_model().named_parameters())
    return {name: tensor - start[name].detach() for name, tensor in trained.items()}
