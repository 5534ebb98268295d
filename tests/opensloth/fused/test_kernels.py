"""Triton's kernels against the plain versions of the same operations.

On a machine without a GPU they run in Triton's interpreter, which has to be chosen before Triton is imported: in a
process of its own, started by `test_all_kernels_compute_what_plain_torch_does`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured import at_most
from torch import Tensor

from opensloth.fused import operations
from opensloth.fused.operations import Documents, Heads

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
BOUND = 2e-6 if INTERPRETED else 5e-3
ATTENTION_BOUND = 2e-6 if INTERPRETED else 1e-2
"""Weights and their gradients are rounded to 16 bits on the way."""


def kernel(test: Callable[..., None]) -> Callable[..., None]:
    """A test of a kernel: in the interpreter, which a test of this file starts, or else on a GPU."""
    if INTERPRETED:
        return test
    there = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    return pytest.mark.gpu(there(test))


def sizes(small: Any, real: Any) -> Any:
    """Those that are bearable for the interpreter, or a 0.5B model's."""
    return small if INTERPRETED else real


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Where and in what kernels compute."""
    return torch.randn(*shape).to(DEVICE, dtype)


def sevens(*shape: int) -> Tensor:
    return torch.full(shape, 7.0, device=DEVICE, dtype=DTYPE)


def plain(tensor: Tensor) -> Tensor:
    """The same values for plain torch."""
    return tensor.cpu().float().clone()


def close(found: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    off = float((plain(found) - expected).norm() / expected.norm())
    at_most(f"a kernel computes what plain torch does, {found.dtype}", off, bound)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not made for this system")
def test_all_kernels_compute_what_plain_torch_does() -> None:
    command = [sys.executable, "-m", "pytest", str(Path(__file__)), "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "16 passed" in run.stdout


def where(lengths: list[int]) -> Documents:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    nothing = torch.empty(0)
    return Documents(offsets.tolist(), torch.from_numpy(operations.tiles_of(offsets)).to(DEVICE), nothing, nothing)


@kernel
@pytest.mark.parametrize(
    ("heads", "size", "lengths"),
    sizes(
        [(Heads(4, 2, 0.25), 16, [70, 1, 64, 130, 9]), (Heads(3, 3, 0.3), 32, [200, 3])],
        [(Heads(14, 2, 0.125), 64, [350, 1, 64, 130, 9, 900, 63]), (Heads(8, 8, 0.088), 128, [1200, 3, 65])],
    ),
    ids=["grouped", "alone"],
)
def test_attention(heads: Heads, size: int, lengths: list[int]) -> None:
    from opensloth.fused.kernels import attention

    torch.manual_seed(0)
    documents, tokens, width = where(lengths), sum(lengths), heads.query * size
    qkv = random(tokens, width + 2 * heads.key_value * size)
    expected, found = torch.empty(tokens, width), sevens(tokens, width + 16)
    expected_lse = operations.attention(plain(qkv), documents, heads, expected)
    lse = torch.full_like(expected_lse, float("nan"), device=DEVICE)
    attention.forward(qkv, documents.tiles, heads, found[:, :width], lse)
    close(found[:, :width], expected, ATTENTION_BOUND)
    close(lse, expected_lse)
    grad = random(tokens, width)
    expected_d, found_d = torch.empty(qkv.shape), sevens(tokens, qkv.shape[1] + 16)
    operations.attention_backward(plain(grad), plain(qkv), expected, expected_lse, documents, heads, expected_d)
    attention.backward(grad, qkv, found[:, :width], lse, documents.tiles, heads, found_d[:, :-16])
    close(found_d[:, :-16], expected_d, ATTENTION_BOUND)
    assert bool((found[:, width:] == 7).all() & (found_d[:, -16:] == 7).all()), "wrote beside its place"


@kernel
def test_rotation() -> None:
    from opensloth.fused.kernels import elementwise

    tokens, heads, half = sizes((33, 7, 16), (2048, 18, 32))
    turned = heads - 2
    x, cos, sin = random(tokens, heads * 2 * half), *(random(tokens, half, dtype=torch.float32) for _ in range(2))
    for inverse in (False, True):
        expected, found = plain(x), x.clone()
        operations.rotate(expected, plain(cos), plain(sin), turned, inverse=inverse)
        elementwise.rotate(found, cos, sin, turned, inverse=inverse)
        close(found, expected)
        assert torch.equal(found[:, turned * 2 * half :], x[:, turned * 2 * half :])


@kernel
@pytest.mark.parametrize("beside", [False, True])
def test_rms_norm(beside: bool) -> None:
    from opensloth.fused.kernels import elementwise

    tokens, width = sizes((137, 56), (2048, 896))
    x, weight, grad = random(tokens, width), random(width), random(tokens, width)
    residual = random(tokens, width + 16)[:, :width] if beside else None
    expected, rstd = torch.empty(tokens, width), torch.empty(tokens, device=DEVICE)
    found = sevens(tokens, width + 16)
    expected_rstd = operations.rms_norm(plain(x), plain(weight), 1e-6, expected)
    elementwise.rms_norm(x, weight, 1e-6, found[:, :width], rstd)
    close(found[:, :width], expected)
    close(rstd, expected_rstd)
    given = (plain(grad), plain(x), plain(weight), expected_rstd, plain(residual) if residual is not None else None)
    operations.rms_norm_backward(*given, expected)
    elementwise.rms_norm_backward(grad, x, weight, rstd, residual, found[:, :width])
    close(found[:, :width], expected)
    assert bool((found[:, width:] == 7).all()), "wrote beside its place"
    of_weight = torch.zeros(width)
    operations.add_norm_gradient(plain(grad), plain(x), expected_rstd, of_weight)
    close(elementwise.norm_gradient(grad, x, rstd).sum(0), of_weight)


@kernel
def test_norm_of_heads_and_rotation() -> None:
    from opensloth.fused.kernels import elementwise

    heads, tokens, half = sizes((Heads(5, 2, 1.0), 19, 16), (Heads(16, 8, 1.0), 2048, 64))
    normed, width = heads.query + heads.key_value, (heads.query + 2 * heads.key_value) * 2 * half
    cos, sin = (random(tokens, half, dtype=torch.float32) for _ in range(2))
    documents = Documents([0, tokens], torch.empty(0), plain(cos), plain(sin))
    qkv, weights = random(tokens, width), (random(2 * half), random(2 * half))
    plain_weights = (plain(weights[0]), plain(weights[1]))
    expected, found, rstd = torch.empty(tokens, width), qkv.clone(), torch.empty(tokens, normed, device=DEVICE)
    expected_rstd = operations.norm_rotate(plain(qkv), plain_weights, 1e-6, documents, heads, expected)
    elementwise.norm_rotate(qkv, weights, 1e-6, cos, sin, heads.query, found, rstd)
    close(found, expected)
    close(rstd, expected_rstd)
    found = random(tokens, width + 16)
    expected = plain(found)
    trained = tuple(weight.requires_grad_(True) for weight in plain_weights)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    parts = elementwise.head_norm_gradient(found[:, :-16], qkv, cos, sin, heads.query, rstd)
    operations.norm_rotate_backward(expected[:, :-16], plain(qkv), trained, expected_rstd, documents, heads)
    for part, weight in zip(parts.sum(0), trained, strict=True):
        close(part, weight.grad)
    elementwise.norm_rotate_backward(found[:, :-16], qkv, weights, cos, sin, heads.query, rstd)
    close(found, expected)


@kernel
def test_rows_of_a_table_in_host_memory() -> None:
    from opensloth.fused.kernels import rows

    count, width = sizes((9, 1500), (3000, 3584))
    table, ids = torch.randn(50, width).to(DTYPE), torch.randint(0, 50, (count,))
    found = random(count, width)
    rows.gather(table if INTERPRETED else table.pin_memory(), ids.to(DEVICE), found)
    assert torch.equal(found.cpu(), table[ids])


@kernel
@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_rows_that_are_nowhere(kind: str) -> None:
    """Taken they are zeros, put they are left out; what lies beside the rows is not touched."""
    from opensloth.fused.kernels import rows

    count, width = sizes((9, 1100), (3000, 1152))
    source, found = random(count, width + 16)[:, :width], sevens(count, width + 16)
    at = torch.where(torch.arange(count) % 3 == 1, -1, torch.randperm(count))
    expected = torch.full((count, width), 7.0)
    getattr(operations, kind)(plain(source), at, expected)
    getattr(rows, kind)(source, at.to(DEVICE), found[:, :width])
    close(found[:, :width], expected, 0)
    assert bool((found[:, width:] == 7).all())


@kernel
def test_swiglu() -> None:
    from opensloth.fused.kernels import elementwise

    tokens, width = sizes((9, 1500), (2048, 4864))
    gate_up, grad = random(tokens, 2 * width + 16)[:, : 2 * width], random(tokens, width)
    expected, found = torch.empty(tokens, width), random(tokens, width + 16)[:, :width]
    operations.swiglu(plain(gate_up), expected)
    elementwise.swiglu(gate_up, found)
    close(found, expected)
    again, expected_d = plain(grad), plain(gate_up)
    operations.swiglu_backward_(again, expected_d)
    elementwise.swiglu_backward_(grad, gate_up)
    close(gate_up, expected_d)
    close(grad, expected)
    close(grad, again)


@kernel
def test_cross_entropy() -> None:
    from opensloth.fused.kernels import cross_entropy

    rows, vocabulary = sizes((11, 9000), (300, 151_936))
    found, targets = random(rows, vocabulary) * 3, torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[[3, 10]] = -100
    expected, losses, scale = plain(found), torch.empty(rows, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    expected_losses = operations.cross_entropy_(expected, targets.cpu(), scale.cpu())
    cross_entropy.cross_entropy_(found, targets, scale, losses)
    assert bool((found[[3, 10]] == 0).all() & (losses[[3, 10]] == 0).all())
    close(losses, expected_losses, sizes(2e-6, 1e-5))
    close(found, expected)


@kernel
def test_many_copies() -> None:
    from opensloth.fused.kernels import copy_table

    source, found = random(24, 56, dtype=torch.float32), torch.zeros(70, 80, device=DEVICE, dtype=DTYPE)
    entries = [(source[3:9], found[5:11, 4:60], 2.0), (source[:, 3:20], found[20:44, 60:77], -1.0)]
    rows = [(a.data_ptr(), b.data_ptr(), *a.shape, a.stride(0), b.stride(0)) for a, b, _ in entries]
    table = torch.tensor(rows, device=DEVICE)
    scales = torch.tensor([scale for *_, scale in entries], device=DEVICE)
    for add in (False, True):
        copy_table.copy(table, scales, source, found, 24 * 17, add=add)
    expected = torch.zeros(70, 80)
    expected[5:11, 4:60], expected[20:44, 60:77] = plain(source)[3:9] * 4, plain(source)[:, 3:20] * -2
    close(found, expected)


@kernel
@pytest.mark.parametrize("nested", [False, True])
def test_weights_in_four_bits(nested: bool) -> None:
    """Blocks of 64 values reach over the ends of rows; their scales are quantised themselves, or not."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from opensloth.fused.kernels import dequantise

    rows, columns = sizes((300, 72), (4864, 904))
    weight = torch.randn(rows, columns)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    expected, found = torch.empty(rows, columns), sevens(rows, columns + 8)
    operations.dequantise(operations.FourBit(packed, state), expected)
    state.to(DEVICE)
    dequantise.dequantise(operations.FourBit(packed.to(DEVICE), state), found[:, :columns])
    close(found[:, :columns], expected)
    assert bool((found[:, columns:] == 7).all()), "wrote beside its place"
    assert 0 < (expected - weight).norm() / weight.norm() < 0.12


