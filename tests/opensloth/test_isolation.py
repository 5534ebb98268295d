"""Which architectures are packed, and that the others say why not and train one document a row.

The slow ones take a minute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packing
import pytest
import tiny
import torch
from measured import at_least, at_most
from packing import distance, gradients
from torch import nn

from opensloth import attention
from opensloth.data.batch import padded_batch
from opensloth.isolation import isolate_documents
from opensloth.opensloth_config import FastModelArgs, OpenSlothConfig, TrainingArguments
from opensloth.trainer_factory import create_sft_trainer

LEAKING = {
    "mamba": "state runs on",
    "mamba2": "state runs on",
    "jamba": "state runs on",
    "bamba": "state runs on",
    "falcon_h1": "state runs on",
    "granitemoehybrid": "state runs on",
    "zamba2": "state runs on",
    "qwen3_next": "(linear_attention) whose state runs on",
    "recurrent_gemma": "state runs on",
    "rwkv": "state runs on",
    "minimax": "(linear_attention) that are not known to keep documents apart",
    "lfm2": "(conv) that are not known to keep documents apart",
    "llama4": "(chunked_attention) that are not known to keep documents apart",
    "bloom": "an attention that cannot be replaced",
    "gpt_oss": "GptOssAttention asks for a mask, sinks or non-causal attention",
    "nemotron": "NemotronAttention was given no document_offsets",
    "phimoe": "keeps its window of 8 tokens in a mask",
}
"""Architecture -> words of the reason."""
STRETCHED = ("llama-dynamic", "llama-longrope")


def trained_unpacked(folder: Path, kind: str, rows: list[dict[str, list[int]]]) -> tuple[list[dict[str, Any]], Any]:
    """(events, trainer) of four steps that asked for packing."""
    made = create_sft_trainer(
        tiny.make_model(kind),
        tiny.make_tokenizer(),
        rows,
        OpenSlothConfig(
            data_cache_path="-",
            fast_model_args=FastModelArgs(model_name=kind, max_seq_length=64, full_finetuning=True),
        ),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            optim="adamw_torch",
            learning_rate=1e-2,
            warmup_steps=0,
            report_to="none",
            save_strategy="no",
        ),
    )
    made.train()
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()], made


@pytest.mark.parametrize("kind", LEAKING)
def test_what_leaks_is_refused_with_the_reason(kind: str) -> None:
    model = tiny.make_model(kind)
    before = model.config._attn_implementation
    assert LEAKING[kind] in (isolate_documents(model, 30) or "")
    assert model.config._attn_implementation == before
    assert model.training, "the look at it leaves no trace"


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEAKING)
def test_what_leaks_trains_one_document_a_row(kind: str, tmp_path: Path) -> None:
    rows = tiny.random_rows(8, longest=30)
    before = tiny.make_model(kind).state_dict()
    events, made = trained_unpacked(tmp_path, kind, rows)
    said = [event["message"] for event in events if event["event"] == "note"]
    assert [LEAKING[kind] in message for message in said if "trained without packing" in message] == [True]
    plan = next(event for event in events if event["event"] == "plan")
    assert (plan["packed"], plan["rows"]) == (False, 8)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEAKING)
def test_what_leaks_learns_the_same_from_padded_lines(kind: str) -> None:
    """Not packed it is right: padding on the right changes nothing."""
    model, rows = tiny.make_model(kind).eval(), packing.documents(4)
    _, expected = gradients(model, packing.alone(rows))
    _, found = gradients(model, [padded_batch(rows, np.arange(4), pad_id=0)])
    at_most(
        "architectures that are not packed, padded as alone: gradient of each tensor", distance(found, expected), 1e-4
    )


# --- rotary embeddings that go by the longest position ---------------------------------------------------


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_stretched_embedding_is_packed_up_to_its_original_length(kind: str) -> None:
    model, rows = tiny.make_model(kind).eval(), packing.documents()
    _, expected = gradients(model, packing.alone(rows))
    assert int(rows.lengths.sum()) > tiny.ROPE_LENGTH, "the row is longer than that, its documents are not"
    assert isolate_documents(model, tiny.ROPE_LENGTH) is None
    _, found = gradients(model, [packing.packed(rows)])
    at_most(
        "stretched rotary embeddings, documents within the original length: gradients", distance(found, expected), 1e-5
    )


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_stretched_embedding_is_not_packed_beyond_it(kind: str) -> None:
    reason = isolate_documents(tiny.make_model(kind), tiny.ROPE_LENGTH + 1) or ""
    assert f"as soon as one of them is over {tiny.ROPE_LENGTH} tokens, and the longest has 33" in reason


@pytest.mark.parametrize("kind", STRETCHED)
def test_why_it_is_not(kind: str) -> None:
    """One document over the original length turns the others' frequencies: no packing of both sides can be right."""
    model, rows = tiny.make_model(kind).eval(), packing.documents(longest=60)
    assert min(rows.lengths) <= tiny.ROPE_LENGTH < max(rows.lengths)
    _, expected = gradients(model, packing.alone(rows))
    assert isolate_documents(model, tiny.ROPE_LENGTH) is None
    _, found = gradients(model, [packing.packed(rows)])
    at_least(
        "stretched rotary embeddings, documents on both sides: gradients differ by", distance(found, expected), 1e-3
    )


def test_the_longest_document_that_fits_decides(tmp_path: Path) -> None:
    rows = tiny.random_rows(8, longest=30)
    events, _ = trained_unpacked(tmp_path / "short", "llama-dynamic", rows)
    assert next(event for event in events if event["event"] == "plan")["packed"]
    long_row = {"input_ids": [5] * (tiny.ROPE_LENGTH + 1), "labels": [5] * (tiny.ROPE_LENGTH + 1)}
    events, _ = trained_unpacked(tmp_path / "long", "llama-dynamic", [*rows, long_row])
    assert not next(event for event in events if event["event"] == "plan")["packed"]


# --- the switch ----------------------------------------------------------------------------------------


def test_looking_at_a_model_leaves_random_numbers_and_gradients_alone() -> None:
    model = tiny.make_model("llama")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert isolate_documents(model, 30) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == attention.NAME
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_attention_is_computed_in_the_type_of_autocast(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own is: the kernel for packed documents takes 16 bits, and rotary embeddings leave float32."""
    seen, one_by_one = [], attention._one_by_one
    monkeypatch.setattr(attention, "_one_by_one", lambda *given: seen.append(given[:3]) or one_by_one(*given))
    inputs = [torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    documents = {"document_offsets": torch.tensor([0, 3, 7], dtype=torch.int32), "longest_document": 4}
    exact, _ = attention.packed_attention(nn.Module(), *inputs, None, softcap=softcap, **documents)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = attention.packed_attention(nn.Module(), *inputs, None, softcap=softcap, **documents)
    assert [x.dtype for given in seen for x in given] == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert rounded.dtype == torch.bfloat16
    assert distance({"": rounded.float()}, {"": exact}) < 1e-2
