"""What every leg starts from: a model of a published shape with random weights, an adapter, and documents.

Speed does not depend on the values of weights. The adapter's B is not zero, so that every gradient can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.legs import WARM, Leg

MEDIAN, SPREAD = 350, 0.8
"""Of the documents' lengths in tokens, which are log-normal."""
FIRST_ID, MOST_IDS = 300, 150_000
SPARE_STEPS = 6
GATE_SHARE = 0.7
"""Of the gate's documents: a leg that trains on what is no target must fail it."""
MOST_DOCUMENTS = 6000
"""More steps than these last for go over them again."""
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 1024, "tie_word_embeddings": True,
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
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False, "initializer_range": 0.01,
    },
}  # fmt: skip
"""Qwen2.5's, as published; `tiny` is for trying the benchmark itself. 7B's layers are four times as wide as 0.5B's:
weights half as large make its products as large; else rounding to 16 bits alone moves the gradient's cosine to 0.996.
"""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Assets:
    """Folders of the model and its adapter; files of documents, one JSON object a line."""

    model: Path
    adapter: Path
    train: Path
    evaluation: Path
    gate: Path


def home(folder: Path, shape: str) -> Path:
    """A model of other sizes, or of other random weights, lies elsewhere."""
    made_of = hashlib.sha256(json.dumps(SHAPES[shape], sort_keys=True).encode()).hexdigest()
    return folder / f"{shape}-{made_of[:8]}"


def place(folder: Path, leg: Leg, timed: int) -> Assets:
    """Where they lie for `leg` with `timed` steps; nothing is written."""
    kind = f"{leg.row}-{leg.length or 'mixed'}-{leg.target_share:g}"
    shape = home(folder, leg.shape)
    documents = _count(leg, timed)
    return Assets(
        shape / "model",
        shape / "adapter",
        shape / f"train-{kind}-{documents}.jsonl",
        shape / f"evaluation-{kind}.jsonl",
        shape / "gate.jsonl",
    )


def write_documents(assets: Assets, leg: Leg, timed: int) -> None:
    """What is not there yet."""
    vocabulary = SHAPES[leg.shape]["vocab_size"]
    _write(assets.train, _lengths(_count(leg, timed), leg, seed=0), leg.target_share, vocabulary, seed=1)
    _write(assets.evaluation, _lengths(40, leg, seed=2), leg.target_share, vocabulary, seed=3)
    _write(assets.gate, [300, 57, 611, 128, 700, 33, 900], GATE_SHARE, vocabulary, seed=4)


def read(path: Path) -> list[dict[str, list[int]]]:
    """Documents: {"input_ids", "labels"}; labels are -100 where a token is no target."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _count(leg: Leg, timed: int) -> int:
    mean = leg.length or MEDIAN * math.exp(SPREAD**2 / 2)
    return max(50, min(MOST_DOCUMENTS, round((WARM + timed + SPARE_STEPS) * leg.rows * leg.row / mean)))


def make_model(assets: Assets, shape: str) -> None:
    """The model, its tokenizer and an adapter, unless they are there."""
    if not (assets.adapter / "adapter_config.json").exists():
        _make_model(assets, shape)


def random_model(shape: str, dtype: Any) -> Any:
    """On the GPU, if there is one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(dtype)
        config = Qwen2Config(max_position_embeddings=32_768, rope_theta=1e6, **SHAPES[shape])
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model


def _make_model(assets: Assets, shape: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model = random_model(shape, torch.bfloat16)
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


def _lengths(count: int, leg: Leg, seed: int) -> list[int]:
    draw = random.Random(seed)
    if leg.length:
        return [leg.length] * count
    return [max(16, min(leg.row, round(draw.lognormvariate(math.log(MEDIAN), SPREAD)))) for _ in range(count)]


def _write(path: Path, lengths: list[int], target_share: float, vocabulary: int, seed: int) -> None:
    """The last `target_share` of a document are its targets, as an answer's tokens are."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    last = min(vocabulary, MOST_IDS)
    new = path.with_suffix(".new")
    with new.open("w") as stream:
        for length in lengths:
            ids = [draw.randrange(FIRST_ID, last) for _ in range(length)]
            ignored = round(length * (1 - target_share))
            stream.write(json.dumps({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]}) + "\n")
    new.rename(path)
