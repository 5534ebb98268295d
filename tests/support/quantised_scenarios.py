"""What ranks do when they train an adapter on weights in 4 bits: see `train_rank`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import tiny
import torch
from train_rank import history, make, weights
from transformers import AutoModelForCausalLM

from opensloth import model as product
from opensloth.opensloth_config import FastModelArgs

STEPS = 5
WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "one document a row": {"packed": False, "train_sampling_strategy": "sequential"},
}


def trained(out: Path) -> dict[str, dict[str, Any]]:
    """Of each way: the log; the adapter's weights, first and last; the weights in 4 bits, first and last.

    One rank, which is first, saves the model that all of them load.
    """
    folder, found = out.parent / "model", {}
    if not folder.exists():
        tiny.save(folder)
    for way, options in WAYS.items():
        rows, load = tiny.random_rows(8 * STEPS), functools.partial(_in_four_bits, folder)
        trainer = make(out / way, rows, load=load, max_steps=STEPS, adam_epsilon=1e-6, **options)
        adapter, frozen = weights(trainer), _stored(trainer.model)
        trainer.train()
        found[way] = {
            "history": history(trainer),
            "adapter": (adapter, weights(trainer)),
            "frozen": (frozen, _stored(trainer.model)),
        }
    return found


def _in_four_bits(folder: Path, _: str) -> Any:
    """Quantised as the product does it."""
    quantisation = product._quantisation(FastModelArgs(model_name=str(folder), load_in_4bit=True), torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, device_map={"": torch.device("cpu")}
    )
    for _, layer in _layers(base):
        layer.support_avx512bf16_for_cpu = False  # evaluating, some CPUs would pack the weights anew, rounded
    return base


def _stored(model: Any) -> dict[str, torch.Tensor]:
    """The weights in 4 bits, two in a byte."""
    return {name: layer.weight.data.clone() for name, layer in _layers(model)}


def _layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
