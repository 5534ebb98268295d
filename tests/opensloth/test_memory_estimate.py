"""The arithmetic of memory, against what was measured on an H100 and against the tensors that the fast path makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from keepings import ALL_KEPT, EVERY
from peft import LoraConfig, get_peft_model
from qwen_shapes import QWEN
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from opensloth.fused import keeping as choice
from opensloth.fused.model import FusedModel
from opensloth.fused.operations import Documents
from opensloth.fused.support import reason_against_model
from opensloth.launch import machine
from opensloth.memory_estimate import (
    GIB,
    IN_HOST,
    Batch,
    Keep,
    Keeping,
    Method,
    added_weights,
    estimate,
    offloaded_embeddings,
    to_come,
    trained_parameters,
)
from opensloth.model import base_of
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS

DOC = Path(__file__).parents[2] / "docs" / "memory.md"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
OPTIONAL_KEYS = (
    "head_dim", "sliding_window", "use_sliding_window", "hidden_act", "rope_scaling", "rope_parameters",
    "attention_bias", "attention_dropout", "mlp_bias", "quantization_config", "num_experts", "text_config",
)  # fmt: skip
LORA = Method(8, LORA_TARGETS, 16, 8, fused=True)
FULL = Method(0, (), 16, 8, fused=True)
FULL_8_BIT = Method(0, (), 16, 2, fused=True)
FOUR_BITS = dataclasses.replace(LORA, bits=4)


def qwen(size: str) -> ModelShape:
    return ModelShape.from_config(QWEN[size])


@pytest.mark.parametrize(
    ("size", "parameters"), [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)]
)
def test_parameters_of_published_models(size: str, parameters: int) -> None:
    assert qwen(size).parameters == parameters


MEASURED = [
    ("0.5B, 2 rows", "0.5b", LORA, 8192, 1.0, Keep.ALL, 7.2),
    ("0.5B, 2 rows", "0.5b", LORA, 8192, 1.0, Keep.INPUTS, 1.8),
    ("0.5B, 2 rows", "0.5b", LORA, 8192, 1.0, Keep.HOST_INPUTS, 1.5),
    ("0.5B, 8 rows", "0.5b", LORA, 32_768, 1.0, Keep.ALL, 25.0),
    ("0.5B, 8 rows, 40 % of the tokens are targets, on an H200", "0.5b", LORA, 32_768, 0.4, Keep.ALL, 24.4),
    ("0.5B, 1 row of 16,384", "0.5b", LORA, 16_384, 1.0, Keep.ALL, 13.1),
    ("0.5B, every weight trained, 2 rows", "0.5b", FULL, 8192, 1.0, Keep.INPUTS, 9.0),
    ("0.5B, every weight trained, 2 rows", "0.5b", FULL, 8192, 1.0, Keep.ALL, 14.3),
    ("the same, AdamW in 8 bits", "0.5b", FULL_8_BIT, 8192, 1.0, Keep.INPUTS, 6.5),
    ("the same, AdamW in 8 bits", "0.5b", FULL_8_BIT, 8192, 1.0, Keep.ALL, 11.5),
    ("1.5B, 2 rows", "1.5b", LORA, 8192, 1.0, Keep.INPUTS, 4.5),
    ("1.5B, 2 rows", "1.5b", LORA, 8192, 1.0, Keep.ALL, 15.5),
    ("1.5B, 2 rows, weights in 4 bits", "1.5b", FOUR_BITS, 8192, 1.0, Keep.ALL, 13.8),
    ("1.5B, every weight trained, 2 rows", "1.5b", FULL, 8192, 1.0, Keep.ALL, 38.1),
    ("the same, AdamW in 8 bits", "1.5b", FULL_8_BIT, 8192, 1.0, Keep.ALL, 29.5),
    ("7B, 2 rows", "7b", LORA, 8192, 1.0, Keep.ALL, 41.2),
    ("7B, 2 rows", "7b", LORA, 8192, 1.0, Keep.INPUTS, 17.7),
    ("7B, 2 rows", "7b", LORA, 8192, 1.0, Keep.HOST, 15.1),
    ("7B, 2 rows", "7b", LORA, 8192, 1.0, Keep.HOST_INPUTS, 14.5),
    ("7B, every weight trained, 2 rows, on an H200", "7b", FULL, 8192, 1.0, Keep.INPUTS, 130.0),
    ("the same, AdamW in 8 bits", "7b", FULL_8_BIT, 8192, 1.0, Keep.ALL, 110.7),
]
"""GiB that torch.cuda.max_memory_allocated gave on an H100 (docs/performance.md): fused AdamW, bfloat16."""
WITH_MLPS = [(1, 16.1, True), (5, 18.4, True), (6, 19.0, True), (2, 15.7, False), (7, 18.6, False)]
"""Of 7B, HOST: how many layers' MLPs stayed, GiB, whether the embeddings did too."""


