"""SmolLM2 in a file of 45 MB, for a GPU host that can be handed no more: `python tests/support/cut_smollm2.py FILE`.

All its layers, whose weights are rounded to 3 bits, and the embeddings of the tokens that its documents use, which are
renumbered. It is a worse model of English than the whole one, by about 1.5 nats, but a pretrained one in its depth and
in the spread of its weights and activations. The documents lie beside the weights: no tokenizer is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import smollm2
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

BITS, GROUP = 3, 64
_POWERS = torch.tensor([1 << bit for bit in reversed(range(BITS))])
_DOCS = Path(__file__).parents[2]
TEXTS = ("README.md", "docs/training.md", "docs/data.md", "docs/launcher.md")
CHARACTERS, PIECES = 1200, 3
"""Of a document; documents of each text."""


def documents(folder: Path) -> list[list[int]]:
    """Token ids of English text, by the tokenizer in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [(_DOCS / name).read_text() for name in TEXTS]
    pieces = [text[i * CHARACTERS : (i + 1) * CHARACTERS] for text in texts for i in range(PIECES)]
    return [tokenizer(piece)["input_ids"] for piece in pieces]


def cut(folder: Path, file: Path) -> None:
    """Write the model in `folder`, and its documents, into one file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = documents(folder)
    used = sorted({token for document in ids for token in document})
    number = {token: i for i, token in enumerate(used)}
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if "embed_tokens" in name:
            tensors[name] = weight[used].to(torch.bfloat16)
        elif weight.ndim == 2 and "layers" in name:
            tensors |= {f"{name}.{part}": value for part, value in _packed(weight).items()}
        elif name != "lm_head.weight":  # the embeddings again
            tensors[name] = weight.to(torch.bfloat16)
    config = model.config.to_dict() | {"vocab_size": len(used)}
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[special] = 0
    renumbered = [[number[token] for token in document] for document in ids]
    save_file(tensors, file, {"config": json.dumps(config), "documents": json.dumps(renumbered)})


def restore(file: Path, folder: Path) -> list[list[int]]:
    """Write what `cut` has left into `folder` as transformers reads it; returns the documents' token ids."""
    with safe_open(file, "pt") as stored:
        names, metadata = set(stored.keys()), stored.metadata()
        config = LlamaConfig(**json.loads(metadata["config"]))
        state = {name: stored.get_tensor(name) for name in names if not name.endswith((".codes", ".low", ".step"))}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        for name in {name.removesuffix(".codes") for name in names if name.endswith(".codes")}:
            parts = {part: stored.get_tensor(f"{name}.{part}") for part in ("codes", "low", "step")}
            state[name] = _whole(**parts).view(shapes[name]).to(torch.bfloat16)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    found: list[list[int]] = json.loads(metadata["documents"])
    return found


def _packed(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.reshape(-1, GROUP)
    low = groups.amin(1, keepdim=True).half()
    step = ((groups.amax(1, keepdim=True) - low) / (2**BITS - 1)).half()
    codes = ((groups - low) / step).round().clamp(0, 2**BITS - 1).to(torch.int64)
    bits = (codes[..., None] & _POWERS > 0).to(torch.uint8).numpy()
    return {"codes": torch.from_numpy(np.packbits(bits)), "low": low, "step": step}


def _whole(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    bits = torch.from_numpy(np.unpackbits(codes.numpy())).view(-1, GROUP, BITS)
    return (bits * _POWERS).sum(-1) * step.float() + low.float()


if __name__ == "__main__":
    cut(smollm2.folder(), Path(sys.argv[1]))
