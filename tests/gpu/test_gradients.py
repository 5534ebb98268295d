"""The fast path and plain torch on the GPU, in bfloat16, against single documents in float32 that attend eagerly."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gate
import packing
import pytest
import shapes
import torch
from cards import CUDA, DEVICE, NEEDS_BITSANDBYTES, NEEDS_GPU
from keepings import ALL_KEPT, every_keeping
from measured import at_most
from torch import Tensor

from opensloth import attention
from opensloth.data.batch import Batch
from opensloth.fused.model import FusedModel
from opensloth.isolation import isolate_documents
from opensloth.memory_estimate import Keeping
from opensloth.model import base_of
from opensloth.step import Objective

pytestmark = NEEDS_GPU
CLAIM = "the fast path on a GPU, bfloat16, against float32 alone"
trained_ways = pytest.mark.parametrize(
    "trained",
    [
        shapes.ADAPTER,
        shapes.WHOLE,
        pytest.param(shapes.FOUR_BITS, marks=NEEDS_BITSANDBYTES),
    ],
)


@functools.cache
def expected(kind: str, trained: str) -> tuple[float, int, dict[str, Tensor]]:
    """(sum of losses, targets, gradient of their mean)."""
    with tempfile.TemporaryDirectory() as folder:
        made = shapes.made(kind, trained, DEVICE, Path(folder))
        model = shapes.in_float32(made, kind, trained, DEVICE, Path(folder))
    batches = [batch for batch in packing.alone(shapes.documents()) if len(batch.targets)]
    count, objective = sum(len(batch.targets) for batch in batches), Objective(model, autocast=None)
    loss = sum(objective.accumulate(batch, count).item() for batch in batches)
    return loss, count, gate.gradients(model)


def step(fused: FusedModel, model: Any, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    fused.begin_step()
    loss = fused.accumulate(batch, 1 / count)
    return loss, gate.gradients(model)


def require(claim: str, found: tuple[Tensor, dict[str, Tensor]], known: tuple[float, dict[str, Tensor]]) -> None:
    """Fail unless a step's sum of losses and gradient are those that are `known`."""
    at_most(f"{claim}: loss", abs(found[0].item() / known[0] - 1), 1e-3)
    gate.require(claim, found[1], known[1])


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@trained_ways
@every_keeping
@pytest.mark.parametrize("kind", shapes.CONFIGS)
def test_loss_and_gradient(kind: str, keeping: Keeping, trained: str, tmp_path: Path) -> None:
    """The first batch of a shape is launched kernel by kernel, the second captured, the third replayed: equal bits."""
    loss, count, gradient = expected(kind, trained)
    model, batch = shapes.made(kind, trained, DEVICE, tmp_path), packing.packed(shapes.documents())
    fused = FusedModel(base_of(model), keeping=keeping, chunk=500)
    first, found = step(fused, model, batch, count)
    require(CLAIM, (first, found), (loss, gradient))
    for _ in range(2):
        again, found_again = step(fused, model, batch, count)
        assert torch.equal(again, first)
        assert same_bits(found_again, found)
    assert len(fused._graphs._captured) == int(CUDA)


def launched(made: Callable[[Path], Any], batches: list[Batch], folder: Path) -> list[dict[str, Tensor]]:
    """Each batch's gradient by a model that meets no other: no graph is captured."""
    found = []
    for i, batch in enumerate(batches):
        model = made(scratch(folder, f"alone-{i}"))
        found.append(step(FusedModel(base_of(model), keeping=ALL_KEPT), model, batch, 1000)[1])
    return found


@trained_ways
def test_a_replay_takes_the_new_documents(trained: str, tmp_path: Path) -> None:
    """Two batches of one shape by turns, as each of them is computed without a graph."""
    made = functools.partial(shapes.made, "qwen2", trained, DEVICE)
    batches = [packing.packed(shapes.documents(seed=seed)) for seed in (1, 2)]
    without = launched(made, batches, tmp_path)
    model = made(scratch(tmp_path, "together"))
    fused = FusedModel(base_of(model), keeping=ALL_KEPT)
    for turn in range(6):
        assert same_bits(step(fused, model, batches[turn % 2], 1000)[1], without[turn % 2])
    assert not same_bits(*without)


# --- long documents: by cuDNN, not to the same bits ---------------------------------------------------

BY_CUDNN = f"{CLAIM}, of long documents"
NEEDS_HOPPER = pytest.mark.skipif(
    CUDA and torch.cuda.get_device_capability()[0] != 9, reason="cuDNN attends on Hopper only"
)
LONG = 600
"""Tokens, of which two of the documents have more."""


@NEEDS_HOPPER
@trained_ways
@every_keeping
@pytest.mark.parametrize("kind", shapes.CONFIGS)
def test_long_documents(kind: str, keeping: Keeping, trained: str, tmp_path: Path) -> None:
    """Launched, captured and replayed."""
    loss, count, gradient = expected(kind, trained)
    model, batch = shapes.made(kind, trained, DEVICE, tmp_path), packing.packed(shapes.documents())
    fused = FusedModel(base_of(model), keeping=keeping, long_document=LONG, chunk=500)
    for _ in range(3):
        found_loss, found = step(fused, model, batch, count)
        require(BY_CUDNN, (found_loss, found), (loss, gradient))
    at_most(f"{BY_CUDNN}: loss", abs(fused.loss_sum(batch).item() / loss - 1), 1e-3)
    assert len(fused._graphs._captured) == int(CUDA)
    _, leaked = step(fused, model, packing.merged(batch), count)
    assert not gate.passes(leaked, gradient)


