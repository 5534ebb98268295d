"""The peers' legs, each in a process of its own: TRL's SFT trainer, with Liger's kernels, and under Unsloth.

    python -m training.peer '{"assets": ..., "leg": ...}'

The last line of stdout is the result as JSON.
"""

# ruff: noqa: T201 (the parent reads it)

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training.assets import WARM, Assets, read


def main() -> None:
    asked = json.loads(sys.argv[1])
    assets = Assets(**{name: Path(path) for name, path in asked["assets"].items()})
    leg = asked["leg"]
    started = asked["started"]
    trainer = _trainer(assets, leg)
    if leg.get("gate"):
        _save_gradient(trainer, Path(leg["gate"]))
        print(json.dumps({}))
        return
    import torch

    clock = _Clock(trainer)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    print(json.dumps({**clock.result(), "first_step_seconds": clock.first - started}))


def _trainer(assets: Assets, leg: dict[str, Any]) -> Any:
    unsloth = leg["peer"] == "unsloth"
    if unsloth:
        import unsloth as _  # noqa: F401 (it has to come before what it patches)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = (_unsloth_model if unsloth else _model)(assets, leg)
    documents = read(assets.gate if leg.get("gate") else assets.train)
    half = (leg["steps"] + WARM) // 2
    within: dict[str, Any] = {"save_strategy": "no"}
    if leg.get("within"):
        within = {"save_steps": half, "eval_strategy": "steps", "eval_steps": half}
    out = tempfile.mkdtemp()
    arguments = SFTConfig(
        output_dir=out, max_length=leg["row"], packing=True, per_device_train_batch_size=leg["rows"],
        gradient_accumulation_steps=1, max_steps=leg["steps"] + WARM, learning_rate=1e-5, warmup_steps=0,
        lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0, bf16=True, logging_steps=1,
        report_to="tensorboard", dataloader_num_workers=2, seed=0, use_liger_kernel=leg["peer"] == "trl+liger",
        gradient_checkpointing=leg["recompute"] and not unsloth,
        gradient_checkpointing_kwargs={"use_reentrant": False}, torch_compile=bool(leg.get("compile")), **within,
    )  # fmt: skip
    evaluation = _dataset(Dataset, read(assets.evaluation)) if leg.get("within") else None
    return SFTTrainer(
        model=model, processing_class=tokenizer, args=arguments, train_dataset=_dataset(Dataset, documents),
        eval_dataset=evaluation,
    )  # fmt: skip


def _dataset(kind: Any, documents: list[list[int]]) -> Any:
    return kind.from_dict({"input_ids": documents, "labels": documents})


def _model(assets: Assets, leg: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        assets.model, dtype=torch.bfloat16, attn_implementation=leg["attention"], device_map={"": 0}
    )
    if not leg.get("full"):
        model = PeftModel.from_pretrained(model, str(assets.adapter), is_trainable=True)
        if leg["recompute"]:
            model.enable_input_require_grads()
    return model, AutoTokenizer.from_pretrained(assets.model)


def _unsloth_model(assets: Assets, leg: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    from training.assets import TARGETS

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(assets.model), max_seq_length=leg["row"], dtype=torch.bfloat16, load_in_4bit=False,
        full_finetuning=bool(leg.get("full")), local_files_only=True,
    )  # fmt: skip
    if not leg.get("full"):
        model = FastLanguageModel.get_peft_model(
            model, r=8, lora_alpha=16, lora_dropout=0, target_modules=TARGETS, random_state=0,
            use_gradient_checkpointing="unsloth" if leg["recompute"] else False,
        )  # fmt: skip
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(assets.adapter / "adapter_model.safetensors"))
    return model, tokenizer


class _Clock:
    """Counts tokens that are no padding, and the seconds from the last warm step to the end."""

    def __init__(self, trainer: Any) -> None:
        self.first = self._since = self._until = 0.0
        self._steps = self._tokens = 0
        self._loss = None
        inner = trainer.training_step

        def step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            tokens = _tokens(inputs)
            loss = inner(model, inputs, *rest, **named)
            self._count(tokens)
            return loss

        trainer.training_step = step

    def _count(self, tokens: int) -> None:
        import torch

        self._steps += 1
        if self._steps in (1, WARM):
            torch.cuda.synchronize()
        if self._steps == 1:
            self.first = time.time()
        if self._steps == WARM:
            self._since = time.perf_counter()
        elif self._steps > WARM:
            self._tokens += tokens
            self._until = time.perf_counter()

    def result(self) -> dict[str, Any]:
        import torch

        torch.cuda.synchronize()
        seconds = time.perf_counter() - self._since
        return {
            "tokens_per_second": self._tokens / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }


def _tokens(inputs: Any) -> int:
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    return int(inputs["input_ids"].numel())


def _save_gradient(trainer: Any, path: Path) -> None:
    """Of one step on the gate's documents, as this trainer packs them."""
    import torch

    from training.gradient import gradients

    model = trainer.model
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    targets = int((batch["labels"][..., 1:] != -100).sum())
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, batch, torch.tensor(targets, device="cuda"))
    torch.save(gradients(model), path)


if __name__ == "__main__":
    main()
