"""The fast path computes what autograd does: on the CPU, in float32, with the plain versions of its kernels."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eight_bit
import numpy as np
import pytest
import tiny
import torch
from keepings import ALL_KEPT, every_keeping
from measured import at_most
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, modeling_utils

from opensloth import attention, engine
from opensloth.arithmetic import BatchShape
from opensloth.data.batch import Batch, flat_batch
from opensloth.data.order import RowOrder
from opensloth.data.training_data import make_rows
from opensloth.dist import World
from opensloth.errors import ConfigError
from opensloth.flops import work_of
from opensloth.fused import long_documents, operations
from opensloth.fused.inputs import ROOM_STEP, TOKENS, inputs_of, padded_tokens
from opensloth.fused.model import FusedModel
from opensloth.fused.objective import FusedObjective
from opensloth.fused.offload import Offload
from opensloth.fused.projection import Projection
from opensloth.fused.support import reason_against, reason_against_model
from opensloth.launch import machine
from opensloth.memory_estimate import IN_HOST, Keep, Keeping, Method, offloaded_bytes
from opensloth.model import attach_adapter, base_of, load_model, trainable_parameters
from opensloth.model_shape import ModelShape
from opensloth.opensloth_config import LORA_TARGETS, FastModelArgs, LoraArgs, OpenSlothConfig
from opensloth.step import Objective, accumulate_gradients

ALONE = World(0, 0, 1, torch.device("cpu"))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
BOUND = 1e-5
LONG_DOCUMENT = 100
"""Tokens: some of `documents` have more."""


def config(**settings: Any) -> OpenSlothConfig:
    targets = settings.pop("targets", ALL)
    lora = LoraArgs(r=4, target_modules=targets, **{k: settings.pop(k) for k in ("lora_dropout",) if k in settings})
    return OpenSlothConfig(
        data_cache_path="-", fast_model_args=FastModelArgs(model_name="-"), lora_args=lora, **settings
    )


def model_of(kind: str, **settings: Any) -> Any:
    """Norms, biases and both halves of the adapters hold random numbers: none can be left out unseen."""
    return _filled(attach_adapter(tiny.make_model(kind), config(**settings)))


def _filled(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        elif "bias" in name or "norm" in name:
            parameter.data = 1 + torch.randn(parameter.shape, generator=generator) * 0.3
    attention.register()
    base_of(model).set_attn_implementation(attention.NAME)
    return model


def four_bit_model(kind: str, folder: Path, *, storage: str = "uint8", skipped: Any = None, **settings: Any) -> Any:
    """Its layers quantised twice over, as the product loads them, but computing in float32."""
    tiny.make_model(kind).save_pretrained(folder)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skipped,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map={"": "cpu"})
    return _filled(attach_adapter(base, config(**settings)).train())  # evaluating on a CPU, the package repacks


def whole_model(kind: str) -> Any:
    """Every weight trained; Llama's head is its own, Qwen's is tied to the embeddings."""
    model = tiny.make_model(kind)
    if kind == "qwen2":
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def documents(count: int = 6) -> tiny.Documents:
    """Longer than a tile of attention, and shorter."""
    return tiny.Documents(tiny.random_rows(count, longest=200))


def packed(of: tiny.Documents) -> Batch:
    return flat_batch(of, np.arange(len(of)))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def bits(model: Any) -> dict[str, torch.Tensor]:
    """Of everything that it holds: 4-bit weights read as other numbers may be none."""
    return {name: tensor.flatten().view(torch.uint8).clone() for name, tensor in model.state_dict().items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative L2 distance of a tensor that carries more than rounding."""
    assert found.keys() == expected.keys()
    least = 1e-4 * max(float(gradient.norm()) for gradient in expected.values())
    return max(float((found[n] - expected[n]).norm()) / max(float(expected[n].norm()), least) for n in expected)


def agreeing(model: Any, keeping: Keeping, claim: str, long_document: int = 0) -> FusedModel:
    """The fast path for `model`, after its loss and gradient have been compared with autograd's."""
    batch = packed(documents())
    loss, count, *_ = accumulate_gradients(Objective(model, autocast=None), [batch], ALONE)
    expected = gradients(model)
    fused = FusedModel(base_of(model), keeping=keeping, long_document=long_document, chunk=37)
    for _ in range(2):  # the second time all gradients start at zero again
        fused.begin_step()
        found = fused.accumulate(batch, 1 / count).item()
    at_most(f"the fast path's loss is autograd's{claim}", abs(found / loss - 1), 1e-6)
    at_most(f"the fast path's gradient is autograd's{claim}", distance(gradients(model), expected), BOUND)
    assert fused.loss_sum(batch).item() == found
    return fused


