"""A long training on a GPU compiles nothing after its first steps, and takes no more memory."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packing
import pytest
import shapes
import tiny
import torch
from cards import CUDA, DEVICE, NEEDS_GPU
from keepings import ALL_KEPT
from measured import at_most

from opensloth.data.batch import Batch
from opensloth.fused.graphs import MOST
from opensloth.fused.inputs import inputs_of
from opensloth.fused.model import FusedModel
from opensloth.memory_estimate import IN_HOST, Keep, Keeping
from opensloth.model import base_of, trainable_parameters

pytestmark = NEEDS_GPU
ROW = 4096
WARM, STEPS = 10, 100
BEGIN, END = 50, 500


class Training:
    """Steps of one batch each."""

    def __init__(self, kind: str, trained: str, scratch: Path, keeping: Keeping = ALL_KEPT) -> None:
        self.model: Any = shapes.made(kind, trained, DEVICE, scratch)
        self.fused = FusedModel(base_of(self.model), keeping=keeping)
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.model), lr=1e-4)

    def step(self, batch: Batch) -> None:
        self.fused.begin_step()
        self.fused.accumulate(batch, 1 / len(batch.targets))
        self.fused.clip(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def lengths(seed: int) -> tuple[int, ...]:
    """Documents that fill a row, or an eighth of it, or something between."""
    generator = np.random.default_rng(seed)
    room, found = int(generator.integers(ROW // 8, ROW + 1)), []
    while sum(found) < room:
        found.append(int(min(generator.lognormal(5.5, 0.9) + 2, room - sum(found))))
    return tuple(found)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles, or reads from its cache on disk, for as long as it is open."""
    from triton import knobs

    before, seen = knobs.runtime.jit_cache_hook, []

    def see(*_: Any, **said: Any) -> None:
        seen.append(str(said.get("repr")))

    knobs.runtime.jit_cache_hook = see
    try:
        yield seen
    finally:
        knobs.runtime.jit_cache_hook = before


def forget_kernels() -> None:
    """This process has none of them any more, as if no test had been before."""
    from triton.runtime import JITFunction

    from opensloth.fused import kernels

    names = [f"{kernels.__name__}.{found.name}" for found in pkgutil.iter_modules(kernels.__path__)]
    assert names
    for name in names:
        for kernel in vars(importlib.import_module(name)).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


@pytest.mark.parametrize(("kind", "trained"), [("qwen2", shapes.ADAPTER), ("qwen3", shapes.WHOLE)])
def test_nothing_is_compiled_after_the_first_steps(kind: str, trained: str, tmp_path: Path) -> None:
    """Documents of ever other lengths: more shapes than are captured."""
    batches = [packing.packed(shapes.documents(lengths(seed), seed)) for seed in range(WARM + STEPS)]
    forget_kernels()
    training = Training(kind, trained, tmp_path)
    with compilations() as first:
        for batch in batches[:WARM]:
            training.step(batch)
    with compilations() as later:
        for batch in batches[WARM:] * 2:
            training.step(batch)
    assert bool(first) == CUDA, "the hook sees nothing"
    at_most("kernels compiled after the first ten steps", len(later), 0)
    shapes_met = Counter(inputs_of(batch, 1.0).shape for batch in batches)
    assert len(shapes_met) > MOST
    assert len(training.fused._graphs._captured) == (MOST if CUDA else 0)


@pytest.mark.parametrize("keeping", [ALL_KEPT, Keeping(Keep.HOST), Keeping(Keep.HOST_INPUTS)], ids=str)
@pytest.mark.parametrize("trained", [shapes.ADAPTER, shapes.WHOLE])
def test_memory_is_flat(trained: str, keeping: Keeping, tmp_path: Path) -> None:
    """Batches of several shapes by turns, all of them captured long before the first look."""
    batches = [packing.packed(shapes.documents(lengths(seed), seed)) for seed in range(8)]
    training = Training("qwen2", trained, tmp_path, keeping)
    taken = {}
    for step in range(1, END + 1):
        training.step(batches[step % len(batches)])
        if step in (BEGIN, END):
            torch.cuda.synchronize()
            taken[step] = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    assert min(taken[BEGIN]) > 0
    for name, begin, end in zip(("allocated", "reserved"), taken[BEGIN], taken[END], strict=True):
        at_most(f"bytes {name} on the GPU more after step {END} than after step {BEGIN}", end - begin, 0)


