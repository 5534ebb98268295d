"""A model's sizes from the mapping in its config.json, and whether the fast path knows its architecture. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACT = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families whose parameters are counted exactly: those of the fast path. Others by the same keys, about."""
HEAD_SIZES = frozenset({32, 64, 128})
STEADY_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose turns depend on a token's position alone."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with gated MLPs.

    reason_against_fused: why the fast path does not know the architecture; None when it does.
    window: tokens that attention looks back; None: all. bits: of the linear layers as published: 4, 8 or 16.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    window: int | None
    bits: int
    reason_against_fused: str | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """config: what config.json holds. Raises ValueError with the reason where sizes cannot be told from it."""
        _check(config)
        heads = config["num_attention_heads"]
        family = str(config.get("model_type"))
        head = config.get("head_dim") or config["hidden_size"] // heads
        windowed = config.get("use_sliding_window", family not in ("qwen2", "qwen3"))
        return cls(
            family=family,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head=head,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", family not in EXACT)),
            qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
            window=config.get("sliding_window") if windowed else None,
            bits=_bits(config.get("quantization_config")),
            reason_against_fused=_reason_against_fused(config, head),
        )

    @property
    def attended(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.key_value_heads) * self.head

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normed head by head."""
        return self.family == "qwen3"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's matrices."""
        key_value = self.key_value_heads * self.head
        return {
            "q_proj": (self.attended, self.hidden),
            "k_proj": (key_value, self.hidden),
            "v_proj": (key_value, self.hidden),
            "o_proj": (self.hidden, self.attended),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def layer_linear(self) -> int:
        """Parameters of a layer's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.projections.values())

    @property
    def linear(self) -> int:
        """Parameters of all layers' matrices: what is kept in 4 or 8 bits."""
        return self.layers * self.layer_linear

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All, a head tied to the embedding counted once."""
        vectors = 2 * self.hidden + (self.qkv if self.qkv_bias else 0) + (2 * self.head if self.head_norms else 0)
        ends = self.head_parameters * (1 if self.tied else 2) + self.hidden
        return self.linear + self.layers * vectors + ends


def _check(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type", "this model")
    if "text_config" in config:
        raise ValueError(f"{kind} is more than a language model")
    if any(config.get(name) for name in _EXPERTS):
        raise ValueError(f"{kind} is a mixture of experts")
    for name in _NEEDED:
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"its config.json has no usable {name}")
    for name in ("num_key_value_heads", "head_dim", "sliding_window"):
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"its config.json has no usable {name}")


def _bits(quantization: object) -> int:
    if not quantization:
        return 16
    if isinstance(quantization, Mapping) and quantization.get("quant_method", "bitsandbytes") == "bitsandbytes":
        return 4 if quantization.get("load_in_4bit") else 8
    raise ValueError("its weights are quantised in a way that training does not know")


def _reason_against_precision(quantization: object) -> str | None:
    """Where a list of modules that stay in 16 bits is given, the head has to be in it, and no layer's matrix."""
    skipped = quantization.get("llm_int8_skip_modules") if isinstance(quantization, Mapping) else None
    if not isinstance(skipped, list) or not skipped:
        return None
    last = {str(name).rpartition(".")[2] for name in skipped}
    if "lm_head" not in last:
        return "its head is quantised"
    whole = last & {"self_attn", "mlp"} or any(name.endswith("_proj") for name in last)
    return "only some of its linear layers are in 4 bits" if whole else None


def _reason_against_fused(config: Mapping[str, Any], head: int) -> str | None:
    """Of the architecture alone: the window goes by the documents, and adapters are looked at where they are."""
    family, act = str(config.get("model_type")), str(config.get("hidden_act", "silu"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope)
    if family not in EXACT:
        return f"it does not know {family} models"
    if act != "silu":
        return f"it has no {act} activation"
    if head not in HEAD_SIZES:
        return f"it has no heads of {head}"
    if kind not in STEADY_ROPES:
        return f"it has no {kind} rotary embedding"
    if config.get("attention_dropout"):
        return "it has no attention dropout"
    if config.get("mlp_bias") or config.get("attention_bias"):
        return "it has no biases behind attention and MLP"
    return _reason_against_precision(config.get("quantization_config"))
