"""What every leg starts from: a model of a published shape with random weights, an adapter, and documents.

Speed does not depend on the values of weights. The adapter's B is not zero, so that every gradient can be compared.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROW = 4096
WARM = 24
"""Steps of every leg before those that are timed."""
MEDIAN, SPREAD = 350, 0.8
"""Of the documents' lengths in tokens, which are log-normal."""
FIRST_ID, LAST_ID = 300, 150_000
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Qwen2.5's, as published; `tiny` is for trying the benchmark itself."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Assets:
    """Folders of the model and its adapter; files of documents, one JSON object a line."""

    model: Path
    adapter: Path
    train: Path
    evaluation: Path
    gate: Path


def make(folder: Path, shape: str, documents: int, row: int = ROW, one_length: int | None = None) -> Assets:
    """Write what is not there yet. row: tokens of a row. one_length: of every document; None: log-normal."""
    kind = f"{row}-{one_length or 'mixed'}"
    assets = Assets(
        folder / shape,
        folder / f"{shape}-adapter",
        folder / f"train-{kind}-{documents}.jsonl",
        folder / f"evaluation-{kind}.jsonl",
        folder / "gate.jsonl",
    )
    if not (assets.adapter / "adapter_config.json").exists():
        _make_model(assets, shape)
    _write(assets.train, _lengths(documents, row, one_length, seed=0), seed=1)
    _write(assets.evaluation, _lengths(40, row, one_length, seed=2), seed=3)
    _write(assets.gate, [300, 57, 611, 128, 700, 33, 900], seed=4)
    return assets


def read(path: Path) -> list[list[int]]:
    """The token ids of every document; all of them are targets."""
    return [json.loads(line)["input_ids"] for line in path.read_text().splitlines()]


def _make_model(assets: Assets, shape: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        config = Qwen2Config(max_position_embeddings=32_768, rope_theta=1e6, **SHAPES[shape])
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(assets.model)
    _make_tokenizer().save_pretrained(assets.model)
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(assets.adapter)


def _make_tokenizer() -> Any:
    """One token a byte: legs are given token ids, and ask a tokenizer for its special tokens only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<|endoftext|>", "<|pad|>")
    words = {token: i for i, token in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1], model_max_length=32_768
    )


def _lengths(count: int, row: int, one_length: int | None, seed: int) -> list[int]:
    draw = random.Random(seed)
    if one_length:
        return [one_length] * count
    return [max(16, min(row, round(draw.lognormvariate(math.log(MEDIAN), SPREAD)))) for _ in range(count)]


def _write(path: Path, lengths: list[int], seed: int) -> None:
    if path.exists():
        return
    draw = random.Random(seed)
    with path.open("w") as stream:
        for length in lengths:
            ids = [draw.randrange(FIRST_ID, LAST_ID) for _ in range(length)]
            stream.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