def test_no_block_as_large_as_the_model_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the weights that the fast path moves could not give back their parts."""
    asked: list[Any] = []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *given: asked.append(given))
    tiny.make_model("llama").save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert len(asked) == 1, "transformers asks by another name"
    args = FastModelArgs(model_name=str(tmp_path), load_in_4bit=False)
    load_model(OpenSlothConfig(data_cache_path="-", fast_model_args=args), ALONE.device, bf16=False)
    assert len(asked) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert len(asked) == 2, "others load as before"


KINDS = pytest.mark.parametrize(("kind", "targets"), [("llama", SOME), ("qwen2", ALL), ("qwen3", ALL)])


@every_keeping
@KINDS
def test_loss_and_gradient_are_those_of_autograd(kind: str, targets: list[str], keeping: Keeping) -> None:
    """Where only the layers' inputs are kept, the MLP is computed again in parts."""
    agreeing(model_of(kind, targets=targets), keeping, "")


@every_keeping
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_long_documents_learn_what_autograd_does(kind: str, keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they attend by themselves, beside others that do not."""
    met: list[tuple[int, ...]] = []
    backward = long_documents.attention_backward
    monkeypatch.setattr(
        long_documents,
        "attention_backward",
        lambda grad, qkv, out, lse, long, *rest: met.append(long.lengths) or backward(grad, qkv, out, lse, long, *rest),
    )
    lengths = np.diff(packed(documents()).inputs["document_offsets"])
    assert 1 < (lengths >= LONG_DOCUMENT).sum() < len(lengths)
    agreeing(model_of(kind, targets=ALL), keeping, ", of long documents", LONG_DOCUMENT)
    assert met
    assert set(met) == {(ROOM_STEP,) * int((lengths >= LONG_DOCUMENT).sum())}


@every_keeping
def test_the_last_mlp_is_computed_where_a_target_is_predicted(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    whole = operations.swiglu
    monkeypatch.setattr(operations, "swiglu", lambda gate_up, out: (rows.append(len(out)), whole(gate_up, out)))
    base, batch = base_of(model_of("llama")), packed(documents())
    fused, layers = FusedModel(base, keeping=keeping), len(base.model.layers)
    inputs = inputs_of(batch, 1.0)
    assert len(batch.targets) <= len(inputs.targets) < len(inputs.ids)
    for run in (fused.loss_sum, lambda batch: fused.accumulate(batch, 1.0)):
        rows.clear()
        run(batch)
        assert rows == [*[len(inputs.ids)] * (layers - 1), len(inputs.targets)]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("keep", IN_HOST)
def test_what_lies_in_host_memory_is_what_was_counted(kind: str, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradient has the bits of that of all kept."""
    model, offloaded = model_of(kind, targets=ALL), []
    put = Offload.put
    monkeypatch.setattr(
        Offload, "put", lambda self, layer, pieces: offloaded.append(sum(pieces, ())) or put(self, layer, pieces)
    )
    found = []
    for keeping in (ALL_KEPT, Keeping(keep)):
        fused = FusedModel(base_of(model), keeping=keeping)
        fused.begin_step()
        fused.accumulate(packed(documents()), 1.0)
        found.append(fused.gradient.clone())
        all_but_last = len(base_of(model).model.layers) - 1
        assert len(offloaded) == (all_but_last if keeping.keep is keep else 0)
    assert torch.equal(*found)
    shape = ModelShape.from_config(base_of(model).config.to_dict())
    counted = offloaded_bytes(shape, Method(8, LORA_TARGETS, 16, 8, fused=True), keep)
    assert {2 * sum(tensor.shape[1] for tensor in of_layer) for of_layer in offloaded} == {counted}


def test_a_place_in_host_memory_serves_all_batches_that_are_not_longer() -> None:
    offload = Offload(torch.device("cpu"), 10)
    longest = ((torch.zeros(10, 4),), (torch.zeros(10, 3), torch.zeros(10, 2)))
    shorter = tuple(tuple(tensor[:7] for tensor in piece) for piece in longest)
    for pieces in (shorter, longest, shorter):
        places, at = offload._places(0, pieces), offload._host[0][0].data_ptr()
        assert [[place.shape for place in of] for of in places] == [[tensor.shape for tensor in of] for of in pieces]
        for place in sum(places, ()):
            assert place.data_ptr() == at
            at += place.nbytes
    blocks = offload._host[0]
    before = blocks[0].data_ptr()
    offload._places(0, ((torch.zeros(11, 4),), (torch.zeros(11, 3), torch.zeros(11, 2))))
    assert [len(blocks), blocks[0].data_ptr()] == [2, before], "a graph may still use the first"
    (other,), _ = offload._places(1, longest)
    assert other.data_ptr() not in [block.data_ptr() for block in blocks]


def test_embeddings_may_lie_in_host_memory_where_nobody_trains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody ever does: the check before the first step freezes trained weights for a while."""
    adapted, tied, whole = model_of("llama"), whole_model("qwen2").requires_grad_(False), whole_model("llama")
    frozen_for_a_while = whole_model("llama").requires_grad_(False)
    found = []
    for model, computing in (
        (adapted, torch.float32),
        (tied, torch.float32),
        (whole, torch.float32),
        (frozen_for_a_while, torch.bfloat16),
    ):
        fused = FusedModel(base_of(model), keeping=Keeping(Keep.HOST_INPUTS))
        assert not fused._offloads_embedding, "on a CPU there is nowhere else to lie"
        fused._device = torch.device("cuda")
        found.append(fused._may_offload_embedding(computing))
    assert found == [True, False, False, False]
    fused = FusedModel(base_of(adapted), keeping=Keeping(Keep.HOST_INPUTS))
    fused._device = torch.device("cuda")
    monkeypatch.setattr(machine, "usable_memory", lambda: 4)
    assert not fused._may_offload_embedding(torch.float32)


@every_keeping
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@KINDS
def test_weights_in_four_bits(kind: str, targets: list[str], storage: str, keeping: Keeping, tmp_path: Path) -> None:
    """All layers' weights are made whole in the same buffers, one layer after the other; their own stay as they are.

    Some are stored as if their bytes were numbers of 16 bits, which sharding asks for.
    """
    model = four_bit_model(kind, tmp_path, storage=storage, targets=targets)
    before = bits(model)
    agreeing(model, keeping, ", weights in 4 bits").release()
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_keeping
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_weight_can_be_trained(kind: str, keeping: Keeping) -> None:
    """Norms, biases and embeddings too; tied embeddings get the head's gradient as well."""
    agreeing(whole_model(kind), keeping, ", every weight trained")


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_any_part_of_what_is_trained_can_be_looked_at_alone(kind: str, full: bool, first: int) -> None:
    """As the check before the first step does with large models: every third tensor, the others frozen meanwhile."""
    model = whole_model(kind) if full else model_of(kind)
    trained = trainable_parameters(model)
    for i, parameter in enumerate(trained):
        parameter.requires_grad_(i % 3 == first)
    agreeing(model, ALL_KEPT, ", of a part of it").release()
    for parameter in trained:
        parameter.requires_grad_(True)
    agreeing(model, ALL_KEPT, ", of all after a part")


@pytest.mark.parametrize("mutation", ["boundaries merged", "positions not reset"])
def test_a_leak_is_seen(mutation: str) -> None:
    model, batch = model_of("llama"), packed(documents())
    _, count, *_ = accumulate_gradients(Objective(model, autocast=None), [batch], ALONE)
    expected = gradients(model)
    if mutation == "boundaries merged":
        batch.inputs["document_offsets"] = batch.inputs["document_offsets"][[0, -1]]
    else:  # the scores of plain rotary embeddings cannot see it: it is the turns themselves that differ
        ends = batch.inputs["document_offsets"][1:-1].long()
        batch.inputs["position_ids"][0, ends] += 1
    fused = FusedModel(base_of(model), keeping=ALL_KEPT)
    fused.begin_step()
    fused.accumulate(batch, 1 / count)
    assert distance(gradients(model), expected) > 100 * BOUND


def test_the_model_goes_on_working_on_the_same_weights() -> None:
    model, batch = model_of("qwen2"), packed(documents())
    before = Objective(model, autocast=None).loss_sum(batch).item()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FusedModel(base_of(model), keeping=ALL_KEPT)
    assert Objective(model, autocast=None).loss_sum(batch).item() == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_released_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second set of buffers would otherwise stand beside the first, or a second model beside the buffers."""
    model = model_of("qwen2")
    fused = FusedModel(base_of(model), keeping=ALL_KEPT)
    fused.begin_step()
    fused.accumulate(packed(documents()), 1.0)
    buffers = [weakref.ref(projection._buffer) for projection in fused._projections]
    left: list[int] = []
    release = Projection.release

    def counted(projection: Projection) -> None:
        left.append(sum(buffer() is not None for buffer in buffers))
        release(projection)

    monkeypatch.setattr(Projection, "release", counted)
    gc.disable()
    try:
        fused.release()
        assert left == list(range(len(buffers), 0, -1))
        assert not [buffer for buffer in buffers if buffer() is not None]
    finally:
        gc.enable()


def test_parameters_that_were_moved_are_not_trained_in_their_old_places() -> None:
    """An optimizer that lays them end to end has to be made first."""
    model = model_of("llama")
    fused = FusedModel(base_of(model), keeping=ALL_KEPT)
    moved = trainable_parameters(model)[3]
    moved.data = moved.data.clone()
    with pytest.raises(RuntimeError, match="trained parameters were moved"):
        fused.begin_step()


@pytest.mark.parametrize("nth", [0, 2, 5])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever of a layer's four projections: their weights lie in buffers by then."""
    model, made = model_of("qwen2"), []
    before = bits(model)
    take_over = Projection._take_over_weight

    def failing(self: Projection, *given: Any) -> None:
        take_over(self, *given)
        made.append(self)
        if len(set(made)) > nth:
            raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Projection, "_take_over_weight", failing)
    with pytest.raises(torch.OutOfMemoryError):
        FusedModel(base_of(model), keeping=ALL_KEPT)
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, weight in model.named_parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes, f"{name} still lies in a buffer"


