"""The trainer that the factory makes: steps, resume, evaluation, stops, what it writes; on the CPU, float32."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from opensloth import checkpoint, engine, packing_check
from opensloth.contract import Cause
from opensloth.errors import ConfigError, DataError, NonFiniteError, StopRequested
from opensloth.files import create_json
from opensloth.opensloth_config import FastModelArgs, LoraArgs, OpenSlothConfig, TrainingArguments
from opensloth.orders import Orders
from opensloth.train import _report
from opensloth.trainer import SftTrainer
from opensloth.trainer_factory import create_sft_trainer

ROWS = tiny.random_rows(50)
STEPS = 8


def config(**options: Any) -> OpenSlothConfig:
    lora = None if options.get("full_finetuning") else LoraArgs(lora_dropout=0.1)
    return OpenSlothConfig(
        data_cache_path="-",
        fast_model_args=FastModelArgs(model_name="tiny", max_seq_length=64, **options),
        lora_args=lora,
    )


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {"max_steps": STEPS, "optim": "adamw_torch", "learning_rate": 1e-2, "warmup_steps": 2}
    defaults |= {"gradient_accumulation_steps": 2, "report_to": "none", "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def trainer(folder: Path, rows: Any = ROWS, *, full: bool = False, **options: Any) -> SftTrainer:
    model = tiny.make_model("llama")
    if full:
        model.config.attention_dropout = 0.0
    return create_sft_trainer(
        model,
        tiny.make_tokenizer(),
        rows,
        config(full_finetuning=True) if full else config(),
        arguments(folder, **options),
    )


def losses(folder: Path) -> dict[int, float]:
    """step -> loss, of the last time the step was made."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def weights(trained: SftTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}


def test_it_learns_and_keeps_a_history(tmp_path: Path) -> None:
    trained = trainer(tmp_path, max_steps=60)
    result = trained.train()
    history = trained.state.log_history
    assert result.steps == trained.state.global_step == 60
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert result.target_tokens > 0
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= history[0].keys()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("interrupted_after", [1, 4, 7])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, full: bool, interrupted_after: int) -> None:
    """Dropout on, mid-epoch and across epochs."""
    whole = trainer(tmp_path / "whole", full=full)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": interrupted_after, "save_total_limit": None}
    first = trainer(tmp_path / "cut", full=full, **options)
    first.train()  # goes to the end; what counts is the checkpoint on the way
    kept = tmp_path / "cut" / "checkpoints" / f"step-{interrupted_after:08d}"
    resumed = trainer(tmp_path / "cut", full=full)
    resumed.train(resume_from_checkpoint=kept)
    assert [e for e in losses(tmp_path / "cut").items()] == [e for e in losses(tmp_path / "whole").items()]
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    assert resumed.state.log_history[0]["step"] == 1


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=None)
    made.train()
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-00000002", "step-00000004", "step-00000006"]
    adapter = kept[2] / "adapter_model.safetensors"
    damaged = bytearray(adapter.read_bytes())
    damaged[-1] ^= 1
    adapter.write_bytes(damaged)
    (kept[1] / checkpoint.OPTIMIZER).write_bytes(b"")
    heard: list[str] = []
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=None, world=made._world)
    assert checkpoints.newest(heard.append) == kept[0]
    assert "does not match its hash" in heard[0]
    assert "cut short" in heard[1]
    with pytest.raises(DataError, match="does not match its hash"):
        trainer(tmp_path).train(resume_from_checkpoint=kept[2])


def test_an_old_checkpoint_that_somebody_still_reads_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 6):
        (tmp_path / f"step-{step:08d}").mkdir()

    def rmdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # NFS: a file that is open leaves another behind

    monkeypatch.setattr(os, "rmdir", rmdir)
    checkpoint.Checkpoints(tmp_path, keep=1, world=None)._prune(6)  # type: ignore[arg-type]


def test_training_anew_in_the_same_folder_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=30, save_strategy="steps", save_steps=5).train()
    trainer(tmp_path, save_strategy="steps", save_steps=3, save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    with pytest.raises(DataError, match="it has all 6 steps"):
        trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=True)


def test_training_again_replaces_the_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=5)
    kept = tmp_path / "checkpoints" / "step-00000005" / "adapter_model.safetensors"
    made.train()
    first = kept.read_bytes()
    made.train()
    assert kept.read_bytes() != first