@kernel
def test_adamw_in_eight_bits() -> None:
    """Gradients of all sizes within a block; one block has none at first, one tensor's end has none ever."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from opensloth.fused.kernels import eight_bit_adamw

    torch.manual_seed(0)
    blocks, config = sizes(21, 4001), {"betas": (0.9, 0.99), "lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
    p = torch.randn(blocks * 256)
    codes, largest = [torch.zeros(p.shape, dtype=torch.uint8)] * 2, [torch.zeros(blocks)] * 2
    for count in range(1, 6):
        grad = torch.randn(p.shape) * 10 ** (torch.rand(p.shape) * 3 - 3)
        grad[-100:] = 0
        if count < 3:
            grad[:256] = 0
        state = {f"state{i}": tensor.to(DEVICE, copy=True) for i, tensor in enumerate(codes, 1)}
        state |= {f"absmax{i}": tensor.to(DEVICE, copy=True) for i, tensor in enumerate(largest, 1)}
        state |= {f"qmap{i}": tensor.to(DEVICE) for i, tensor in enumerate(maps, 1)} | {"step": count}
        found = p.to(DEVICE, copy=True)
        eight_bit_adamw.step(found, grad.to(DEVICE), state, config)
        p, codes, largest = plain_adamw(p, grad, codes, largest, maps, config, count)
        close(found, p, 1e-6)
        for i, (of_block, of_value) in enumerate(zip(largest, codes, strict=True), 1):
            close(state[f"absmax{i}"], of_block, 1e-6)
            off = state[f"state{i}"].cpu().int() - of_value.int()
            assert int(off.abs().max()) <= 1
            at_most("moments in 8 bits rounded otherwise, between two codes", float((off != 0).float().mean()), 1e-3)


def plain_adamw(
    p: Tensor, grad: Tensor, codes: list[Tensor], largest: list[Tensor], maps: list[Tensor], config: Any, count: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One step by its definition; each moment rounded to the nearest value of its map, but the second not to zero."""
    (beta1, beta2), rate = config["betas"], config["lr"]
    blocks = [of_map[of_value.int()].view(-1, 256) for of_map, of_value in zip(maps, codes, strict=True)]
    first, second = ((b * of_block[:, None]).flatten() for b, of_block in zip(blocks, largest, strict=True))
    first, second = first * beta1 + grad * (1 - beta1), second * beta2 + grad * grad * (1 - beta2)
    step = first / (1 - beta1**count) / ((second / (1 - beta2**count)).sqrt() + config["eps"])
    p = p * (1 - rate * config["weight_decay"]) - rate * step
    codes, largest = [], []
    for moment, of_map in zip((first, second), maps, strict=True):
        of_block = moment.view(-1, 256).abs().amax(1)
        scaled = (moment.view(-1, 256) / of_block[:, None]).nan_to_num().flatten()
        nearest = torch.cat([(part[:, None] - of_map).abs().argmin(1) for part in scaled.split(1 << 16)])
        if of_map[0] == 0:
            nearest[moment > 0] = nearest[moment > 0].clamp(min=1)
        codes.append(nearest.to(torch.uint8))
        largest.append(of_block)
    return p, codes, largest


@kernel
def test_the_maps_of_moments_are_those_of_the_package() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from opensloth.fused.kernels import eight_bit_adamw

    signed, unsigned = (functional.create_dynamic_map(signed=signed) for signed in (True, False))
    assert eight_bit_adamw.knows(signed, unsigned)
    assert not eight_bit_adamw.knows(unsigned, signed)
    assert not eight_bit_adamw.knows(signed, unsigned * 1.001)
