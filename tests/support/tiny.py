"""Small models and tokenizers, made on the spot: real architectures with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    Zamba2Config,
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
_EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
_LINEAR_THEN_FULL = dict(layer_types=["linear_attention", "full_attention"])
_ROPE = dict(rope_theta=10000.0, factor=4.0)
ROPE_LENGTH = 32
"""Original length of the models whose rotary embedding is stretched."""
_LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 5.0])
_STRETCHED = dict(original_max_position_embeddings=ROPE_LENGTH)
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=8),
    "gemma": lambda: GemmaConfig(**_SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
    # Rotary embeddings that are stretched, "dynamic" and "longrope" by the longest position they are given.
    "llama-dynamic": lambda: LlamaConfig(
        **_SHAPE | {"max_position_embeddings": ROPE_LENGTH}, rope_parameters=_ROPE | {"rope_type": "dynamic"}
    ),
    "llama-longrope": lambda: LlamaConfig(**_SHAPE, rope_parameters=_ROPE | _LONGROPE | _STRETCHED),
    "llama-yarn": lambda: LlamaConfig(**_SHAPE, rope_parameters=_ROPE | _STRETCHED | {"rope_type": "yarn"}),
    # Architectures that cannot be packed: running state, convolutions, chunks, linear attention, ...
    "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": lambda: Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2, state_size=8
    ),
    "jamba": lambda: JambaConfig(
        **_SHAPE,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: BambaConfig(**_SHAPE, **_MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": lambda: FalconH1Config(**_SHAPE, **_MAMBA2, mamba_d_ssm=64),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **_SHAPE, **_MAMBA2, **_EXPERTS, **_LINEAR_THEN_FULL, shared_intermediate_size=32
    ),
    "zamba2": lambda: Zamba2Config(
        **_SHAPE | {"num_key_value_heads": 4},
        layers_block_type=["mamba", "hybrid"],
        mamba_headdim=8,
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_d_state=8,
        attention_head_dim=16,
        num_mem_blocks=1,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **_SHAPE,
        **_LINEAR_THEN_FULL,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "minimax": lambda: MiniMaxConfig(**_SHAPE, **_EXPERTS, **_LINEAR_THEN_FULL, head_dim=8, block_size=16),
    "lfm2": lambda: Lfm2Config(**_SHAPE, layer_types=["conv", "full_attention"]),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        lru_width=32,
        attention_window_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "rwkv": lambda: RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=512
    ),
    "llama4": lambda: Llama4TextConfig(
        **_SHAPE, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=16
    ),
    # ... and attention that this package has not: position biases, sinks, no offsets, a window by mask alone.
    "bloom": lambda: BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gpt_oss": lambda: GptOssConfig(**_SHAPE, **_EXPERTS, head_dim=8, rope_parameters=_ROPE | {"rope_type": "default"}),
    "nemotron": lambda: NemotronConfig(**_SHAPE),
    "phimoe": lambda: PhimoeConfig(**_SHAPE, num_local_experts=2, num_experts_per_tok=2, sliding_window=8),
}


def make_model(kind: str = "llama", seed: int = 0, *, scale: float = 0.2) -> Any:
    """A model of two layers with random float32 weights, larger than the usual 0.02 so that leaks show."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.initializer_range = scale
    capped = getattr(config, "attn_logit_softcapping", None)  # SDPA would drop the cap
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None)


def set_dropout(model: Any, dropout: float) -> None:
    """Wherever the model has one: its layers have read the config by now."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout


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