def test_every_weight_of_a_mixture_of_experts_is_restored(tmp_path: Path) -> None:
    """Its published names differ from its parameters' names."""

    def made(seed: int, **options: Any) -> SftTrainer:
        model = tiny.make_model("mixtral", seed)
        chosen = arguments(tmp_path, max_steps=4, **options)
        return create_sft_trainer(model, tiny.make_tokenizer(), ROWS, config(full_finetuning=True), chosen)

    whole = made(0, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = made(1)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-00000002")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    other = create_sft_trainer(
        tiny.make_model(), tiny.make_tokenizer(), ROWS, config(full_finetuning=True), arguments(tmp_path)
    )
    with pytest.raises(DataError, match="its weights are not this model's"):
        other.train(resume_from_checkpoint=True)


def test_old_checkpoints_go(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_model_only_checkpoints_say_that_they_cannot_be_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True).train()
    kept = tmp_path / "checkpoints" / "step-00000004"
    assert not (kept / checkpoint.OPTIMIZER).exists()
    with pytest.raises(DataError, match="model only"):
        trainer(tmp_path).train(resume_from_checkpoint=kept)


def test_a_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    with pytest.raises(DataError, match="other rows"):
        trainer(tmp_path, ROWS[:-3]).train(resume_from_checkpoint=True)


def test_a_request_to_stop_saves_and_leaves(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=10_000)
    attempt = tmp_path / "attempts" / "1"
    attempt.mkdir(parents=True)
    object.__setattr__(made._place, "orders", Orders(attempt))
    stop = attempt / "stop.json"
    made._after_step = _then(made._after_step, lambda done: done == 3 and create_json(stop, {"cause": "cancelled"}))  # type: ignore[method-assign]
    with pytest.raises(StopRequested, match="cancelled after step 3 of 10000") as caught:
        made.train()
    assert caught.value.cause == Cause.CANCELLED
    assert checkpoint.read_state(tmp_path / "checkpoints" / "step-00000003").step == 3


def _then(first: Any, second: Any) -> Any:
    def both(done: int) -> None:
        first(done)
        second(done)

    return both


def spoil_gradient(made: SftTrainer, step: int) -> None:
    """An infinite gradient in one micro-batch of `step`, under a finite loss."""
    calls = itertools.count(1)
    bad = (step - 1) * made.plan.shape.accumulation + 1

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.inf) if next(calls) == bad else gradient

    next(p for n, p in made.model.named_parameters() if "lora_B" in n).register_hook(spoiled)


def gives_up(made: SftTrainer, resume: bool = False) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        made.train(resume_from_checkpoint=resume)
    return caught.value


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_a_gradient_that_is_not_finite_leaves_the_step_before(tmp_path: Path) -> None:
    """Bit for bit, dropout on: as a run that saved there, and it goes on as if nothing had been."""
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=3, save_total_limit=9)
    whole.train()
    made = trainer(tmp_path / "bad")
    spoil_gradient(made, 4)
    error = gives_up(made)
    assert re.match(r"step 4: loss \d\.\d+, gradient norm (inf|nan) \(rows [\d, ]+ of the plan\)$", error.message)
    kept = tmp_path / "bad" / "checkpoints" / "step-00000003"
    assert f"the weights after step 3 are saved; last good checkpoint: {kept}; try a smaller" in error.hint
    assert "training.resume_from_checkpoint" in error.hint
    assert "bf16" not in error.hint
    resumed = trainer(tmp_path / "bad")
    resumed.train(resume_from_checkpoint=True)
    assert losses(tmp_path / "bad") == losses(tmp_path / "whole")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_nothing_is_saved_when_the_first_step_is_not_finite(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    spoil_gradient(made, 1)
    error = gives_up(made)
    assert error.hint == "no step came before it; last good checkpoint: none; try a smaller training.learning_rate"
    assert saved(tmp_path) == []


def test_what_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    """After a periodic checkpoint, and right after resuming."""
    made = trainer(tmp_path, save_strategy="steps", save_steps=3)
    spoil_gradient(made, 4)
    assert "step-00000003; try" in gives_up(made).hint
    written = (tmp_path / "checkpoints" / "step-00000003").stat().st_ino
    made = trainer(tmp_path)
    spoil_gradient(made, 1)
    assert "the weights after step 3 are saved; last good checkpoint: " in gives_up(made, resume=True).hint
    assert (tmp_path / "checkpoints" / "step-00000003").stat().st_ino == written
    assert saved(tmp_path) == ["step-00000003"]


def test_weights_that_are_not_finite_themselves_are_not_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=2)

    def spoil(*_: Any) -> None:
        if made.state.global_step == 2:
            next(p for n, p in made.model.named_parameters() if "lora_B" in n).data.fill_(math.inf)

    made._optimizer.register_step_post_hook(spoil)
    error = gives_up(made)
    assert error.message.startswith("step 4: loss nan")
    kept = tmp_path / "checkpoints" / "step-00000002"
    assert f"the weights after step 3 were not finite already; last good checkpoint: {kept}; try" in error.hint
    assert saved(tmp_path) == [kept.name]


