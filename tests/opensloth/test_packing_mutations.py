"""What would make packing wrong, done on purpose: the comparison with single documents must see each of it.

Also on transformers' own packed path, which isolates by positions alone and stops doing so in silence.
"""

from __future__ import annotations

from typing import Any

import packing
import pytest
import tiny
import torch
from measured import at_least, at_most
from packing import LONGEST, distance, gradients, largest_error, losses
from transformers import DynamicCache

from opensloth.attention import packed_attention
from opensloth.data.batch import Batch
from opensloth.isolation import isolate_documents

BOUND = 1e-5
"""What packed and single documents may differ by; an error must be at least a hundred times as large."""
SEEN = 100 * BOUND


@pytest.mark.parametrize("trained", ["adapter", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("error", packing.LEAKS)
def test_an_error_in_the_boundaries_is_seen(error: str, kind: str, trained: str) -> None:
    model = (packing.adapted(kind) if trained == "adapter" else tiny.make_model(kind)).eval()
    rows = packing.documents()
    _, expected = gradients(model, packing.alone(rows))
    assert isolate_documents(model, LONGEST) is None
    _, found = gradients(model, [packing.LEAKS[error](packing.packed(rows))])
    at_least(f"{error}: gradients differ by", distance(found, expected), SEEN)


def test_dropped_offsets_are_refused() -> None:
    model = tiny.make_model("llama").eval()
    assert isolate_documents(model, LONGEST) is None
    with pytest.raises(ValueError, match="LlamaAttention was given no document_offsets"):
        gradients(model, [packing.without_offsets(packing.packed(packing.documents()))])


# --- positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama-dynamic", "llama-longrope"])
def test_positions_that_run_on_are_seen_in_the_loss(kind: str) -> None:
    """Learned positions, and rotary ones that are stretched when a position passes the original length."""
    model = tiny.make_model(kind).eval()
    rows = packing.documents()
    expected = losses(model, packing.alone(rows))
    assert isolate_documents(model, LONGEST) is None
    batch = packing.packed(rows)
    assert int(batch.inputs["document_offsets"][-1]) > tiny.ROPE_LENGTH > LONGEST
    at_most(
        "positions that restart, learned or stretched: loss of each document",
        largest_error(losses(model, [batch]), expected),
        BOUND,
    )
    running_on = losses(model, [packing.positions_running_on(batch)])
    at_least(
        "positions that run on, learned or stretched: loss of the worst document differs by",
        largest_error(running_on, expected),
        SEEN,
    )


def test_positions_restart_where_the_loss_could_not_see_it() -> None:
    """Plain rotary positions are relative: with isolated attention only the positions themselves tell."""
    rows = packing.documents()
    batch = packing.packed(rows)
    expected = [position for length in rows.lengths for position in range(length)]
    assert batch.inputs["position_ids"][0].tolist() == expected
    model = tiny.make_model("llama").eval()
    assert isolate_documents(model, LONGEST) is None
    running_on = losses(model, [packing.positions_running_on(batch)])
    assert largest_error(running_on, losses(model, [batch])) < BOUND, "then the loss can see it: test it above"


# --- a cache, a mask: transformers' own path ----------------------------------------------------------


def _a_mask_of_ones(batch: Batch) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(batch.inputs["input_ids"])}


def _a_cache_in_use(_: Batch) -> dict[str, Any]:
    return {"use_cache": True}


def _a_cache_handed_over(_: Batch) -> dict[str, Any]:
    return {"past_key_values": DynamicCache(), "use_cache": True}


ADDED = {
    "a mask of ones": _a_mask_of_ones,
    "a cache in use": _a_cache_in_use,
    "a cache handed over": _a_cache_handed_over,
}


def gradient_of(model: Any, batch: Batch, **added: Any) -> dict[str, torch.Tensor]:
    """Of the summed loss, by the model's forward pass alone."""
    model.zero_grad()
    logits = model(**{"use_cache": False} | batch.inputs | added).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.predictors], batch.targets, reduction="sum")
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("error", ADDED)
def test_transformers_own_packed_path_leaks(error: str, backend: str) -> None:
    """Why it is not what we train by: it is right until a mask or a cache is there, and then says nothing."""
    model = tiny.make_model("llama").eval()
    model.set_attn_implementation(backend)
    batch = packing.without_offsets(packing.packed(packing.documents()))
    singles = [gradient_of(model, single) for single in packing.alone(packing.documents())]
    expected = {name: torch.stack([single[name] for single in singles]).sum(0) for name in singles[0]}
    at_most("transformers' own packed path, untouched: gradients", distance(gradient_of(model, batch), expected), BOUND)
    found = gradient_of(model, batch, **ADDED[error](batch))
    at_least(f"{error} on transformers' own packed path: gradients differ by", distance(found, expected), SEEN)


@pytest.mark.parametrize("error", ADDED)
def test_ours_is_immune_to_what_makes_theirs_leak(error: str) -> None:
    model = tiny.make_model("llama").eval()
    assert isolate_documents(model, LONGEST) is None
    batch = packing.packed(packing.documents())
    expected = gradient_of(model, batch)
    found = gradient_of(model, batch, **ADDED[error](batch))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_keys_from_a_cache_are_refused() -> None:
    model = tiny.make_model("llama").eval()
    assert isolate_documents(model, LONGEST) is None
    inputs = packing.packed(packing.documents()).inputs
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="one line of documents and no cache"):
        model(**inputs, use_cache=True, past_key_values=cache)


# --- what the attention itself refuses -----------------------------------------------------------------


def attend(tokens: int = 6, *, lines: int = 1, offsets: tuple[int, ...] = (0, 2, 6), **options: Any) -> Any:
    module = torch.nn.Module()
    query = torch.randn(lines, 2, tokens, 4)
    bounds = torch.tensor(offsets, dtype=torch.int32)
    mask = options.pop("mask", None)
    return packed_attention(module, query, query, query, mask, document_offsets=bounds, longest_document=4, **options)


def test_attention_takes_what_it_can_isolate() -> None:
    attended = attend()[0]
    assert attended.shape == (1, 6, 2, 4)
    assert attended.is_contiguous(), "some models view it"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"lines": 2}, ValueError, "one line of documents"),
        ({"offsets": (0, 2, 5)}, ValueError, "go from 0 to 5, the tokens from 0 to 6"),
        ({"offsets": (1, 6)}, ValueError, "go from 1 to 6"),
        ({"mask": torch.ones(1, 1, 6, 6)}, NotImplementedError, "asks for a mask"),
        ({"s_aux": torch.ones(2)}, NotImplementedError, "sinks"),
    ],
)
def test_attention_refuses_what_it_would_get_wrong(call: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attend(**call)
