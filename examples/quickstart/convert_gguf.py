"""Turn a Llama model in a GGUF file into a folder that transformers loads.

GGUF keeps weights in blocks of a few bits under its own names, with the rows of the query and key projections
in another order, and the tokenizer as plain lists. What is written here are ordinary weights in bfloat16.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerBase

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a weight: transformers' name."""
CONTROL = 3
"""GGUF's type of a token that is never made from text, such as <|im_end|>."""


def convert(file: Path, folder: Path) -> None:
    """Write weights, config and tokenizer of the Llama model in `file` to the new folder `folder`."""
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = GGUFReader(file)
    config = llama_config(reader)
    with torch.device("meta"):  # the weights come from the file: none need to be made up first
        model = LlamaForCausalLM(config)
    # The output head is the embedding, stored once: that is why it is "missing" here.
    model.load_state_dict(weights(reader, config), assign=True, strict=False)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    tokenizer(reader).save_pretrained(folder)


def llama_config(reader: GGUFReader) -> LlamaConfig:
    """The model's shape and its special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Every weight under transformers' name, in bfloat16.

    bfloat16 is what the model was published in, and half of float32's 540 MB; rounding to it is far finer than
    the 4 bits that these weights come from.
    """
    import torch
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for tensor in reader.tensors:
        matched = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if matched is None:
            raise ValueError(f"{tensor.name}: not a weight of a Llama model")
        layer, name = matched.groups()
        values = dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            # [head, pair, half, in] -> [head, half, pair, in]: GGUF rotates neighbours, transformers halves.
            pairs = values.reshape(heads[name], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        prefix = "" if layer is None else f"model.layers.{layer}."
        found[f"{prefix}{NAMES[name]}.weight"] = torch.tensor(values, dtype=torch.bfloat16)
    return found


def tokenizer(reader: GGUFReader) -> PreTrainedTokenizerBase:
    """SmolLM2's byte-level BPE: digits stand alone, and <|im_end|> ends a turn."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        chat_template=_field(reader, "tokenizer.chat_template"),
    )


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()
