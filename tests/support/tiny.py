"""Small models and tokenizers, made on the spot: real architectures with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL)

_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2, state_size=8
    ),
}


def make_model(kind: str = "llama", seed: int = 0) -> Any:
    """A model of two layers with random float32 weights, larger than the usual initialisation so that leaks show."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.initializer_range = 0.2
    capped = getattr(config, "attn_logit_softcapping", None)  # SDPA would drop the cap
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special tokens; a chat template of the ChatML kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    return fast


def save(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A folder as a hub download would be."""
    make_model(kind, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Documents:
    """Rows in memory, as training reads prepared ones."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self._rows = rows
        self.lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int32)
        self.targets = np.array([sum(i != -100 for i in row["labels"][1:]) for row in rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        return np.array(row["input_ids"], dtype=np.int32), np.array(row["labels"], dtype=np.int32)

    def epoch_documents(self) -> Any:
        return np.arange(len(self._rows))


def random_rows(count: int, *, longest: int = 40, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows with input_ids and labels: the first third of each is prompt, the rest are targets."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in generator.integers(6, longest + 1, count):
        ids = generator.integers(len(SPECIAL), VOCABULARY, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows
