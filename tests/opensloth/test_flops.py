"""Operations of a step, against those that torch counts while it runs one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from opensloth.data.batch import flat_batch, padded_batch
from opensloth.dist import World
from opensloth.flops import measured_peak, work_of
from opensloth.isolation import isolate_documents
from opensloth.model import attach_adapter
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig
from opensloth.step import Objective, accumulate_gradients

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("adapter", [True, False])
def test_what_is_counted_is_what_torch_counts(adapter: bool) -> None:
    """Documents of one length, all of them targets. Torch counts attention whole, and not where weights are frozen
    in the first layer: the gradient of its input is asked for by nobody.
    """
    model = tiny.make_model("llama")
    if adapter:
        lora = LoraArgs(
            r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
        )
        args = FastModelArgs(model_name="-")
        model = attach_adapter(model, OpenSlothConfig(data_cache_path="-", fast_model_args=args, lora_args=lora))
    isolate_documents(model, 64)
    rows = [{"input_ids": [5] * 64, "labels": [5] * 64} for _ in range(4)]
    batch = flat_batch(tiny.Documents(rows), np.arange(4))
    with FlopCounterMode(display=False) as counter:
        accumulate_gradients(Objective(model, autocast=None), [batch], ALONE)
    attention = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op) or "bmm" in str(op)
    )
    work = work_of(model)
    assert work is not None
    assert work.of(batch) - work.squared * 4 * 64**2 == pytest.approx(counter.get_total_flops() - attention, rel=0.06)
    assert work.squared == 2 * 3 * 2 * 4 * 8  # forward, three times that in all, layers, heads, head size


def test_padding_and_prompts_are_no_work() -> None:
    model, rows = tiny.make_model("llama"), tiny.random_rows(5)
    work = work_of(model)
    assert work is not None
    documents = tiny.Documents(rows)
    flat, padded = flat_batch(documents, np.arange(5)), padded_batch(documents, np.arange(5), pad_id=0)
    assert work.of(flat) == work.of(padded)
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    less = work.of(flat) - work.of(flat_batch(tiny.Documents(silent), np.arange(5)))
    assert less == work.target * len(flat.targets) > 0
    base: Any = model
    read_by_targets = (*base.model.layers[-1].mlp.parameters(), base.lm_head.weight)
    assert work.target == 6 * sum(weight.numel() for weight in read_by_targets)


@pytest.mark.parametrize("kind", ["mixtral", "mamba2"])
def test_of_experts_and_of_running_states_nothing_is_said(kind: str) -> None:
    assert work_of(tiny.make_model(kind)) is None


def test_of_a_cpu_no_speed_is_said() -> None:
    assert measured_peak(torch.device("cpu"), torch.float32) is None