def test_it_goes_on_with_the_smaller_learning_rate_of_the_file(tmp_path: Path) -> None:
    made = trainer(tmp_path / "first", learning_rate=1e-2)
    spoil_gradient(made, 4)
    gives_up(made)
    again = trainer(tmp_path / "second", learning_rate=1e-3)
    again.train(resume_from_checkpoint=tmp_path / "first" / "checkpoints" / "step-00000003")
    rates = {entry["step"]: entry["learning_rate"] for entry in again.state.log_history}
    # Warm-up of two steps, then linearly down to zero after eight: step k is made with the rate of k - 1 done.
    expected = {k: 1e-3 * (STEPS - (k - 1)) / (STEPS - 2) for k in range(4, STEPS + 1)}
    assert {k: rates[k] for k in expected} == pytest.approx(expected)
    assert rates[3] == pytest.approx(1e-2)


def test_an_evaluation_that_is_not_finite_is_said_and_stops_nothing(tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    poison = tiny.VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = math.inf
    train_rows = [{name: [min(token, poison - 1) for token in tokens] for name, tokens in row.items()} for row in ROWS]
    eval_rows = [train_rows[0], {"input_ids": [5, poison, 6, 7], "labels": [-100, -100, 6, 7]}]
    made = create_sft_trainer(
        model, tiny.make_tokenizer(), train_rows, config(), arguments(tmp_path), eval_dataset=eval_rows
    )
    result = made.train()
    assert result.steps == STEPS
    assert math.isfinite(result.loss or math.nan)
    assert json.dumps(_report(result), allow_nan=False), "report.json is to be JSON"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["loss"] for event in events if event["event"] == "eval"] == [None, None]
    warned = [event["message"] for event in events if event["event"] == "note"]
    assert f"evaluation after step {STEPS}: the loss is nan; that stops nothing" in warned[-1]


def test_the_loss_that_is_logged_after_resuming_counts_the_steps_before(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", logging_steps=4)
    whole.train()
    trainer(tmp_path / "cut", logging_steps=4, save_strategy="steps", save_steps=3).train()
    resumed = trainer(tmp_path / "resumed", logging_steps=4)
    resumed.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoints" / "step-00000003")
    after = {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 3}
    assert losses(tmp_path / "resumed") == after
    assert sorted(after) == [4, 8]


def test_the_engine_is_chosen_by_the_longest_document_of_both_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention window that only an evaluation's document is longer than would be ignored there without a word."""
    seen: dict[str, Any] = {}
    choose = engine.choose
    monkeypatch.setattr(engine, "choose", lambda *args, **given: seen.update(given) or choose(*args, **given))
    longer = {"input_ids": [5] * 60, "labels": [5] * 60}
    assert max(len(row["input_ids"]) for row in ROWS) < 60
    create_sft_trainer(
        tiny.make_model(), tiny.make_tokenizer(), ROWS, config(), arguments(tmp_path), eval_dataset=[longer]
    )
    assert (seen["longest_document"], seen["optim"]) == (60, arguments(tmp_path).optim)


def test_evaluation_is_the_token_weighted_loss(tmp_path: Path) -> None:
    made = create_sft_trainer(
        tiny.make_model(), tiny.make_tokenizer(), ROWS, config(), arguments(tmp_path), eval_dataset=ROWS[:7]
    )
    found = made.evaluate()
    model = tiny.make_model().eval()
    nats, targets = 0.0, 0
    for row in ROWS[:7]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=labels).loss) * count
        targets += count
    assert found["eval_targets"] == targets
    assert found["eval_loss"] == pytest.approx(nats / targets, rel=1e-5)
    with pytest.raises(DataError, match="no evaluation split"):
        trainer(tmp_path / "none").evaluate()


