"""The peers' legs, each in a process of its own: TRL's SFT trainer, with Liger's kernels, and under Unsloth.

    python -m training.peer '{"assets": ..., "leg": ..., "steps": 200, "started": SECONDS, "reference": FILE or null}'

With a reference gradient it only compares its own with that.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training import process
from training.assets import Assets, read
from training.legs import WARM, Leg


def main() -> None:
    asked = json.loads(sys.argv[1])
    assets = Assets(**{name: Path(path) for name, path in asked["assets"].items()})
    leg = Leg(**asked["leg"])
    timed = asked["steps"]
    if leg.peer == "unsloth":
        import unsloth as _  # noqa: F401 (it has to come before what it patches)
    import torch
    import trl as _trl  # noqa: F401 (so that its time shows)

    process.say("imported")
    if leg.attention == "flash_attention_4":
        _give_flash_whole_numbers()
    model, tokenizer = (_unsloth_model if leg.peer == "unsloth" else _model)(assets, leg)
    process.say("model loaded")
    trainer = _trainer(assets, leg, timed, model, tokenizer, gate=bool(asked["reference"]))
    process.say("data prepared")
    if asked["reference"]:
        process.answer(_gate(trainer, Path(asked["reference"])))
        return
    clock = _clock(trainer, leg)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    process.answer({**clock.result(), "first_step_seconds": clock.first - asked["started"]})


def _give_flash_whole_numbers() -> None:
    """flash-attn-4 4.0.0b36 fails on the numbers of another kind that transformers gives it as the longest lengths."""
    import functools

    from flash_attn import cute

    attend = cute.flash_attn_varlen_func

    @functools.wraps(attend)
    def with_whole_numbers(*given: Any, **named: Any) -> Any:
        longest = {name: int(named[name]) for name in ("max_seqlen_q", "max_seqlen_k") if named.get(name) is not None}
        return attend(*given, **named | longest)

    cute.flash_attn_varlen_func = with_whole_numbers


def _trainer(assets: Assets, leg: Leg, timed: int, model: Any, tokenizer: Any, *, gate: bool) -> Any:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    within: dict[str, Any] = {"save_strategy": "no"}
    if leg.within:
        once = leg.middle(timed)
        within = {"save_steps": once, "eval_strategy": "steps", "eval_steps": once}
    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=leg.row, packing=True, per_device_train_batch_size=leg.rows,
        gradient_accumulation_steps=1, max_steps=leg.steps(timed), learning_rate=1e-5, warmup_steps=0,
        lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0, bf16=cuda, use_cpu=not cuda,
        logging_steps=1, report_to="tensorboard", dataloader_num_workers=2, seed=0, disable_tqdm=True,
        use_liger_kernel=leg.peer == "trl+liger", per_device_eval_batch_size=1, eval_packing=True,
        gradient_checkpointing=leg.recompute != "off" and leg.peer != "unsloth",
        gradient_checkpointing_kwargs={"use_reentrant": False}, torch_compile=leg.compiled, **within,
    )  # fmt: skip
    other = assets.gate if gate else assets.evaluation if leg.within else None
    return SFTTrainer(
        model=model, processing_class=tokenizer, args=arguments,
        train_dataset=Dataset.from_list(read(assets.train)),
        eval_dataset=Dataset.from_list(read(other)) if other else None,
    )  # fmt: skip


def _model(assets: Assets, leg: Leg) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(
        assets.model, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation=leg.attention,
        device_map={"": 0 if cuda else "cpu"},
    )  # fmt: skip
    if not leg.full:
        model = PeftModel.from_pretrained(model, str(assets.adapter), is_trainable=True)
        if leg.recompute != "off":
            model.enable_input_require_grads()
    return model, AutoTokenizer.from_pretrained(assets.model)


def _unsloth_model(assets: Assets, leg: Leg) -> tuple[Any, Any]:
    import torch
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    from training.assets import TARGETS

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(assets.model), max_seq_length=leg.row, dtype=torch.bfloat16, load_in_4bit=False,
        full_finetuning=leg.full, local_files_only=True,
    )  # fmt: skip
    if not leg.full:
        model = FastLanguageModel.get_peft_model(
            model, r=8, lora_alpha=16, lora_dropout=0, target_modules=TARGETS, random_state=0,
            use_gradient_checkpointing="unsloth" if leg.recompute != "off" else False,
        )  # fmt: skip
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(assets.adapter / "adapter_model.safetensors"))
    return model, tokenizer


def _gate(trainer: Any, reference: Path) -> dict[str, Any]:
    """Of one step on the gate's documents, as this trainer packs them."""
    import torch

    from training import gradient

    model = trainer.model
    model.train()
    batch = next(iter(trainer.get_eval_dataloader()))
    targets = (batch["labels"][..., 1:] != gradient.IGNORED).sum()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, batch, targets)
    return gradient.judged(gradient.gradients(model), torch.load(reference, weights_only=True))


def _clock(trainer: Any, leg: Leg) -> Any:
    """Counts tokens that are no padding, and the seconds from the end of the last warm step to that of the last one."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        first = since = until = 0.0
        tokens = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            step = state.global_step
            if step in (1, WARM, state.max_steps):
                _wait()
                self.first = self.first or time.time()
                self.until = time.perf_counter()
            if step == WARM:
                self.since, self.tokens = self.until, 0
            if process.worth_saying(step):
                passed = time.perf_counter() - self.since
                process.say(f"step {step}" + (f", {self.tokens / passed:,.0f} tokens/s" if step > WARM else ""))

        def result(self) -> dict[str, Any]:
            peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            rate = {} if leg.start else {"tokens_per_second": self.tokens / (self.until - self.since)}
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return {**rate, "peak_gib": peak, "loss": losses[-1]}

    clock = Clock()
    inner = trainer.training_step

    def step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        clock.tokens += _tokens(inputs)
        return inner(model, inputs, *rest, **named)

    trainer.training_step = step
    trainer.add_callback(clock)
    return clock


def _wait() -> None:
    """For the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tokens(inputs: Any) -> int:
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    return int(inputs["input_ids"].numel())


if __name__ == "__main__":
    main()
