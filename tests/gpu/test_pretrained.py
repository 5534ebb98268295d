"""A pretrained model on the fast path: SmolLM2's weights and English text.

OSLO_SMOLLM2 names its folder, or a file that tests/support/cut_smollm2.py has written; without it the quickstart's is
taken, and downloaded if it is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import cut_smollm2
import gate
import packing
import pytest
import smollm2
import tiny
import torch
from cards import DEVICE, NEEDS_GPU
from keepings import ALL_KEPT
from measured import at_least, at_most
from transformers import AutoModelForCausalLM

from opensloth.fused.model import FusedModel
from opensloth.model import attach_adapter, base_of
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig
from opensloth.step import Objective

pytestmark = NEEDS_GPU
_GIVEN = os.environ.get("OSLO_SMOLLM2")
CONFIG = OpenSlothConfig(data_cache_path="-", fast_model_args=FastModelArgs(model_name="-"), lora_args=LoraArgs())


def model_and_documents(scratch: Path) -> tuple[Path, list[list[int]]]:
    if _GIVEN and Path(_GIVEN).is_file():
        return scratch, cut_smollm2.restore(Path(_GIVEN), scratch)
    folder = Path(_GIVEN) if _GIVEN else smollm2.folder()
    return folder, cut_smollm2.documents(folder)


@pytest.mark.timeout(600)
def test_every_documents_loss_and_the_gradient(tmp_path: Path) -> None:
    folder, ids = model_and_documents(tmp_path)
    rows = tiny.Documents([{"input_ids": document, "labels": document} for document in ids])
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(DEVICE)
    model = attach_adapter(made, CONFIG)
    objective, count = Objective(model, autocast=None), sum(len(document) - 1 for document in ids)
    expected = [objective.accumulate(batch, count).item() for batch in packing.alone(rows)]
    gradient = gate.gradients(model)

    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    model = attach_adapter(rounded, CONFIG)
    fused, batch = FusedModel(base_of(model), keeping=ALL_KEPT), packing.packed(rows)
    fused.begin_step()
    together = fused.accumulate(batch, 1 / count).item()
    cosine, _ = gate.agreement(gate.gradients(model), gradient)
    at_least("pretrained SmolLM2 on the fast path: cosine of the gradient", cosine, gate.COSINE)
    found = [fused.loss_sum(part).item() for part in packing.by_document(batch)]
    assert together == pytest.approx(sum(found), rel=1e-3)  # 16 bits, and products of another number of rows
    off = packing.largest_error(found, expected)
    at_most("pretrained SmolLM2 on the fast path: a document's loss against float32", off, 5e-3)
    assert sum(expected) / count < 7, "no model of English"
