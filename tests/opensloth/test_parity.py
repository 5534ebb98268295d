"""Packed equals unpacked, and every split of a step equals every other: losses and gradients, float32.

Tolerances are relative L2 norms per tensor; single elements of float32 sums differ by far more than that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packing
import pytest
import smollm2
import tiny
import torch
from measured import at_most
from packing import LONGEST, distance, gradients, largest_error, losses

from opensloth.arithmetic import BatchShape
from opensloth.data.batch import flat_batch, padded_batch
from opensloth.data.order import RowOrder
from opensloth.data.training_data import make_rows
from opensloth.isolation import isolate_documents

ATTENDING = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "mixtral", "gpt2", "llama-yarn"]
BOUND = 1e-5


def make(kind: str, trained: str) -> Any:
    return packing.adapted(kind) if trained == "adapter" else tiny.make_model(kind)


def check_parity(model: Any, rows: Any, whose: str, longest: int = LONGEST) -> None:
    """`model` trains on `rows` packed into one line as on each of them alone."""
    singles = packing.alone(rows)
    _, expected = gradients(model, singles)
    expected_losses = losses(model, singles)
    assert isolate_documents(model, longest) is None
    batch = packing.packed(rows)
    _, found = gradients(model, [batch])
    at_most(
        f"packed as alone, {whose}: loss of each document",
        largest_error(losses(model, [batch]), expected_losses),
        BOUND,
    )
    at_most(f"packed as alone, {whose}: gradient of each tensor", distance(found, expected), BOUND)


@pytest.mark.parametrize("trained", ["adapter", "full"])
@pytest.mark.parametrize("kind", ATTENDING)
def test_packed_documents_train_as_single_ones_do(kind: str, trained: str) -> None:
    check_parity(make(kind, trained).eval(), packing.documents(), f"random weights, {trained}")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("trained", ["adapter", "full"])
def test_packed_documents_train_a_real_model_as_single_ones_do(trained: str, tmp_path: Path) -> None:
    """SmolLM2-135M on the quickstart's documents. Half a minute each."""
    model, rows = smollm2.load(full=trained == "full"), smollm2.documents(tmp_path, 4)
    packing.as_if_trained(model)
    check_parity(model.eval(), rows, f"SmolLM2-135M, {trained}", int(max(rows.lengths)))


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_document_does_not_see_its_neighbour(kind: str) -> None:
    model = tiny.make_model(kind).eval()
    assert isolate_documents(model, 40) is None
    rows = tiny.random_rows(3, seed=1)
    with torch.no_grad():
        before = model(**flat_batch(tiny.Documents(rows), np.arange(3)).inputs, use_cache=False).logits
        rows[0]["input_ids"] = rows[0]["input_ids"][::-1]
        after = model(**flat_batch(tiny.Documents(rows), np.arange(3)).inputs, use_cache=False).logits
    first = len(rows[0]["input_ids"])
    moved = float((before[:, first:] - after[:, first:]).abs().max())
    at_most("another document's logits move when one is changed", moved, 0)
    assert not torch.equal(before[:, :first], after[:, :first])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("split", [(2, 4), (8, 1)])
def test_accumulation_changes_nothing(split: tuple[int, int], packed: bool) -> None:
    """All steps of an epoch, the last and short one included."""
    documents = tiny.Documents(tiny.random_rows(61, longest=30))
    model = packing.adapted("llama")
    if packed:
        isolate_documents(model, LONGEST)
    rows = make_rows(documents, 64, packed=packed, pad_id=0)

    def steps(per_device: int, accumulation: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
        order = RowOrder(len(rows), BatchShape(per_device, accumulation, 1), seed=0)
        assert len(order.step_rows(order.steps_per_epoch - 1)) < 8
        micro = [order.micro_batches(step, 0) for step in range(order.steps_per_epoch)]
        return [gradients(model, [rows.batch(r) for r in of_step if len(r)]) for of_step in micro]

    for (loss, found), (reference, expected) in zip(steps(*split), steps(1, 8), strict=True):
        at_most("accumulation 2x4 and 8x1 as 1x8: loss", abs(loss - reference) / reference, 1e-6)
        at_most("accumulation 2x4 and 8x1 as 1x8: gradient of each tensor", distance(found, expected), BOUND)


def test_a_batch_without_targets_adds_nothing() -> None:
    rows = tiny.random_rows(2)
    silent = [{"input_ids": rows[0]["input_ids"], "labels": [-100] * len(rows[0]["labels"])}]
    model = packing.adapted("llama").eval()
    talking = padded_batch(tiny.Documents(rows), np.array([1]), 0)
    loss, expected = gradients(model, [talking])
    with_silent, found = gradients(model, [padded_batch(tiny.Documents(silent), np.array([0]), 0), talking])
    assert with_silent == loss
    assert distance(found, expected) == 0