@pytest.mark.parametrize(("title", "size", "method", "tokens", "targets", "keep", "gib"), MEASURED)
def test_what_was_measured_is_what_is_predicted(
    title: str, size: str, method: Method, tokens: int, targets: float, keep: Keep, gib: float
) -> None:
    found = estimate(qwen(size), method, Batch(tokens, round(tokens * targets)), Keeping(keep)).peak / GIB
    assert found == pytest.approx(gib, abs=max(0.25, 0.003 * gib))
    row = f"| {title} | {keep.value} | {gib} | {found:.1f} |"
    assert row in DOC.read_text(), f"docs/memory.md lacks\n{row}"


@pytest.mark.parametrize(("whole", "gib", "with_table"), WITH_MLPS)
def test_mlps_that_stay(whole: int, gib: float, with_table: bool) -> None:
    found = estimate(qwen("7b"), LORA, Batch(8192, 8192), Keeping(Keep.HOST, whole)).peak
    table = offloaded_embeddings(qwen("7b"), LORA, Keep.HOST) if with_table else 0
    assert (found + table) / GIB == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keeping", [k for k in EVERY if k.keep not in IN_HOST], ids=str)
def test_kept_bytes_are_those_of_the_tensors_that_are_kept(family: str, keeping: Keeping) -> None:
    """In bfloat16 on the CPU, tensor by tensor."""
    base = tiny_model(family)
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"))
    fused = FusedModel(base_of(adapted), keeping=keeping)
    tokens = 64
    x = torch.zeros(tokens, base.config.hidden_size, dtype=torch.bfloat16)
    offsets = torch.tensor([0, tokens])
    tiles = torch.tensor([[0, 0, tokens]], dtype=torch.int32)
    angles = torch.ones(tokens, base.config.head_dim // 2)
    documents = Documents(offsets.tolist(), tiles, angles, angles)
    kept = []
    for layer in fused._layers:
        x, of_layer = layer.forward(x, documents)
        kept.append(of_layer)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for one in kept for t in tensors_in(one)}
    method = Method(8, LORA_TARGETS, 16, 8, fused=True)
    expected = estimate(shape_of(base), method, Batch(tokens, tokens), keeping).kept
    assert sum(storages.values()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_what_is_trained_are_those_of_the_model(family: str) -> None:
    base = tiny_model(family)
    shape = shape_of(base)
    assert shape.parameters == sum(p.numel() for p in base.parameters())
    loaded = sum(p.numel() * p.element_size() for p in base.parameters())
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    method = Method(8, ("q_proj", "down_proj"), 16, 8, fused=True)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained_parameters(shape, method) == trained
    fused = FusedModel(base_of(adapted), keeping=ALL_KEPT)
    buffers = sum(p._buffer.numel() * p._buffer.element_size() for p in fused._projections)
    taken_over = 2 * shape.linear
    found = estimate(shape, method, Batch(8, 8), ALL_KEPT)
    assert found.weights == loaded - taken_over + buffers
    assert to_come(shape, method) == trained * (4 + 8) + buffers - taken_over


@pytest.mark.parametrize("family", sorted(set(tiny.CONFIGS) & {*FAMILIES, "gemma", "gemma2", "mixtral", "gpt2"}))
@pytest.mark.parametrize(
    "change", [{}, {"hidden_act": "gelu"}, {"attention_dropout": 0.1}, {"attention_bias": True}, {"head_dim": 128}]
)
def test_the_fast_path_is_foreseen(family: str, change: dict[str, Any]) -> None:
    """From the configuration alone, with the reason that the loaded model would give."""
    config = tiny.CONFIGS[family]()
    for key, value in change.items():
        setattr(config, key, value)
    try:
        found = ModelShape.from_config(config.to_dict()).reason_against_fused
    except ValueError:
        assert family in ("mixtral", "gpt2")
        return
    model = torch.nn.Module()
    model.config = config  # type: ignore[assignment]
    assert found == reason_against_model(model, longest_document=8)  # a window of 8 is looked at elsewhere


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "no usable hidden_size"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "qwen2_vl", "text_config": {}}, "more than a language model"),
        (QWEN["7b"] | {"num_hidden_layers": "28"}, "no usable num_hidden_layers"),
        (QWEN["7b"] | {"head_dim": -128}, "no usable head_dim"),
        (QWEN["7b"] | {"quantization_config": {"quant_method": "gptq"}}, "quantised in a way"),
    ],
)
def test_sizes_that_cannot_be_told(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelShape.from_config(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "type"]), inner),
)


@given(st.dictionaries(st.sampled_from([*QWEN["7b"], *OPTIONAL_KEYS]), JSON, min_size=1))
def test_whatever_a_config_holds_there_is_an_estimate_or_a_reason(changes: dict[str, Any]) -> None:
    try:
        shape = ModelShape.from_config(QWEN["7b"] | changes)
    except ValueError:
        return
    for method in (LORA, FULL, dataclasses.replace(LORA, fused=False, bits=4)):
        for keeping in EVERY:
            assert estimate(shape, method, Batch(8192, 8192), keeping).peak > 0


