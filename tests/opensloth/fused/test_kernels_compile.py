"""Triton's kernels compile for the GPUs that they are meant for, none of which is needed: in a process of its own.

They fit into the shared memory of a block, and read and write their matrices in wide pieces, borders or not.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes a block may have: A100; RTX 40, L4 and L40S; H100 and H200; B200."""
NARROW = {"_cross_entropy": 1, "_copy": 16}
"""Accesses of two bytes: the target's own logit; adapters, which are small, and their strides are data."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not made for this system")
@pytest.mark.parametrize("capability", SHARED)
def test_all_kernels_compile(capability: int) -> None:
    run = subprocess.run(
        [sys.executable, str(Path(__file__)), str(capability)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == _names()
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["of two bytes"] <= NARROW.get(kernel["name"], 0), kernel


def _names() -> set[str]:
    """Of the kernels that are launched, by the source."""
    folder = Path(__file__).parents[3] / "opensloth" / "fused" / "kernels"
    return {name for file in folder.glob("*.py") for name in re.findall(r"^ +(_\w+)\[", file.read_text(), re.MULTILINE)}


def _compile_all(capability: int) -> None:
    """Launch every kernel as the layers of 0.5B and 7B models do, but stop before a GPU is asked for."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    launch: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *given: Any, warmup: bool, **named: Any) -> Any:
        kernel = launch(self, *given, warmup=True, **named)
        accesses = Counter(re.findall(r"\b(?:ld|st)\.global\.(\w+\.\w+|\w+)", kernel.asm["ptx"]))
        found = {"name": self.__name__, "shared": kernel.metadata.shared, "of two bytes": accesses["b16"]}
        print(json.dumps(found))  # noqa: T201 (the test reads it)
        return kernel

    driver.set_active(NoDevice())
    JITFunction.run = compile_only
    for query, key_value, dim in ((14, 2, 64), (28, 4, 128)):
        _launch_layer(query, key_value, dim)
    _launch_rest()


def _launch_layer(query: int, key_value: int, dim: int, tokens: int = 512) -> None:
    import numpy as np
    import torch

    from opensloth.fused.kernels import attention, elementwise, rows
    from opensloth.fused.operations import Heads, tiles_of
    from opensloth.memory_estimate import BORDER

    def matrix(width: int, beside: int = 0) -> torch.Tensor:
        return torch.empty(tokens, width + beside, dtype=torch.bfloat16)[:, :width]

    heads, tiles = Heads(query, key_value, 0.1), torch.from_numpy(tiles_of(np.array([0, 300, tokens])))
    width, inner = query * dim, 4864
    qkv, dqkv = matrix(width + 2 * key_value * dim), matrix(width + 2 * key_value * dim, BORDER)
    x, bordered, weight = matrix(width), matrix(width, BORDER), torch.empty(width, dtype=torch.bfloat16)
    lse, scale = torch.empty(query, tokens), torch.empty(tokens)
    attention.forward(qkv, tiles, heads, bordered, lse)
    attention.backward(x, qkv, bordered, lse, tiles, heads, dqkv)
    for taken_or_put in (rows.gather, rows.scatter):
        taken_or_put(matrix(width), torch.empty(tokens, dtype=torch.int64), bordered)
    elementwise.rms_norm(x, weight, 1e-6, bordered, scale)
    elementwise.rms_norm_backward(x, x, weight, scale, bordered, x)
    elementwise.norm_gradient(x, x, scale)
    turns = torch.empty(tokens, dim // 2)
    elementwise.rotate(dqkv, turns, turns, query + key_value, inverse=True)
    of_heads = (torch.empty(dim, dtype=torch.bfloat16), torch.empty(dim, dtype=torch.bfloat16))
    head_scale = torch.empty(tokens, query + key_value)
    elementwise.norm_rotate(qkv, of_heads, 1e-6, turns, turns, query, qkv, head_scale)
    elementwise.norm_rotate_backward(dqkv, qkv, of_heads, turns, turns, query, head_scale)
    elementwise.head_norm_gradient(dqkv, qkv, turns, turns, query, head_scale)
    elementwise.swiglu(matrix(2 * inner, BORDER), matrix(inner, BORDER))
    elementwise.swiglu_backward_(matrix(inner), matrix(2 * inner, BORDER))


def _launch_rest() -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    from opensloth.fused.kernels import copy_table, cross_entropy, dequantise, eight_bit_adamw
    from opensloth.fused.operations import FourBit
    from opensloth.memory_estimate import BORDER

    logits, targets = torch.empty(4, 151_936, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    cross_entropy.cross_entropy_(logits, targets, torch.tensor(1.0), torch.empty(4))
    weight = torch.randn(256, 896, dtype=torch.bfloat16)
    for nested in (False, True):
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        buffer = torch.empty(256, 896 + BORDER, dtype=torch.bfloat16)
        dequantise.dequantise(FourBit(packed, state), buffer[:, :896])
    table, scales = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1)
    for add in (False, True):
        copy_table.copy(table, scales, torch.empty(8, 896), weight, 8 * 896, add=add)
    p, codes, of_blocks = torch.empty(4096), torch.empty(4096, dtype=torch.uint8), torch.empty(16)
    state = {name: tensor for i in "12" for name, tensor in (("state" + i, codes), ("absmax" + i, of_blocks))}
    state |= {"qmap1": torch.empty(256), "qmap2": torch.empty(256), "step": 3}
    eight_bit_adamw.step(p, p, state, {"betas": (0.9, 0.999), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1})


if __name__ == "__main__":
    _compile_all(int(sys.argv[1]))
