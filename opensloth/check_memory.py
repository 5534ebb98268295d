"""What a check at the start found, kept for the next start with the same model, backend and versions.

One small file each under `<root>/checks`; whatever is not the same is looked at again. Of the weights the first
elements of each tensor are compared, so that no model is read whole: one that was trained in between differs there
too, while two that differ in nothing but other elements are taken for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from opensloth.contract import ROOT_ENV
from opensloth.files import read_json, write_json
from opensloth.fingerprint import file_sha256
from opensloth.model import base_of

FOLDER = "checks"
SAMPLED = 16
"""Elements of each weight that tell one model from another: of the first row, or from the first on where rows are
shorter."""


class CheckMemory:
    """Remembers the figures of one check of one model as it will train here."""

    def __init__(self, check: str, model: nn.Module, *, engine: str, autocast: torch.dtype | None) -> None:
        """check: its name. model: adapted and switched as it will train. autocast: None: the weights' own type."""
        self._identity = (
            _backend(model, autocast) | {"engine": engine} | {"model": _model_sha256(model), "code": _code_sha256()}
        )
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        root = Path(os.environ.get(ROOT_ENV) or Path.home() / ".oslo")
        self._file = root / FOLDER / f"{check}-{digest[:16]}.json"

    def recall(self) -> dict[str, Any] | None:
        """The figures, or None when there are none of exactly this."""
        with contextlib.suppress(OSError):
            kept = read_json(self._file)
            if isinstance(kept, dict) and kept.get("of") == self._identity and isinstance(kept.get("found"), dict):
                return dict(kept["found"])
        return None

    def remember(self, found: dict[str, Any]) -> None:
        """Keep the figures; where nothing can be written the check is made again next time."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"of": self._identity, "found": found})


def _backend(model: nn.Module, autocast: torch.dtype | None) -> dict[str, Any]:
    device = base_of(model).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": base_of(model).config._attn_implementation,
        "autocast": str(autocast),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


@torch.no_grad()
def _model_sha256(model: nn.Module) -> str:
    """Of the config, and of name, shape, type, trainability and the first SAMPLED elements of each weight.

    It takes milliseconds.
    """
    config = base_of(model).config.to_dict()
    config.pop("_name_or_path", None)  # the same model elsewhere is the same model
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    elements = []
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {weight.requires_grad}\n".encode())
        elements.append(_first(weight).double())
    digest.update(torch.cat(elements).cpu().numpy().tobytes())
    return digest.hexdigest()


def _code_sha256() -> str:
    """Of this package's source: a changed line may change what the check would find."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256("\n".join(file_sha256(file) for file in files).encode()).hexdigest()


def _first(weight: torch.Tensor) -> torch.Tensor:
    """Its first elements; of wide rows the first row's, for weights may lie in wider buffers: no copy of them whole."""
    row = weight[(0,) * (weight.ndim - 1)] if weight.ndim > 1 and weight.shape[-1] >= SAMPLED else weight.reshape(-1)
    return row[:SAMPLED]
