"""Triton's kernels against the plain versions of the same operations.

On a machine without a GPU they run in Triton's interpreter, which has to be chosen before Triton is imported: in a
process of its own, started by `test_all_kernels_compute_what_plain_torch_does`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import at_most
from torch import Tensor

from opensloth.fused import operations
from opensloth.fused.operations import Documents, Heads

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernel = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, which a test of this file starts")
BOUND = 2e-6


def close(found: Tensor, expected: Tensor) -> None:
    at_most("a kernel computes what plain torch does", float((found - expected).norm() / expected.norm()), BOUND)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not made for this system")
def test_all_kernels_compute_what_plain_torch_does() -> None:
    command = [sys.executable, "-m", "pytest", str(Path(__file__)), "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "11 passed" in run.stdout


def where(lengths: list[int]) -> Documents:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    nothing = torch.empty(0)
    return Documents(offsets.tolist(), torch.from_numpy(operations.tiles_of(offsets)), nothing, nothing)


@kernel
@pytest.mark.parametrize(
    ("heads", "size", "lengths"),
    [(Heads(4, 2, 0.25), 16, [70, 1, 64, 130, 9]), (Heads(3, 3, 0.3), 32, [200, 3])],
    ids=["grouped", "alone"],
)
def test_attention(heads: Heads, size: int, lengths: list[int]) -> None:
    from opensloth.fused.kernels import attention

    torch.manual_seed(0)
    documents, tokens, width = where(lengths), sum(lengths), heads.query * size
    qkv = torch.randn(tokens, width + 2 * heads.key_value * size)
    expected, found = torch.empty(tokens, width), torch.full((tokens, width + 8), 7.0)
    expected_lse = operations.attention(qkv, documents, heads, expected)
    lse = torch.full_like(expected_lse, float("nan"))
    attention.forward(qkv, documents.tiles, heads, found[:, :width], lse)
    close(found[:, :width], expected)
    close(lse, expected_lse)
    grad = torch.randn(tokens, width)
    expected_d, found_d = torch.empty_like(qkv), torch.full((tokens, qkv.shape[1] + 8), 7.0)
    operations.attention_backward(grad, qkv, expected, expected_lse, documents, heads, expected_d)
    attention.backward(grad, qkv, found[:, :width], lse, documents.tiles, heads, found_d[:, :-8])
    close(found_d[:, :-8], expected_d)
    assert bool((found[:, width:] == 7).all() & (found_d[:, -8:] == 7).all()), "wrote beside its place"


@kernel
def test_rotation() -> None:
    from opensloth.fused.kernels import elementwise

    x, cos, sin = torch.randn(33, 7 * 32), torch.randn(33, 16), torch.randn(33, 16)
    for inverse in (False, True):
        expected, found = x.clone(), x.clone()
        operations.rotate(expected, cos, sin, 5, inverse=inverse)
        elementwise.rotate(found, cos, sin, 5, inverse=inverse)
        close(found, expected)
        assert torch.equal(found[:, 5 * 32 :], x[:, 5 * 32 :])


@kernel
@pytest.mark.parametrize("beside", [False, True])
def test_rms_norm(beside: bool) -> None:
    from opensloth.fused.kernels import elementwise

    x, weight, grad = torch.randn(137, 56), torch.randn(56), torch.randn(137, 56)
    residual = torch.randn(137, 64)[:, :56] if beside else None
    expected, found, rstd = torch.empty(137, 56), torch.empty(137, 64)[:, :56], torch.empty(137)
    expected_rstd = operations.rms_norm(x, weight, 1e-6, expected)
    elementwise.rms_norm(x, weight, 1e-6, found, rstd)
    close(found, expected)
    close(rstd, expected_rstd)
    operations.rms_norm_backward(grad, x, weight, rstd, residual, expected)
    elementwise.rms_norm_backward(grad, x, weight, rstd, residual, found)
    close(found, expected)
    of_weight = torch.zeros(56)
    operations.add_norm_gradient(grad, x, rstd, of_weight)
    close(elementwise.norm_gradient(grad, x, rstd).sum(0), of_weight)


@kernel
def test_norm_of_heads_and_rotation() -> None:
    from opensloth.fused.kernels import elementwise

    heads, tokens, half = Heads(5, 2, 1.0), 19, 16
    documents = Documents([0, tokens], torch.empty(0), torch.randn(tokens, half), torch.randn(tokens, half))
    qkv, weights = torch.randn(tokens, 9 * 2 * half), (torch.randn(2 * half), torch.randn(2 * half))
    expected, found, rstd = torch.empty_like(qkv), qkv.clone(), torch.empty(tokens, 7)
    expected_rstd = operations.norm_rotate(qkv, weights, 1e-6, documents, heads, expected)
    elementwise.norm_rotate(qkv, weights, 1e-6, documents.cos, documents.sin, 5, found, rstd)
    close(found, expected)
    close(rstd, expected_rstd)
    expected = torch.randn(tokens, 9 * 2 * half + 8)
    found = expected.clone()
    operations.norm_rotate_backward(expected[:, :-8], qkv, weights, rstd, documents, heads)
    elementwise.norm_rotate_backward(found[:, :-8], qkv, weights, documents.cos, documents.sin, 5, rstd)
    close(found, expected)


@kernel
def test_swiglu() -> None:
    from opensloth.fused.kernels import elementwise

    gate_up, grad = torch.randn(9, 3000), torch.randn(9, 1500)
    expected, found = torch.empty(9, 1500), torch.empty(9, 1508)[:, :1500]
    operations.swiglu(gate_up, expected)
    elementwise.swiglu(gate_up, found)
    close(found, expected)
    expected_d, found_d, again = torch.empty(9, 3000), torch.empty(9, 3008)[:, :3000], torch.empty(9, 1500)
    operations.swiglu_backward(grad, gate_up, expected_d, torch.empty(9, 1500))
    elementwise.swiglu_backward(grad, gate_up, found_d, again)
    close(found_d, expected_d)
    close(again, expected)


@kernel
def test_cross_entropy() -> None:
    from opensloth.fused.kernels import cross_entropy

    expected = torch.randn(11, 9000) * 3
    found, targets, losses = expected.clone(), torch.randint(0, 9000, (11,)), torch.empty(11)
    targets[[3, 10]] = -100
    scale = torch.tensor(0.3)
    expected_losses = operations.cross_entropy_(expected, targets, scale)
    cross_entropy.cross_entropy_(found, targets, scale, losses)
    assert bool((found[[3, 10]] == 0).all() & (losses[[3, 10]] == 0).all())
    close(losses, expected_losses)
    close(found, expected)


@kernel
def test_many_copies() -> None:
    from opensloth.fused.kernels import copy_table

    source, found = torch.randn(24, 56), torch.zeros(70, 80)
    entries = [(source[3:9], found[5:11, 4:60], 2.0), (source[:, 3:20], found[20:44, 60:77], -1.0)]
    rows = [(a.data_ptr(), b.data_ptr(), *a.shape, a.stride(0), b.stride(0)) for a, b, _ in entries]
    table, scales = torch.tensor(rows), torch.tensor([scale for *_, scale in entries])
    for add in (False, True):
        copy_table.copy(table, scales, source, found, 24 * 17, add=add)
    expected = torch.zeros(70, 80)
    expected[5:11, 4:60], expected[20:44, 60:77] = source[3:9] * 4, source[:, 3:20] * -2
    close(found, expected)


@kernel
@pytest.mark.parametrize("nested", [False, True])
def test_weights_in_four_bits(nested: bool) -> None:
    """Blocks of 64 values reach over the ends of rows; their scales are quantised themselves, or not."""
    from bitsandbytes.functional import quantize_4bit

    from opensloth.fused.kernels import dequantise

    weight = torch.randn(300, 72)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    four_bit = operations.FourBit(packed, state)
    expected, found = torch.empty(300, 72), torch.full((300, 80), 7.0)
    operations.dequantise(four_bit, expected)
    dequantise.dequantise(four_bit, found[:, :72])
    close(found[:, :72], expected)
    assert bool((found[:, 72:] == 7).all()), "wrote beside its place"
    assert 0 < (expected - weight).norm() / weight.norm() < 0.12
