"""Answer the held-out orders with plain transformers and peft, and count the exact ones.

    python examples/quickstart/evaluate.py MODEL [--adapter RUN/final]

Nothing of oslo is imported: what `oslo` trained is an ordinary model and an ordinary adapter.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from make_data import DATA, Case, is_exact, read_cases
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

MAX_NEW_TOKENS = 44
"""An answer has about 30 tokens. What is not finished after 44 is wrong anyway."""


@torch.inference_mode()
def respond(model_folder: Path, adapter: Path | None, cases: Sequence[Case], dtype: torch.dtype) -> list[str]:
    """The most likely answer to each case, all in one batch.

    adapter: a folder that peft loads, with its tokenizer; None: the base model alone.
    """
    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter or model_folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    batch = tokenizer.apply_chat_template(
        [case.prompt() for case in cases],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    prompt_length = batch["input_ids"].shape[1]
    answers: list[str] = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a model, or a model with an adapter, on held-out orders.")
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter, <run>/final")
    parser.add_argument("--cases", type=Path, default=DATA / "heldout.jsonl")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    cases = read_cases(arguments.cases)
    answers = respond(arguments.model, arguments.adapter, cases, getattr(torch, arguments.dtype))
    right = [is_exact(text, case.order) for text, case in zip(answers, cases, strict=True)]
    for case, text, is_right in zip(cases, answers, right, strict=True):
        print("right" if is_right else "wrong", case.sentence, text.strip(), sep="\n  ")
    print(f"exact match: {sum(right)} of {len(cases)}")


if __name__ == "__main__":
    main()