def test_after_giving_back_has_failed_a_new_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), packed(documents())
    objective = FusedObjective(model, autocast=None, keeping=ALL_KEPT)
    objective.begin_step()
    loss = objective.accumulate(batch, 1.0).item()
    with monkeypatch.context() as patch:
        patch.setattr(Projection, "release", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
        with pytest.raises(torch.OutOfMemoryError):
            objective.release()
    objective.begin_step()
    assert objective.accumulate(batch, 1.0).item() == loss
    objective.release()


def test_a_frozen_weight_of_another_type_keeps_its_own() -> None:
    """While the check before the first step looks at some of them, the others of a full training are frozen."""
    linear = torch.nn.Linear(32, 48, bias=False).requires_grad_(False)
    before, x = linear.weight.clone(), torch.randn(8, 32)
    projection = Projection([linear], torch.bfloat16, {})
    room = projection.room_for_input(8)
    room.copy_(x)
    assert projection.forward(room).float() == pytest.approx(x @ before.T, rel=0.05, abs=0.05)
    projection.release()
    assert linear.weight.dtype is torch.float32
    assert torch.equal(linear.weight, before)


def test_a_model_that_was_trained_can_be_merged_and_saved_and_trained_on(tmp_path: Path) -> None:
    model, batch = model_of("qwen2"), packed(documents())
    objective = FusedObjective(model, autocast=None, keeping=ALL_KEPT)
    first = accumulate_gradients(objective, [batch], ALONE).loss_sum
    objective.release()
    assert all(parameter.is_contiguous() and parameter.grad is None for parameter in model.parameters())
    assert accumulate_gradients(objective, [batch], ALONE).loss_sum == first
    objective.release()
    base_of(model).set_attn_implementation("sdpa")
    ids = torch.tensor([[7, 8, 9, 10]])
    expected = model(input_ids=ids, use_cache=False).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(loaded(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)


@pytest.mark.parametrize("keeping", [ALL_KEPT, Keeping(Keep.INPUTS)], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_steps_of_several_batches_train_as_the_plain_engine_does(keeping: Keeping, full: bool) -> None:
    """Clipping bites; the last step is short; what the optimizer did is seen by the next step."""
    rows = make_rows(documents(12), 256, packed=True, pad_id=0)
    order = RowOrder(len(rows), BatchShape(1, 3, 1), seed=0)

    def train(fast: bool) -> tuple[list[float], list[float], list[torch.Tensor]]:
        model = model_of("llama")
        parameters = trainable_parameters(model)
        objective = FusedObjective(model, autocast=None, keeping=keeping) if fast else Objective(model, autocast=None)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses, norms = [], []
        for step in range(order.steps_per_epoch):
            batches = [rows.batch(r) for r in order.micro_batches(step, 0) if len(r)]
            totals = accumulate_gradients(objective, batches, ALONE, max_norm=0.05)
            losses.append(totals.loss_sum)
            norms.append(totals.grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return losses, norms, [p.detach().clone() for p in parameters]

    plain, fast = train(fast=False), train(fast=True)
    assert len(plain[0]) >= 2
    assert min(plain[1]) > 0.05
    assert fast[0] == pytest.approx(plain[0], rel=1e-5)
    assert fast[1] == pytest.approx(plain[1], rel=1e-4)
    for found, expected in zip(fast[2], plain[2], strict=True):
        at_most("weights after steps on the fast path", float((found - expected).norm() / expected.norm()), 1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_its_gradients_lie_as_the_flat_optimizer_needs_them(full: bool) -> None:
    """And train to the bits of bitsandbytes' own optimizer, given the same gradients."""
    flat_optimizer = pytest.importorskip("opensloth.flat_optimizer")
    model = whole_model("qwen2") if full else model_of("qwen2")
    parameters, beside = trainable_parameters(model), trainable_parameters(copy.deepcopy(model))
    optimizer = flat_optimizer.FlatAdamW(parameters, weight_decay=eight_bit.DECAY, **eight_bit.OPTIONS)
    alone = eight_bit.tensor_by_tensor(beside)
    fused, losses = FusedModel(base_of(model), keeping=ALL_KEPT), []
    for _ in range(3):
        fused.begin_step()
        losses.append(fused.accumulate(packed(documents()), 1e-3).item())
        fused.clip(1.0)
        for one, other in zip(parameters, beside, strict=True):
            assert one.grad is not None
            other.grad = one.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        alone.step()
        assert all(torch.equal(one, other) for one, other in zip(parameters, beside, strict=True))
    assert losses[2] < losses[0]


def test_padding_of_shapes_that_come_again_is_counted() -> None:
    model, batch = model_of("llama"), packed(documents())
    computed = FusedObjective(model, autocast=None, keeping=ALL_KEPT).positions(batch)
    assert computed == len(inputs_of(batch, 1.0).ids)
    assert batch.tokens < computed < batch.tokens + TOKENS


def test_batches_that_are_nearly_full_have_one_size() -> None:
    """What they are filled up with changes nothing beyond rounding."""
    sizes = {tokens: padded_tokens(tokens, 6000) for tokens in (300, 5600, 5700, 5999, 6000, 6001)}
    assert sizes == {300: 512, 5600: 5632, 5700: 6144, 5999: 6144, 6000: 6144, 6001: 6144}
    batch, found = packed(documents()), []
    for full in (0, batch.tokens + 20):
        model = model_of("qwen2")
        fused = FusedModel(base_of(model), keeping=ALL_KEPT, full_batch=full)
        fused.begin_step()
        found.append((fused.accumulate(batch, 1e-3).item(), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert distance(found[1][1], found[0][1]) < BOUND


def test_documents_of_a_few_tokens_and_of_one() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [7], "labels": [7]}]
    model, batch = model_of("llama"), packed(tiny.Documents(rows))
    loss, count, *_ = accumulate_gradients(Objective(model, autocast=None), [batch], ALONE)
    expected = gradients(model)
    fused = FusedModel(base_of(model), keeping=ALL_KEPT)
    fused.begin_step()
    assert fused.accumulate(batch, 1 / count).item() == pytest.approx(loss, rel=1e-6)
    assert distance(gradients(model), expected) < BOUND


# --- which engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gemma2", {}, "gemma2 models"),
        ("mistral", {}, "attention window of 8"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "dynamic rotary"),
        ("llama", {"head_dim": 80}, "heads of 80"),
    ],
)
def test_models_that_it_does_not_know(kind: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny.make_model(kind)
    model.config.head_dim = 64
    assert reason_against_model(model, 8) is None or kind == "gemma2"
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert reason in (reason_against_model(model, 200) or "")


def test_a_config_that_sizes_cannot_be_told_from_is_a_reason() -> None:
    model = tiny.make_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert "quantised in a way" in (reason_against_model(model, 8) or "")


def test_a_machine_without_cuda_trains_by_plain_torch_and_says_so() -> None:
    model, rows = model_of("llama"), make_rows(documents(), 256, packed=True, pad_id=0)

    def choose(**settings: Any) -> tuple[Objective, str]:
        given = {"optim": "adamw_torch", "longest_document": 200, "rows_per_batch": 1, "autocast": None}
        return engine.choose(model, rows, config(**settings), **given)

    chosen, why = choose()
    assert (chosen.engine, type(chosen)) == ("torch", Objective)
    assert why == "the fast path cannot train this: there is no CUDA device"
    with pytest.raises(ConfigError, match="the fast path cannot train this: there is no CUDA device"):
        choose(engine="fused")
    assert choose(engine="torch")[1] == "asked for"


@pytest.mark.parametrize(
    ("capability", "packed", "autocast", "reason"),
    [
        ((7, 5), True, torch.bfloat16, "the GPU is older than compute capability 8.0"),
        ((8, 0), False, torch.bfloat16, "the rows are not packed"),
        ((8, 0), True, torch.float16, "it computes in bfloat16 only"),
        ((8, 0), True, torch.bfloat16, None),
    ],
)
def test_gpus_and_ways_of_computing_that_it_does_not_take(
    capability: Any, packed: bool, autocast: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model as if it lay on a GPU."""
    model = tiny.make_model("llama")
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr("opensloth.fused.support.base_of", lambda _: SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr("opensloth.fused.support.reason_against_model", lambda *_: None)
    monkeypatch.setattr("opensloth.fused.support._adapters", lambda _: None)
    assert reason_against(model, packed=packed, longest_document=200, autocast=autocast) == reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"peft": IA3Config(target_modules=["k_proj"], feedforward_modules=[])}, "IA3 adapters"),
        ({"peft": LoraConfig(target_modules=["q_proj"], lora_bias=True)}, "more than two low-rank matrices"),
        ({"full": True}, None),
        ({"full": "some"}, "only some"),
        ({"half": True}, "float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_adapters_that_it_does_not_know(
    settings: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensloth.fused.support._machine", lambda *_: None)
    monkeypatch.setattr("opensloth.model_shape.HEAD_SIZES", {8})
    full, half, other = (settings.get(name, False) for name in ("full", "half", "peft"))
    kept = {name: value for name, value in settings.items() if name not in ("full", "half", "peft")}
    model = tiny.make_model("llama") if full or other else model_of("llama", **kept)
    if other:
        model = get_peft_model(model, other)
    if full == "some":
        model.model.norm.weight.requires_grad_(False)
    if half:
        model.to(torch.bfloat16)
    found = reason_against(model, packed=True, longest_document=64, autocast=None)
    assert (reason in (found or "")) if reason else found is None


@pytest.mark.parametrize(
    ("skipped", "reason"),
    [
        (None, None),
        (["lm_head", "down_proj"], "only some of its linear layers are in 4 bits"),
        (["embed_tokens"], "its head is quantised"),
    ],
)
def test_models_in_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: list[str] | None, reason: str | None
) -> None:
    monkeypatch.setattr("opensloth.fused.support._machine", lambda *_: None)
    monkeypatch.setattr("opensloth.model_shape.HEAD_SIZES", {8})
    model = four_bit_model("llama", tmp_path, skipped=skipped)
    assert reason_against(model, packed=True, longest_document=64, autocast=None) == reason
    foreseen = base_of(model).config.to_dict()
    assert ModelShape.from_config(foreseen).reason_against_fused == reason


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_weight_in_four_bits_multiplies_as_any_other(tmp_path: Path, storage: str) -> None:
    assert work_of(four_bit_model("llama", tmp_path, storage=storage)) == work_of(model_of("llama"))
