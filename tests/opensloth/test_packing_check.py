"""The comparison of packed and single documents before the first step: what it sees, and that it leaves no trace.

The slow ones take a minute and a half.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import packing
import packing_scenarios
import peft
import pytest
import smollm2
import tiny
import torch
import transformers
from launched import Run, with_faults
from measured import at_least, at_most
from train_rank import of_ranks

from opensloth import attention, packing_check, trainer_factory
from opensloth.check_memory import SAMPLED, CheckMemory
from opensloth.contract import EXIT_CODE_OF_CAUSE
from opensloth.data.batch import Batch
from opensloth.data.training_data import Rows, make_rows
from opensloth.errors import ConfigError
from opensloth.events import NullEvents
from opensloth.isolation import isolate_documents
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.packing_check import EXACT, ROUNDED, Agreement, Sample, bounds_of, compare, sample_of
from opensloth.step import Objective
from opensloth.trainer import SftTrainer

KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "mixtral", "gpt2"]
REFUSED = "--set opensloth.sequence_packing=false"
STATED = "the check before the first step"


def agreement(
    model: Any,
    rows: Any,
    mutation: Callable[[Batch], Batch] = lambda batch: batch,
    autocast: torch.dtype | None = None,
) -> Agreement:
    objective = Objective(model, autocast=autocast)

    def packed(batch: Batch, targets: float) -> None:
        objective.accumulate(mutation(batch), targets)

    return compare(model, packed, objective.accumulate, rows)


def isolated(kind: str, trained: str, scale: float = 0.02) -> Any:
    """As it is at the start of a run: the usual initialisation, and adapters with B = 0."""
    model = (
        packing.adapted(kind, fresh=True, scale=scale) if trained == "adapter" else tiny.make_model(kind, scale=scale)
    )
    assert isolate_documents(model, packing.LONGEST) is None
    return model


def cut(longest: int) -> Sample:
    """Three documents, as the check takes them."""
    return Sample(packing.documents(), np.arange(3), longest)


# --- what it sees -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["adapter", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_what_is_right(kind: str, trained: str) -> None:
    model = isolated(kind, trained)
    assert bounds_of(model, None) == EXACT
    found = agreement(model, cut(64))
    at_most(f"{STATED}, all right: 1 - cosine, float32", 1 - found.cosine, 1 - EXACT.cosine)
    at_most(f"{STATED}, all right: norm off by, float32", abs(found.norm_ratio - 1), EXACT.norm)


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_what_is_right_in_bfloat16(kind: str) -> None:
    model = isolated(kind, "adapter", scale=0.1)
    assert bounds_of(model, torch.bfloat16) == ROUNDED
    found = agreement(model, cut(64), autocast=torch.bfloat16)
    at_least(f"{STATED}, all right: cosine, bfloat16", found.cosine, ROUNDED.cosine)
    at_most(f"{STATED}, all right: norm off by, bfloat16", abs(found.norm_ratio - 1), ROUNDED.norm)


ERRORS = [
    *[(kind, error) for kind in ("llama", "mistral", "gpt2") for error in packing.LEAKS],
    ("gpt2", "positions run on"),
]


@pytest.mark.parametrize("trained", ["adapter", "full"])
@pytest.mark.parametrize(("kind", "error"), ERRORS)
def test_it_sees_each_error(kind: str, error: str, trained: str) -> None:
    """By the wider bounds, at the usual initialisation, on the shortest documents it takes."""
    mutation = packing.LEAKS.get(error, packing.positions_running_on)
    found = agreement(isolated(kind, trained), cut(packing_check.SHORTEST), mutation)
    off = max((1 - found.cosine) / (1 - ROUNDED.cosine), abs(found.norm_ratio - 1) / ROUNDED.norm)
    at_least(f"{STATED}, {error}: cosine or norm off by, in bounds of bfloat16", off, 2)


def test_why_it_is_not_the_loss_that_is_compared() -> None:
    """At random initialisation a complete leak hides from it."""
    model = isolated("llama", "adapter")
    rows, objective = packing.documents(), Objective(model, autocast=None)
    batch = packing.packed(rows)
    right, leaking = (objective.loss_sum(each).item() for each in (batch, packing.merged(batch)))
    at_most("a complete leak at random initialisation: loss moves by", abs(leaking / right - 1), 1e-3)
    cosine = agreement(model, rows, packing.merged).cosine
    at_most("a complete leak at random initialisation: cosine of the gradients", cosine, 0.9)


def test_a_gradient_that_is_not_finite_is_told_from_one_that_differs() -> None:
    nan, one, none = torch.tensor([float("nan")]), torch.tensor([1.0]), torch.tensor([0.0])
    assert np.isnan(packing_check._agreement([nan], [nan]).cosine)
    for found, reference in (([nan], [one]), ([one], [nan]), ([none], [one]), ([one], [none]), ([None], [one])):
        assert not packing_check._agreement(found, reference).within(ROUNDED)
    assert packing_check._agreement([none, None], [none, None]) == Agreement(1.0, 1.0)
    assert packing_check._agreement([one, None], [one, none]).within(EXACT)
    assert not packing_check._agreement([2 * one], [one]).within(ROUNDED), "the norm"
    assert not packing_check._agreement([-one], [one]).within(ROUNDED), "the direction"


def test_the_sample_is_of_documents_with_targets() -> None:
    rows = tiny.random_rows(30, longest=60)
    for row in rows[::2]:
        row["labels"] = [-100] * len(row["labels"])
    sample = sample_of(rows_of(tiny.Documents(rows)), tiny.make_model("llama"))
    assert len(sample) == packing_check.DOCUMENTS
    assert all((sample.row(i)[1] != -100).any() for i in range(len(sample)))


def test_a_long_document_is_cut_to_where_its_first_target_is() -> None:
    ids = np.arange(1000, dtype=np.int32)
    for first in (1, 500, 999):
        labels = np.where(ids >= first, ids, -100).astype(np.int32)
        (cut_ids, cut_labels) = packing_check._window(ids, labels, 64)
        assert len(cut_ids) == len(cut_labels) == 64
        assert first in cut_labels[1:]
        assert (np.diff(cut_ids) == 1).all()


def rows_of(documents: Any) -> Rows:
    return make_rows(documents, 64, packed=True, pad_id=0)


# --- what it leaves ------------------------------------------------------------------------------------


def test_it_leaves_model_and_random_numbers_as_they_were() -> None:
    model = isolated("llama", "adapter")
    one, *others = (p for p in model.parameters() if p.requires_grad)
    one.grad = held = torch.ones_like(one)
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    drawing = model.register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # as a model might
    agreement(model, cut(64))
    drawing.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert one.grad is held
    assert torch.equal(held, torch.ones_like(one))
    assert all(parameter.grad is None for parameter in others)
    assert [module.training for module in model.modules()] == modes
    assert model.get_base_model().config._attn_implementation == attention.NAME
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("error", packing.LEAKS)
def test_a_part_of_a_large_gradient_is_enough(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = isolated("llama", "full")
    monkeypatch.setattr(packing_check, "WATCHED", sum(p.numel() for p in model.parameters()) / 5)
    compared = []
    agree = packing_check._agreement
    monkeypatch.setattr(packing_check, "_agreement", lambda *given: compared.append(len(given[0])) or agree(*given))
    assert agreement(model, cut(64)).within(EXACT)
    assert not agreement(model, cut(packing_check.SHORTEST), packing.LEAKS[error]).within(ROUNDED)
    assert compared == [4, 4], "of 21 tensors"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_runs_are_bit_identical_with_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = trainer(tmp_path / "looked at")
    looked_at.train()
    monkeypatch.setattr(trainer_factory, "_check_packing", lambda *_: None)
    not_looked_at = trainer(tmp_path / "not")
    not_looked_at.train()
    assert [e["event"] for e in events(tmp_path / "not")].count("check") == 0
    losses = [[e["loss"] for e in events(tmp_path / name) if e["event"] == "step"] for name in ("looked at", "not")]
    assert losses[0] == losses[1]
    expected = not_looked_at.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in looked_at.model.state_dict().items())


# --- what comes of it ----------------------------------------------------------------------------------


def trainer(folder: Path, model: Any = None, rank: int = 8, **options: Any) -> SftTrainer:
    """Three steps of a tiny model, dropout on."""
    return trainer_factory.create_sft_trainer(
        model or tiny.make_model("llama"),
        tiny.make_tokenizer(),
        tiny.random_rows(50),
        OpenSlothConfig(
            data_cache_path="-",
            fast_model_args=FastModelArgs(model_name="tiny", max_seq_length=64),
            lora_args=LoraArgs(lora_dropout=0.1, r=rank),
            **options,
        ),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            optim="adamw_torch",
            warmup_steps=0,
            report_to="none",
            save_strategy="no",
        ),
    )


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def checked(folder: Path) -> dict[str, Any]:
    (event,) = [event for event in events(folder) if event["event"] == "check"]
    return event


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._one_by_one

    def as_one(query: Any, key: Any, value: Any, offsets: Any, *options: Any) -> Any:
        return right(query, key, value, offsets[[0, -1]], *options)

    monkeypatch.setattr(attention, "_one_by_one", as_one)


@pytest.mark.usefixtures("leaking")
def test_training_refuses_to_go_on(tmp_path: Path) -> None:
    for _ in range(2):  # a refusal is not remembered
        with pytest.raises(ConfigError, match="documents of this llama train differently from single ones") as refusal:
            trainer(tmp_path)
        assert REFUSED in str(refusal.value)
        assert EXIT_CODE_OF_CAUSE[refusal.value.cause] == 2
    assert [event["remembered"] for event in events(tmp_path) if event["event"] == "check"] == [False, False]
    assert trainer(tmp_path / "unpacked", sequence_packing=False).train().steps == 3


def test_what_was_compared_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path / "first")
    monkeypatch.setattr(packing_check, "compare", None)
    trainer(tmp_path / "second")
    first, second = checked(tmp_path / "first"), checked(tmp_path / "second")
    assert (first["remembered"], second["remembered"]) == (False, True)
    assert (first["cosine"], first["norm_ratio"]) == (second["cosine"], second["norm_ratio"])
    assert first["cosine"] > EXACT.cosine


Change = Callable[[pytest.MonkeyPatch], dict[str, Any]]


def other_weights(at: str) -> Change:
    """An MLP's weight is another: everywhere by a little, or in the first or last of the elements looked at."""

    def change(_: pytest.MonkeyPatch) -> dict[str, Any]:
        model = tiny.make_model("llama")
        weight = model.model.layers[1].mlp.down_proj.weight
        with torch.no_grad():
            if at == "everywhere":
                weight *= 1.0001
            else:
                weight[0, {"first": 0, "last": SAMPLED - 1}[at]] += 1
        return {"model": model}

    return change