def test_four_bits_take_a_quarter_and_one_layer_whole() -> None:
    whole, four = (
        estimate(qwen("7b"), dataclasses.replace(LORA, bits=bits), Batch(8192, 8192), Keeping(Keep.HOST)).weights
        for bits in (16, 4)
    )
    shape = qwen("7b")
    assert whole - four == pytest.approx((2 - 0.516) * shape.linear - 2 * shape.layer_linear, rel=0.001)


def test_weights_in_four_bits_are_those_of_the_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map={"": "cpu"})
    shape = shape_of(model)
    assert shape.bits == 4
    loaded = 0
    for parameter in model.parameters():
        loaded += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            loaded += state.absmax.nbytes + state.state2.absmax.nbytes
    method = dataclasses.replace(LORA, bits=4)
    expected = estimate(shape, method, Batch(8, 8), ALL_KEPT).weights - added_weights(shape, method)
    assert loaded == pytest.approx(expected, rel=0.001)


def test_more_never_takes_less() -> None:
    for size in QWEN:
        for method in (LORA, FULL, dataclasses.replace(LORA, fused=False)):
            sizes = [estimate(qwen(size), method, Batch(n, n), ALL_KEPT).peak for n in (1024, 4096, 65_536)]
            assert sizes == sorted(sizes)
    ways = [Keeping(Keep.ALL), *(Keeping(keep, n) for keep in (Keep.INPUTS, *IN_HOST) for n in range(27, -1, -1))]
    for keep in (Keep.INPUTS, *IN_HOST):
        fewer = [way for way in ways if way.keep in (Keep.ALL, keep)]
        peaks = [estimate(qwen("7b"), LORA, Batch(8192, 8192), way).peak for way in fewer]
        assert peaks == sorted(peaks, reverse=True)


def config_of_7b() -> Any:
    config = tiny.CONFIGS["qwen2"]()
    for key, value in QWEN["7b"].items():
        setattr(config, key, value)
    return config


def test_what_is_kept_is_as_much_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """7B in 16 bits, two rows: what is free when the weights have been loaded."""
    monkeypatch.setattr(machine, "usable_memory", lambda: None)
    config = config_of_7b()

    def roomiest(gib: int, *, rank: int = 8, moments: float = 8, **given: Any) -> Keeping:
        return choice.roomiest(config, 8192, gib * GIB, rank=rank, moments=moments, **given)

    kept = [roomiest(gib) for gib in (64, 20, 4, 1)]
    assert kept == [ALL_KEPT, Keeping(Keep.INPUTS, 17), Keeping(Keep.INPUTS, 1), Keeping(Keep.HOST_INPUTS)]
    known = 700e12, 56e9  # as an H100
    kept = [roomiest(gib, speeds=lambda: known) for gib in (64, 12, 4, 0)]
    assert kept == [ALL_KEPT, Keeping(Keep.HOST, 18), Keeping(Keep.HOST, 5), Keeping(Keep.HOST_INPUTS)]
    slower = 700e12, 40e9
    assert roomiest(20, speeds=lambda: slower) == Keeping(Keep.INPUTS, 17)
    of_every_weight = [roomiest(gib, rank=0, moments=moments) for gib, moments in ((64, 8), (110, 8), (110, 2))]
    assert of_every_weight == [Keeping(Keep.HOST_INPUTS), Keeping(Keep.INPUTS, 9), ALL_KEPT], "moments take room"


def test_of_host_memory_a_quarter_is_taken_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all processes of a node; and torch rounds up to powers of two what is pinned, here 239 MiB a layer and
    1.02 GiB of embeddings.
    """
    config = config_of_7b()
    pinned = (28 * 256 << 20) + (2 << 30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    enough = Keeping(Keep.HOST, 1), Keeping(Keep.HOST, 2)
    scarce = Keeping(Keep.HOST_INPUTS), Keeping(Keep.HOST_INPUTS, 1)
    for usable, (asked, fitting) in ((None, enough), (8 * pinned, enough), (8 * pinned - 1, scarce)):
        monkeypatch.setattr(machine, "usable_memory", lambda usable=usable: usable)
        ways = ((64, True), (64, False), (2, False))
        found = [choice.roomiest(config, 8192, gib * GIB, rank=8, moments=8, in_host=in_host) for gib, in_host in ways]
        assert found == [asked, ALL_KEPT, fitting]


def test_embeddings_that_stay_take_the_memory_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of_7b()
    found = []
    for usable in (8 << 30, 4 << 30):  # a quarter of it: 2 GiB, as much as embeddings take once rounded up, and less
        monkeypatch.setattr(machine, "usable_memory", lambda usable=usable: usable)
        found.append(choice.roomiest(config, 8192, 3 * GIB, rank=8, moments=8))
    assert [one.keep for one in found] == [Keep.HOST_INPUTS] * 2
    assert found[0].whole > found[1].whole


def tiny_model(family: str) -> Any:
    config = tiny.CONFIGS[family]()
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 768, 64
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).requires_grad_(False)


def shape_of(model: Any) -> ModelShape:
    return ModelShape.from_config(model.config.to_dict())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors_in(one)
