"""Long documents that attend by themselves, on the CPU: what is computed beside them, and whether cuDNN may do it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import packing
import pytest
import shapes
import tiny
import torch
from measured import at_most

from opensloth.data.batch import Batch
from opensloth.fused import long_documents, operations
from opensloth.fused.inputs import ROOM_STEP, Inputs, inputs_of, long_documents_of
from opensloth.fused.operations import Documents, Heads

HEADS, SIZE = Heads(4, 2, 0.25), 16
LONG_FROM = 100


def batch(count: int = 6) -> Batch:
    return packing.packed(tiny.Documents(tiny.random_rows(count, longest=200)))


@pytest.mark.parametrize("lengths", [[700], [3, 512, 40, 513, 9], [20, 600]])
def test_room_changes_nothing(lengths: list[int]) -> None:
    """It holds what was there before: numbers that are none, too."""
    tokens, offsets = sum(lengths), np.concatenate(([0], np.cumsum(lengths))).tolist()
    bounds = [(begin, end) for begin, end in itertools.pairwise(offsets) if end - begin >= 512]
    torch.manual_seed(0)
    qkv, grad = torch.randn(tokens, 8 * SIZE), torch.randn(tokens, 4 * SIZE)
    nothing, found = torch.empty(0), []
    for long in (None, long_documents_of(bounds, tokens)):
        where = Documents(offsets, nothing, nothing, nothing, long)
        out, dqkv = torch.full_like(grad, torch.nan), torch.full_like(qkv, torch.nan)
        lse = operations.attention(qkv, where, HEADS, out)
        operations.attention_backward(grad, qkv, out, lse, where, HEADS, dqkv)
        found.append((out, lse, dqkv))
    for one, other in zip(*found, strict=True):
        at_most("attention of long documents with room behind them", float((one - other).norm() / one.norm()), 1e-5)


def inputs(lengths: Sequence[int]) -> Inputs:
    return inputs_of(packing.packed(tiny.Documents([row(length) for length in lengths])), 1.0, long=LONG_FROM)


def row(length: int) -> dict[str, Any]:
    return {"input_ids": [5] * length, "labels": [5] * length}


def test_lengths_of_the_same_room_are_one_shape() -> None:
    """In whatever order they come; others are another shape."""
    one = inputs([600, 40, 100, 800])
    assert one.long_lengths == (ROOM_STEP, 2 * ROOM_STEP, 2 * ROOM_STEP)
    assert one.shape == inputs([110, 40, 700, 690]).shape
    assert one.shape != inputs([110, 40, 400, 990]).shape


def test_long_documents_have_no_tiles() -> None:
    lengths = np.diff(batch().inputs["document_offsets"])
    plain, long = inputs_of(batch(), 1.0), inputs_of(batch(), 1.0, long=LONG_FROM)
    assert plain.long is None
    assert long.long is not None
    ends = set(np.cumsum(lengths)[lengths >= LONG_FROM].tolist())
    assert ends <= set(plain.tiles[:, 2].tolist())
    assert not ends & set(long.tiles[:, 2].tolist())
    assert set(long.long.rows[long.long.rows >= 0].tolist()) == set(np.flatnonzero(long.long.places >= 0).tolist())


def test_padding_is_never_long() -> None:
    """It may be the longest document that there is."""
    few = batch(2)
    full = few.tokens * 16 // 15
    inputs = inputs_of(few, 1.0, full, long=few.tokens // 20)
    padding = inputs.offsets[-1] - few.tokens
    assert padding > few.tokens // 20
    assert inputs.long is not None
    assert len(inputs.long.lengths) == 2
    assert bool((inputs.long.places[few.tokens :] < 0).all())


# --- whether cuDNN may compute them --------------------------------------------------------------------


def base_on(device: str) -> Any:
    """What of a model matters here, as if it lay there."""
    return SimpleNamespace(device=torch.device(device), config=shapes.CONFIGS["qwen2"]())


def least(monkeypatch: pytest.MonkeyPatch, found: Any, longest: int = long_documents.LEAST) -> tuple[int, str]:
    """As on a Hopper GPU where the comparison ends as `found` does."""

    def compared(*_: Any) -> float:
        if isinstance(found, Exception):
            raise found
        return float(found)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(long_documents, "difference", compared)
    return long_documents.least_for(base_on("cuda"), longest)


def test_cudnn_is_taken_where_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert least(monkeypatch, 0.003) == (
        long_documents.LEAST,
        "; documents of 8,192 tokens and more attend by cuDNN's kernels",
    )
    assert least(monkeypatch, 0.003, long_documents.LEAST - 1) == (0, "")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (0.031, "cuDNN computes something else (0.031 off)"),
        (float("nan"), "cuDNN computes something else (nan off)"),
        (RuntimeError("no plan\nat line 3"), "cuDNN's attention fails (no plan)"),
        (AttributeError(), "cuDNN's attention fails ()"),
    ],
)
def test_where_it_does_not_that_is_said(found: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert least(monkeypatch, found) == (0, f"; long documents attend as others do: {reason}")


@pytest.mark.parametrize("place", range(3))
def test_a_number_that_is_none_is_seen_wherever_it_is(place: int) -> None:
    found = [torch.ones(4) for _ in range(3)]
    found[place][2] = torch.nan
    assert np.isnan(long_documents.farthest(found, [torch.ones(4)] * 3))


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_and_processors_go_on_as_before(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert long_documents.least_for(base_on("cpu"), 1 << 20) == (0, "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found, said = long_documents.least_for(base_on("cuda"), 1 << 20)
    assert found == 0
    assert "on Hopper only" in said


def test_what_is_called_is_there() -> None:
    """torch's private functions, with the arguments that they are given."""
    forward, backward = (
        getattr(torch.ops.aten, f"_scaled_dot_product_cudnn_attention{suffix}").default._schema
        for suffix in ("", "_backward")
    )
    names = [argument.name for argument in forward.arguments]
    assert names[3:] == ["attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask", "scale"]
    names = [argument.name for argument in backward.arguments]
    assert names[4:] == [
        *("out", "logsumexp", "philox_seed", "philox_offset", "attn_bias", "cum_seq_q", "cum_seq_k"),
        *("max_q", "max_k", "dropout_p", "is_causal", "scale"),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("tokens", [700, 8192, 9001])
@pytest.mark.parametrize(("heads", "size"), [(Heads(14, 2, 0.125), 64), (Heads(28, 4, 0.088), 128), (HEADS, 32)])
def test_cudnn_computes_what_our_kernels_do(heads: Heads, size: int, tokens: int) -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("not used on such a GPU")
    off = long_documents.difference(device, heads, size, tokens)
    at_most("cuDNN's attention in long documents beside our own kernels', bfloat16", off, 0.02)
    assert long_documents.least_for(base_on("cuda"), long_documents.LEAST)[0] == long_documents.LEAST


def test_places() -> None:
    """Shorter documents come first."""
    found = long_documents_of([(20, 20 + ROOM_STEP + 1), (2, 5)], 600)
    assert found.lengths == (ROOM_STEP, 2 * ROOM_STEP)
    assert found.rows[:4].tolist() == [2, 3, 4, -1]
    assert found.places[:3].tolist() == [-1, -1, 0]
    assert found.places[20] == ROOM_STEP
    assert len(found.rows) == 3 * ROOM_STEP