OF_ONE_SHAPE = ((300, 700, 57, 611), (301, 650, 57, 660))
ALONE, SHORT = (1000,), (300, 57, 411)


@NEEDS_HOPPER
def test_batches_with_long_documents_and_without(tmp_path: Path) -> None:
    """By turns, replayed: two of one shape, one that is a single long document and padding, and one without."""
    batches = [packing.packed(shapes.documents(lengths)) for lengths in (*OF_ONE_SHAPE, ALONE, SHORT)]
    made = functools.partial(shapes.made, "qwen2", shapes.ADAPTER, DEVICE)
    expected_ones = launched(made, batches, tmp_path)  # by our own kernels
    model = made(scratch(tmp_path, "together"))
    fused = FusedModel(base_of(model), keeping=ALL_KEPT, long_document=LONG)
    for turn in range(4 * len(batches)):
        found, other = step(fused, model, batches[turn % 4], 1000)[1], expected_ones[turn % 4]
        gate.require(f"{BY_CUDNN}, beside our own kernels", found, other)
    assert len(fused._graphs._captured) == 3 * int(CUDA)
    assert not gate.passes(expected_ones[0], expected_ones[1])


def scratch(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize("trained", [shapes.ADAPTER, shapes.WHOLE])
@pytest.mark.parametrize("kind", shapes.CONFIGS)
@pytest.mark.parametrize("mutation", packing.LEAKS.values(), ids=packing.LEAKS)
def test_the_gate_sees_a_leak(mutation: Callable[[Batch], Batch], kind: str, trained: str, tmp_path: Path) -> None:
    _, count, gradient = expected(kind, trained)
    model, batch = shapes.made(kind, trained, DEVICE, tmp_path), packing.packed(shapes.documents())
    _, found = step(FusedModel(base_of(model), keeping=ALL_KEPT), model, mutation(batch), count)
    assert not gate.passes(found, gradient)


# --- plain torch ----------------------------------------------------------------------------------------

PLAIN = "plain torch on a GPU, bfloat16, against float32 alone"
of_plain_torch = pytest.mark.parametrize("kind", ["llama", "mistral", *shapes.BY_PLAIN_TORCH])
"""`engine: torch`: what the fast path could train, and what is left to plain torch."""


def by_plain_torch(kind: str, folder: Path, trained: str = shapes.ADAPTER) -> tuple[Any, Objective]:
    """A model that packed documents are isolated in."""
    model = shapes.made(kind, trained, DEVICE, folder)
    assert isolate_documents(model, max(shapes.LENGTHS)) is None
    return model, Objective(model, autocast=torch.bfloat16)


@torch.no_grad()
def losses(objective: Objective, batches: list[Batch]) -> list[float]:
    """Mean loss of each document that has a target."""
    parts = [part for batch in batches for part in packing.by_document(batch) if len(part.targets)]
    return [objective.loss_sum(part).item() / len(part.targets) for part in parts]


@of_plain_torch
@pytest.mark.parametrize("trained", [shapes.ADAPTER, shapes.WHOLE])
def test_plain_torch_packs_as_documents_alone(
    kind: str, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CUDA's kernel for documents of several lengths, in every layer."""
    attended, varlen = [], attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *given: attended.append(given[-1]) or varlen(*given))
    _, count, gradient = expected(kind, trained)
    model, objective = by_plain_torch(kind, scratch(tmp_path, "packed"), trained)
    attended.clear()
    objective.accumulate(packing.packed(shapes.documents()), count)
    window = getattr(base_of(model).config, "sliding_window", None)
    assert attended == [window] * base_of(model).config.num_hidden_layers * CUDA
    gate.require(PLAIN, gate.gradients(model), gradient)

    made = shapes.made(kind, trained, DEVICE, scratch(tmp_path, "alone"))
    alone = Objective(shapes.in_float32(made, kind, trained, DEVICE, tmp_path), autocast=None)
    of_each = [
        losses(objective, [packing.packed(shapes.documents())]),
        losses(alone, packing.alone(shapes.documents())),
    ]
    at_most(f"{PLAIN}: loss of each document", packing.largest_error(*of_each), 5e-3)


@of_plain_torch
@pytest.mark.parametrize("mutation", packing.LEAKS.values(), ids=packing.LEAKS)
def test_the_gate_sees_a_leak_in_plain_torch(mutation: Callable[[Batch], Batch], kind: str, tmp_path: Path) -> None:
    _, count, gradient = expected(kind, shapes.ADAPTER)
    model, objective = by_plain_torch(kind, tmp_path)
    objective.accumulate(mutation(packing.packed(shapes.documents())), count)
    assert not gate.passes(gate.gradients(model), gradient)
