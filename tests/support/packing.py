"""Documents packed and alone: losses, gradients, and what is done to a packed batch to make it wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor, nn

from opensloth.data.batch import Batch, Documents, flat_batch, padded_batch
from opensloth.dist import World
from opensloth.model import attach_adapter
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig
from opensloth.step import Objective, accumulate_gradients

ALONE = World(0, 0, 1, torch.device("cpu"))
LONGEST = 30
"""Tokens of the longest document in these tests: longer than the tiny models' sliding windows."""
_TARGETS = {"gpt2": ["c_attn", "c_fc"], "mixtral": ["q_proj", "v_proj"]}


def documents(count: int = 8, *, longest: int = LONGEST, seed: int = 0) -> tiny.Documents:
    """Every other one is trained from its very first token on, so that boundaries have targets."""
    rows = tiny.random_rows(count, longest=longest, seed=seed)
    for row in rows[::2]:
        row["labels"] = list(row["input_ids"])
    return tiny.Documents(rows)


def adapted(kind: str, *, fresh: bool = False, scale: float = 0.2, dropout: float = 0.0) -> Any:
    """A tiny model with an adapter, `fresh` or as if trained. dropout: the adapter's."""
    targets = _TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])
    lora = LoraArgs(target_modules=targets, lora_dropout=dropout)
    asked = OpenSlothConfig(data_cache_path="-", fast_model_args=FastModelArgs(model_name=kind), lora_args=lora)
    model = attach_adapter(tiny.make_model(kind, scale=scale), asked)
    return model if fresh else as_if_trained(model)


def as_if_trained(model: nn.Module) -> nn.Module:
    """With random adapters; B = 0 would hide the gradient of A. A model without an adapter stays as it is."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def alone(rows: Documents) -> list[Batch]:
    return [padded_batch(rows, np.array([i]), pad_id=0) for i in range(len(rows))]


def packed(rows: Documents) -> Batch:
    return flat_batch(rows, np.arange(len(rows)))


def gradients(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradient of each tensor) of one step on all of the batches."""
    model.zero_grad()
    objective = Objective(model, autocast=None)
    loss_sum, targets, *_ = accumulate_gradients(objective, batches, ALONE)
    return loss_sum / targets, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """Mean loss of each document, in a batch of its own or in one that holds them all."""
    objective = Objective(model, autocast=None)
    parts = [part for batch in batches for part in by_document(batch)]
    return [objective.loss_sum(part).item() / len(part.targets) for part in parts]


def largest_error(found: Sequence[float], expected: Sequence[float]) -> float:
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 distance of a tensor that carries any gradient."""
    assert found.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    return max(
        float((found[name] - expected[name]).norm() / max(float(expected[name].norm()), 1e-4 * scale))
        for name in expected
    )


def by_document(batch: Batch) -> list[Batch]:
    """The same inputs, with the targets of one document each."""
    offsets = batch.inputs.get("document_offsets")
    if offsets is None:
        return [batch]
    owner = torch.bucketize(batch.predictors, offsets[1:], right=True)
    parts = [(batch.predictors[owner == i], batch.targets[owner == i]) for i in range(len(offsets) - 1)]
    return [dataclasses.replace(batch, predictors=at, targets=targets) for at, targets in parts]


# --- errors ------------------------------------------------------------------------------------------


def _with_offsets(batch: Batch, offsets: Tensor) -> Batch:
    longest = int(offsets.diff().max())
    inputs = batch.inputs | {"document_offsets": offsets, "longest_document": longest}
    return dataclasses.replace(batch, inputs=inputs)


def merged(batch: Batch) -> Batch:
    """One long document instead of several; to attention without offsets a row is the same."""
    return _with_offsets(batch, batch.inputs["document_offsets"][[0, -1]])


def two_merged(batch: Batch) -> Batch:
    """The second boundary is missing."""
    offsets = batch.inputs["document_offsets"]
    return _with_offsets(batch, torch.cat((offsets[:2], offsets[3:])))


def shifted(batch: Batch) -> Batch:
    """Every boundary between two documents is one token late."""
    offsets = batch.inputs["document_offsets"]
    return _with_offsets(batch, torch.cat((offsets[:1], offsets[1:-1] + 1, offsets[-1:])))


def without_offsets(batch: Batch) -> Batch:
    kept = {key: value for key, value in batch.inputs.items() if key not in ("document_offsets", "longest_document")}
    return dataclasses.replace(batch, inputs=kept)


def labels_across(batch: Batch) -> Batch:
    """A document's last token predicts the next one's first."""
    starts = batch.inputs["document_offsets"][1:-1].long()
    return dataclasses.replace(
        batch,
        predictors=torch.cat((batch.predictors, starts - 1)),
        targets=torch.cat((batch.targets, batch.inputs["input_ids"][0, starts])),
    )


def positions_running_on(batch: Batch) -> Batch:
    positions = torch.arange(batch.inputs["input_ids"].shape[1])[None]
    return dataclasses.replace(batch, inputs=batch.inputs | {"position_ids": positions})


Mutation = Callable[[Batch], Batch]
LEAKS: dict[str, Mutation] = {
    "offsets merged": merged,
    "two documents merged": two_merged,
    "offsets shifted by one": shifted,
    "boundary labels unmasked": labels_across,
}