def other_version(package: ModuleType) -> Change:
    def change(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        monkeypatch.setattr(package, "__version__", "99.0")
        return {}

    return change


def other_code(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("opensloth.check_memory._code_sha256", lambda: "other")
    return {}


OTHERS: dict[str, Change] = {
    "another architecture": lambda _: {"model": tiny.make_model("mistral")},
    "other weights": other_weights("everywhere"),
    "the first weight that is looked at": other_weights("first"),
    "the last weight that is looked at": other_weights("last"),
    "another adapter": lambda _: {"rank": 4},
    "another version of torch": other_version(torch),
    "another version of transformers": other_version(transformers),
    "another version of peft": other_version(peft),
    "other code of ours": other_code,
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_the_same_is_compared_again(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path / "first")
    trainer(tmp_path / "second", **OTHERS[what](monkeypatch))
    assert not checked(tmp_path / "second")["remembered"]


def test_weights_that_are_not_sampled_tell_nothing() -> None:
    """The price of not reading the model whole: of a weight its first elements are looked at."""
    model = tiny.make_model("llama")
    CheckMemory("packing", model, engine="torch", autocast=None).remember({"cosine": 1.0})
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, SAMPLED:] += 1
        model.model.layers[1].mlp.down_proj.weight[1:] += 1
    assert CheckMemory("packing", model, engine="torch", autocast=None).recall() == {"cosine": 1.0}


def test_type_and_engine_are_part_of_what_is_remembered() -> None:
    model = tiny.make_model("llama")
    kept = CheckMemory("packing", model, engine="torch", autocast=None)
    kept.remember({"cosine": 1.0})
    assert CheckMemory("packing", model, engine="torch", autocast=None).recall() == {"cosine": 1.0}
    assert CheckMemory("packing", model, engine="torch", autocast=torch.bfloat16).recall() is None
    assert CheckMemory("packing", model, engine="fused", autocast=None).recall() is None
    assert CheckMemory("packing", model.bfloat16(), engine="torch", autocast=None).recall() is None


@pytest.mark.parametrize("damage", ["torn", "of another", "no folder can be made"])
def test_a_memory_that_cannot_be_used_only_costs_the_comparison(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("OSLO_ROOT", str(root))
    if damage == "no folder can be made":
        root.write_text("a file")
    else:
        trainer(tmp_path / "first")
        (file,) = (root / "checks").iterdir()
        file.write_text(file.read_text()[:-20] if damage == "torn" else '{"of": {}, "found": {"cosine": 1.0}}')
    assert trainer(tmp_path / "second").train().steps == 3
    assert not checked(tmp_path / "second")["remembered"]


def test_weights_that_are_not_finite_are_left_to_the_first_step(tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    trainer(tmp_path, model)
    assert checked(tmp_path)["cosine"] is None
    assert any("could not be checked" in event.get("message", "") for event in events(tmp_path))
    assert not list(Path(tmp_path).glob("checks/*"))


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.timeout(200)
def test_all_ranks_go_by_what_rank_0_found(tmp_path: Path) -> None:
    """Real processes over gloo: all refuse together or go on together, and none waits for another."""
    ranks = of_ranks(packing_scenarios.leaks_on_one_rank, tmp_path, (2,), seconds=150)[2]
    assert all(REFUSED in rank["rank 0"] for rank in ranks)
    assert ranks[0]["rank 0"] == ranks[1]["rank 0"]
    assert [rank["none"] for rank in ranks] == [rank["none again"] for rank in ranks] == [2, 2]
    assert [rank["compared"] for rank in ranks] == [2, 0], "what passed once is remembered"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_whose_documents_see_each_other_ends_as_a_config_error(tmp_path: Path) -> None:
    """The launcher and a rank as processes; the rank's attention is broken from outside."""
    run = Run(tmp_path, tiny.save(tmp_path / "model"), max_steps=3)
    run.env = with_faults(leak=True)
    assert run.finish() == 2
    ended = run.attempt("ended.json")
    assert ended["cause"] == "config"
    assert "opensloth.sequence_packing: packed documents of this llama train differently" in ended["message"]
    assert REFUSED in ended["message"] + ended["hint"]
    assert not any(event["event"] == "step" for event in run.events())
    assert [event["remembered"] for event in run.events() if event["event"] == "check"] == [False]


# --- what it takes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_it_takes_at_most_five_seconds_on_a_real_model(full: bool, bf16: bool, tmp_path: Path) -> None:
    """SmolLM2-135M and the quickstart's documents; and it sees each error there."""
    model = smollm2.load(full=full, bf16=bf16)
    rows = make_rows(smollm2.documents(tmp_path, 24), 512, packed=True, pad_id=0)
    autocast = torch.bfloat16 if bf16 else None
    objective = Objective(model, autocast=autocast)

    def accumulate(batch: Batch, targets: float) -> None:
        objective.accumulate(batch, targets)

    def look() -> float:
        started = time.process_time()  # others use this machine too
        assert isolate_documents(model, int(max(rows.documents.lengths))) is None
        memory = CheckMemory("packing", model, engine="torch", autocast=autocast)
        packing_check.require_same_gradient(
            model, accumulate, accumulate, rows, memory,
            bounds=bounds_of(model, autocast), world=packing.ALONE, events=NullEvents(),
        )  # fmt: skip
        return time.process_time() - started

    at_most(f"{STATED}, SmolLM2-135M: seconds of one core", look(), 5)
    at_most(f"{STATED}, SmolLM2-135M, remembered: seconds of one core", look(), 1)
    sample = sample_of(rows, model)
    for error, mutation in packing.LEAKS.items():
        found = agreement(model, sample, mutation, autocast)
        off = max((1 - found.cosine) / (1 - ROUNDED.cosine), abs(found.norm_ratio - 1) / ROUNDED.norm)
        at_least(f"{STATED}, SmolLM2-135M, {error}: cosine or norm off by, in bounds of bfloat16", off, 2)
