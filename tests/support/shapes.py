"""Models with heads as published ones have them and few narrow layers, and documents of realistic lengths for them.

Random weights of the usual size; norms, biases and both halves of the adapters hold random numbers, so that none can be
left out unseen.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from opensloth.model import attach_adapter, load_model
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig

VOCABULARY = 8200
"""No multiple of the block in which the loss is computed."""
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    num_hidden_layers=4,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.02,
)
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(
        **_COMMON, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8
    ),
    "mistral": lambda: MistralConfig(
        **_COMMON,
        hidden_size=512,
        intermediate_size=1792,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        sliding_window=2048,  # longer than any document
    ),
    "qwen2": lambda: Qwen2Config(
        **_COMMON,
        hidden_size=896,
        intermediate_size=2432,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: Qwen3Config(
        **_COMMON, hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=2, head_dim=128
    ),
}
"""Heads of 64 alone and in groups of 7; of 128 in groups of 4, normed and not."""
BY_PLAIN_TORCH: dict[str, Any] = {
    "gemma": lambda: GemmaConfig(
        **_COMMON, hidden_size=512, intermediate_size=1536, num_attention_heads=4, num_key_value_heads=1, head_dim=256
    ),
    "mistral with a short window": lambda: MistralConfig(**CONFIGS["mistral"]().to_dict() | {"sliding_window": 48}),
}
"""What the fast path leaves to plain torch: heads of 256, and documents longer than the window."""
ADAPTER, WHOLE, FOUR_BITS = "adapter", "every weight", "adapter on weights in 4 bits"
TRAINED = (ADAPTER, WHOLE, FOUR_BITS)
LENGTHS = (300, 57, 611, 1, 128, 2, 700, 33, 190)
"""Of documents in tokens: a tile of attention holds 64."""


def made(kind: str, trained: str, device: torch.device, scratch: Path) -> Any:
    """A model as a run on a GPU holds it. trained: one of TRAINED. scratch: an empty folder."""
    torch.manual_seed(0)
    config = (CONFIGS | BY_PLAIN_TORCH)[kind]()
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    _fill(base, ("norm",), around=1.0, size=0.3)
    _fill(base, ("bias",), around=0.0, size=0.3)  # around one they would hide whom a token attends to
    base.config.use_cache = False
    if trained == WHOLE:
        return base.to(device).requires_grad_(True)
    base.to(torch.bfloat16)
    if trained == ADAPTER:
        model = attach_adapter(base.to(device), _config(kind))
    else:
        base.save_pretrained(scratch)
        model = load_model(_config(str(scratch), load_in_4bit=True), device, bf16=True).train()
    _fill(model, ("lora_",), around=0.0, size=0.02)
    return model


def save(folder: Path, kind: str) -> Path:
    """A folder as a hub download would be; the tokenizer makes one token of a byte."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.bfloat16).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def in_float32(model: Any, kind: str, trained: str, device: torch.device, scratch: Path) -> Any:
    """A copy of what `made` made in plain float32 layers that attend eagerly; weights in 4 bits as they are read."""
    if trained != FOUR_BITS:
        return copy.deepcopy(model).float()
    from bitsandbytes.functional import dequantize_4bit

    plain = made(kind, ADAPTER, device, scratch).float()
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            whole = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = whole.float()
    return plain


def _config(name: str, *, load_in_4bit: bool = False) -> OpenSlothConfig:
    args = FastModelArgs(model_name=name, load_in_4bit=load_in_4bit, use_gradient_checkpointing=False)
    return OpenSlothConfig(data_cache_path="-", fast_model_args=args, lora_args=LoraArgs())


def _fill(model: nn.Module, names: tuple[str, ...], *, around: float, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            values = around + torch.randn(parameter.shape, generator=generator) * size
            parameter.data = values.to(parameter.device, parameter.dtype)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tiny.Documents:
    """Every other one is trained from its very first token on, the others from a third on."""
    generator = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = generator.integers(3, VOCABULARY, length).tolist()
        prompt = length // 3 if i % 2 else 0
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return tiny.Documents(rows)
