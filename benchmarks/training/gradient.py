"""The gate: a leg is timed only if its gradient is that of single documents in float32 by plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COSINE, NORM = 0.999, 0.01
IGNORED = -100


def reference(model_folder: Path, adapter: Path | None, documents: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Of the mean loss of all targets: name -> gradient, float32, on the CPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager", device_map={"": device}
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    targets = sum(label != IGNORED for document in documents for label in document["labels"][1:])
    for document in documents:
        row, labels = (torch.tensor([document[name]], device=device) for name in ("input_ids", "labels"))
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum")
        (loss / targets).backward()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name, without what wrappers put before it, -> gradient."""
    return {
        _plain(name): parameter.grad.detach().float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """(cosine, norm of found / norm of expected) of the whole gradients."""
    if found.keys() != expected.keys():
        raise ValueError(f"other parameters have gradients: {sorted(found.keys() ^ expected.keys())[:4]}")
    dot = sum(float((found[name].double() * expected[name].double()).sum()) for name in expected)
    one, other = (sum(float(g.double().square().sum()) for g in of.values()) ** 0.5 for of in (found, expected))
    return dot / (one * other), one / other


def judged(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """{cosine, norm, passed}."""
    cosine, norm = agreement(found, expected)
    return {"cosine": cosine, "norm": norm, "passed": cosine > COSINE and abs(norm - 1) < NORM}


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".").replace("_orig_mod.", "")
