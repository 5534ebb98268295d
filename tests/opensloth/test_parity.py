"""Packed equals unpacked, and every split of a step equals every other: losses and gradients, float32.

Tolerances are relative L2 norms per tensor; single elements of float32 sums differ by far more than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from opensloth.arithmetic import BatchShape
from opensloth.data.batch import flat_batch, padded_batch
from opensloth.data.order import RowOrder
from opensloth.data.training_data import make_rows
from opensloth.dist import World
from opensloth.model import attach_adapter, isolate_documents, trainable_parameters
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig
from opensloth.step import Objective, accumulate_gradients

ALONE = World(0, 0, 1, torch.device("cpu"))
ATTENDING = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]
BOUND = 1e-5


def with_adapter(kind: str) -> Any:
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = OpenSlothConfig(
        data_cache_path="-", fast_model_args=FastModelArgs(model_name=kind), lora_args=LoraArgs(target_modules=targets)
    )
    model = attach_adapter(tiny.make_model(kind), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model):  # B starts at zero, which would hide A's gradient
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def gradients(model: Any, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss_sum, targets, _ = accumulate_gradients(
        Objective(model, autocast=None), batches, trainable_parameters(model), ALONE
    )
    return loss_sum / targets, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 distance of a tensor that carries any gradient."""
    assert one.keys() == other.keys()
    scale = max(float(g.norm()) for g in other.values())
    return max(float((one[name] - other[name]).norm() / max(float(other[name].norm()), 1e-4 * scale)) for name in other)


@pytest.fixture
def documents() -> tiny.Documents:
    return tiny.Documents(tiny.random_rows(12, longest=30))


@pytest.fixture(params=["adapter", "full"])
def trained(request: pytest.FixtureRequest) -> Iterator[Any]:
    return lambda kind: with_adapter(kind) if request.param == "adapter" else tiny.make_model(kind)


@pytest.mark.parametrize("kind", ATTENDING)
def test_packed_documents_train_as_single_ones_do(kind: str, trained: Any, documents: tiny.Documents) -> None:
    model = trained(kind).eval()
    alone = [padded_batch(documents, np.array([i]), pad_id=0) for i in range(len(documents))]
    loss, expected = gradients(model, alone)
    assert isolate_documents(model) is None
    packed_loss, packed = gradients(model, [flat_batch(documents, np.arange(len(documents)))])
    assert packed_loss == pytest.approx(loss, rel=BOUND)
    assert distance(packed, expected) < BOUND


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_document_does_not_see_its_neighbour(kind: str) -> None:
    model = tiny.make_model(kind).eval()
    assert isolate_documents(model) is None
    rows = tiny.random_rows(3, seed=1)
    with torch.no_grad():
        before = model(**flat_batch(tiny.Documents(rows), np.arange(3)).inputs, use_cache=False).logits
        rows[0]["input_ids"] = rows[0]["input_ids"][::-1]
        after = model(**flat_batch(tiny.Documents(rows), np.arange(3)).inputs, use_cache=False).logits
    first = len(rows[0]["input_ids"])
    assert torch.equal(before[:, first:], after[:, first:])
    assert not torch.equal(before[:, :first], after[:, :first])


@pytest.mark.parametrize("mutation", ["boundaries merged", "boundaries shifted", "labels cross boundaries"])
def test_a_leak_is_seen_by_these_tests(mutation: str, documents: tiny.Documents) -> None:
    model = with_adapter("llama").eval()
    alone = [padded_batch(documents, np.array([i]), pad_id=0) for i in range(len(documents))]
    _, expected = gradients(model, alone)
    isolate_documents(model)
    batch = flat_batch(documents, np.arange(len(documents)))
    offsets = batch.inputs["document_offsets"]
    if mutation == "boundaries merged":
        batch.inputs["document_offsets"] = offsets[[0, -1]]
        batch.inputs["longest_document"] = int(offsets[-1])
    elif mutation == "boundaries shifted":
        batch.inputs["document_offsets"] = torch.cat((offsets[:1], offsets[1:-1] + 1, offsets[-1:]))
    else:
        batch = type(batch)(
            batch.inputs,
            torch.cat((batch.predictors, offsets[1:-1] - 1)).long(),
            torch.cat((batch.targets, batch.inputs["input_ids"][0, offsets[1:-1].long()])),
            batch.tokens,
        )
    _, leaked = gradients(model, [batch])
    assert distance(leaked, expected) > 100 * BOUND


@pytest.mark.parametrize("kind", ["mamba2"])
def test_a_model_with_running_state_is_not_packed(kind: str) -> None:
    assert "state runs on" in (isolate_documents(tiny.make_model(kind)) or "")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("split", [(2, 4), (8, 1)])
def test_accumulation_changes_nothing(split: tuple[int, int], packed: bool) -> None:
    """All steps of an epoch, the last and short one included."""
    documents = tiny.Documents(tiny.random_rows(61, longest=30))
    model = with_adapter("llama")
    if packed:
        isolate_documents(model)
    rows = make_rows(documents, 64, packed=packed, pad_id=0)

    def steps(per_device: int, accumulation: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
        order = RowOrder(len(rows), BatchShape(per_device, accumulation, 1), seed=0)
        assert len(order.step_rows(order.steps_per_epoch - 1)) < 8
        micro = [order.micro_batches(step, 0) for step in range(order.steps_per_epoch)]
        return [gradients(model, [rows.batch(r) for r in of_step if len(r)]) for of_step in micro]

    for (loss, found), (reference, expected) in zip(steps(*split), steps(1, 8), strict=True):
        assert loss == pytest.approx(reference, rel=1e-6)
        assert distance(found, expected) < BOUND


def test_a_batch_without_targets_adds_nothing() -> None:
    rows = tiny.random_rows(2)
    silent = [{"input_ids": rows[0]["input_ids"], "labels": [-100] * len(rows[0]["labels"])}]
    model = with_adapter("llama").eval()
    talking = padded_batch(tiny.Documents(rows), np.array([1]), 0)
    loss, expected = gradients(model, [talking])
    with_silent, found = gradients(model, [padded_batch(tiny.Documents(silent), np.array([0]), 0), talking])
    assert with_silent == loss
    assert distance(found, expected) == 0