def test_batches_of_new_shapes_use_the_memory_of_the_graphs(tmp_path: Path) -> None:
    """Were they given memory of their own, a run would take twice what its batches need."""
    rows = [packing.packed(shapes.documents((ROW - 300 * i, 100 + 7 * i))) for i in range(6)]
    largest, others = rows[0], rows[1:]
    training = Training("qwen2", shapes.ADAPTER, tmp_path)

    def gradient_of_largest() -> torch.Tensor:
        training.fused.begin_step()
        training.fused.accumulate(largest, 1.0)
        return training.fused.gradient.clone()

    launched = gradient_of_largest()
    captured = gradient_of_largest()
    torch.cuda.synchronize()
    alone = torch.cuda.memory_reserved()
    for other in others:
        training.fused.begin_step()
        training.fused.accumulate(other, 1.0)
        training.fused.loss_sum(other)
        assert torch.equal(gradient_of_largest(), captured)
    assert torch.equal(launched, captured)
    assert len(training.fused._graphs._captured) == int(CUDA)
    at_most("memory that batches of new shapes take beside a captured one", torch.cuda.memory_reserved() / alone, 1.1)


def of_targets(count: int, tokens: int = ROW) -> Batch:
    """A single document whose last tokens are targets."""
    ids, prompt = [5 + i % 50 for i in range(tokens)], tokens - count
    return packing.packed(tiny.Documents([{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}]))


FEWER_AND_MORE = ((ROW, 1024), (2560, 2560), *((tokens, 700) for tokens in range(2816, ROW, 256)), (ROW, 1024))
"""(tokens, targets) of batches."""


@pytest.mark.parametrize(
    ("rows", "bound"),
    [
        ([packing.packed(shapes.documents((ROW - 300 * i, 100))) for i in reversed(range(6))], 1.1),
        ([of_targets(count) for count in range(ROW // 8, ROW + 1, ROW // 8)], 1.1),
        ([of_targets(count, tokens) for tokens, count in FEWER_AND_MORE], 1.15),
    ],
    ids=["longer", "of more targets", "shorter ones of more targets between"],
)
def test_a_larger_batch_takes_the_place_of_smaller_ones(rows: list[Batch], bound: float, tmp_path: Path) -> None:
    """None of their blocks is of use to it: kept, they would be a second set beside its own, and a third."""
    reserved = []
    for name, batches in (("largest", rows[-1:]), ("all", rows)):
        (tmp_path / name).mkdir()
        training = Training("qwen2", shapes.ADAPTER, tmp_path / name)
        for batch in batches:
            training.step(batch)
            training.step(batch)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
        training.fused.release()
        del training
        torch.cuda.empty_cache()
    at_most("memory of ever larger batches beside that of the largest alone", reserved[1] / reserved[0], bound)


@pytest.mark.parametrize("keep", IN_HOST)
def test_embeddings_come_back_from_host_memory(keep: Keep, tmp_path: Path) -> None:
    training = Training("llama", shapes.ADAPTER, tmp_path, Keeping(keep))
    weight = base_of(training.model).model.embed_tokens.weight
    assert weight.device.type == "cpu"
    before = weight.detach().clone()
    training.step(packing.packed(shapes.documents((100, 50))))
    training.fused.release()
    assert weight.is_cuda == CUDA
    assert torch.equal(weight.cpu(), before)


def test_the_weights_are_given_back_without_a_second_model(tmp_path: Path) -> None:
    """It would not fit on a GPU that has just room for the training."""
    training = Training("qwen2", shapes.ADAPTER, tmp_path)
    training.step(packing.packed(shapes.documents((100, 50))))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training.fused.release()
    more = torch.cuda.max_memory_allocated() - before
    weights = sum(p.numel() * p.element_size() for p in training.model.parameters())
    at_most("memory that giving the weights back takes, beside that of the model", more / weights, 0.1)