def test_the_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny.save(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made = create_sft_trainer(model, tiny.make_tokenizer(), ROWS, config(), arguments(tmp_path / "out"))
    made.train()
    folder = made.save_model()
    ids = torch.tensor([ROWS[0]["input_ids"]])
    plain = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    made.model.get_base_model().set_attn_implementation("sdpa")  # type: ignore[operator,union-attr]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, made.model.eval()(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny.CHATML
    assert load_file(folder / "adapter_model.safetensors").popitem()[1].dtype == torch.float32


def test_the_whole_model_loads_in_plain_transformers_in_the_dtype_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, full=True)
    made.train()
    folder = made.save_model(tmp_path / "final", dtype=torch.bfloat16)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.bfloat16
    assert plain.config._attn_implementation == "sdpa"
    found = dict(plain.named_parameters())
    for name, tensor in made.model.named_parameters():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_transformers_arguments_are_taken_too(tmp_path: Path) -> None:
    theirs = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, optim="adamw_torch", use_cpu=True, save_strategy="no"
    )
    made = create_sft_trainer(tiny.make_model(), tiny.make_tokenizer(), ROWS, config(), theirs)
    assert made.plan.shape.rows_per_step == 8
    assert made.train().steps == 3


def test_transformers_arguments_that_cannot_be_honoured_are_refused(tmp_path: Path) -> None:
    theirs = transformers.TrainingArguments(output_dir=str(tmp_path), neftune_noise_alpha=5.0, use_cpu=True)
    with pytest.raises(ConfigError, match="neftune_noise_alpha: not supported"):
        create_sft_trainer(tiny.make_model(), tiny.make_tokenizer(), ROWS, config(), theirs)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [5, 6, 7]}, "labels"),
        ({"labels": [5, 6, 7]}, "input_ids"),
        (
            {"input_ids": [5, 6, 7], "labels": [5, 6]},
            r"train_dataset\[2\]: .*'labels' has 2",
        ),
        (
            {"input_ids": [5, 6, 9999], "labels": [5, 6, 9999]},
            r"train_dataset\[2\]: .*9999",
        ),
        (
            {"input_ids": [5] * 65, "labels": [5] * 65},
            r"train_dataset\[2\]: .*65 tokens",
        ),
        (
            {"input_ids": [5, 6, 7], "labels": [-100] * 3},
            r"train_dataset\[2\]: .*no targets",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path: Path, row: dict[str, list[int]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        trainer(tmp_path, [*tiny.random_rows(2), row])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_steps": 0.1}, "save_steps"),
        ({"report_to": ["comet_ml"]}, "report_to"),
        ({"optim": "schedule_free_adamw"}, "optim"),
    ],
)
def test_values_of_transformers_arguments_that_cannot_be_honoured(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    theirs = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ConfigError, match=f"hf_train_args.{said}"):
        create_sft_trainer(tiny.make_model(), tiny.make_tokenizer(), ROWS, config(), theirs)


def test_schedule_arguments_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: do not fit linear"):
        trainer(tmp_path, lr_scheduler_kwargs={"foo": 1})


def test_a_reporter_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install wandb"):
        trainer(tmp_path, report_to="wandb")


@pytest.mark.parametrize(("packed", "least", "most"), [(True, 0.0, 0.0), (False, 0.05, 0.9)])
def test_padding_is_counted(tmp_path: Path, packed: bool, least: float, most: float) -> None:
    settings = config()
    settings.sequence_packing = packed
    model, training = tiny.make_model("llama"), arguments(tmp_path, per_device_train_batch_size=4)
    create_sft_trainer(model, tiny.make_tokenizer(), ROWS, settings, training).train()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    shares = [event["padding"] for event in events if event["event"] == "step"]
    assert len(shares) == STEPS
    assert least <= min(shares) <= max(shares) <= most


def test_memory_and_speed_are_in_every_event(tmp_path: Path) -> None:
    started = time.time()
    trainer(tmp_path).train()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    assert all(event["memory"] > 1e8 and event["target_tokens_per_second"] > 0 for event in steps)
    assert all(0 < event["data_wait"] < 1 and event["mfu"] is None for event in steps)
    assert steps[-1]["eta"] == 0
    assert steps[0]["time"] >= started - 1


@pytest.mark.parametrize(("took", "said"), [(5.1, ["the check of packing took 5.1s, usually at most 5s"]), (4.9, [])])
def test_a_check_of_packing_that_takes_long_says_so(
    took: float, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_check, "time", SimpleNamespace(monotonic=iter((10.0, 10.0 + took)).__next__))
    assert trainer(tmp_path, max_steps=1).train().steps == 1
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["seconds"] for event in events if event["event"] == "check"] == [took]
    notes = [event for event in events if event["event"] == "note" and "check" in event["message"]]
    assert [note["message"].partition(";")[0] for note in notes] == said
