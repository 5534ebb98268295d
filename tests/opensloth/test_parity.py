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
from transformers.modeling_layers import GradientCheckpointingLayer

from opensloth.arithmetic import BatchShape
from opensloth.data.batch import flat_batch, padded_batch
from opensloth.data.order import RowOrder
from opensloth.data.training_data import make_rows
from opensloth.isolation import isolate_documents
from opensloth.model import recompute_activations
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.trainer_factory import create_sft_trainer

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


# --- activations computed again in the backward pass ----------------------------------------------------


def counted(model: torch.nn.Module) -> list[int]:
    """Grows by one whenever the MLP of a decoder layer is computed."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 2
    calls: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def with_dropout(kind: str, trained: str) -> Any:
    """In training mode, dropout of 0.1 wherever the model or its adapter has one; packed."""
    model = packing.adapted(kind, dropout=0.1) if trained == "adapter" else tiny.make_model(kind)
    tiny.set_dropout(model, 0.1)
    assert isolate_documents(model, LONGEST) is None
    return model.train()


@pytest.mark.parametrize("trained", ["adapter", "full"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
def test_recomputed_activations_are_those_that_were_not_kept(kind: str, trained: str) -> None:
    """Two packed micro-batches with dropout on: the same numbers are drawn again."""
    batches = [packing.packed(packing.documents(seed=seed)) for seed in (0, 1)]

    def step(seed: int, *, recompute: bool) -> tuple[float, dict[str, torch.Tensor], int]:
        model = with_dropout(kind, trained)
        recompute_activations(model, wanted=recompute)
        calls = counted(model)
        torch.manual_seed(seed)
        return *gradients(model, batches), len(calls)

    kept_loss, kept, kept_calls = step(0, recompute=False)
    loss, found, calls = step(0, recompute=True)
    assert (kept_calls, calls) == (4, 8), "two layers, two batches"
    at_most("activations recomputed, dropout on: loss", abs(loss - kept_loss), 0)
    at_most("activations recomputed, dropout on: gradient of each tensor", distance(found, kept), 0)
    assert abs(step(1, recompute=False)[0] - kept_loss) > 1e-3, "dropout is on"


def test_the_config_says_whether_activations_are_recomputed(tmp_path: Path) -> None:
    """Two steps of a whole run each: the same weights, and every layer is computed twice for a batch."""

    def run(recompute: bool) -> tuple[dict[str, torch.Tensor], int]:
        trainer = create_sft_trainer(
            tiny.make_model("llama"),
            tiny.make_tokenizer(),
            tiny.random_rows(20),
            OpenSlothConfig(
                data_cache_path="-",
                fast_model_args=FastModelArgs(
                    model_name="tiny", max_seq_length=64, use_gradient_checkpointing=recompute
                ),
                lora_args=LoraArgs(lora_dropout=0.1),
            ),
            TrainingArguments(
                output_dir=str(tmp_path / str(recompute)),
                max_steps=2,
                optim="adamw_torch",
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
        )
        calls = counted(trainer.model)
        trainer.train()
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}, len(calls)

    (kept, kept_calls), (found, calls) = run(False), run(True)
    assert calls == 2 * kept_calls > 0
    at_most("activations recomputed, two steps of a run: weights", distance(found, kept), 0)
