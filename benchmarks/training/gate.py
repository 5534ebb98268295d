"""The gate's own process: makes a model if it is not there, the reference gradient, and compares oslo's with it.

    python -m training.gate '{"assets": ..., "shape": ..., "reference": FILE, "legs": [...]}'

Peers compare theirs with the file, each in a process of its own (peer.py).
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from opensloth import engine, hardware
from opensloth.data.batch import flat_batch
from opensloth.data.in_memory import InMemoryDocuments
from opensloth.data.training_data import make_rows
from opensloth.dist import World
from opensloth.fused import long_documents
from opensloth.isolation import isolate_documents
from opensloth.model import load_model, vocabulary_of
from opensloth.step import accumulate_gradients
from training import ballast, gradient, process
from training.assets import Assets, make_model, read
from training.legs import Leg
from training.oslo import config_of

LONG = 600
"""Tokens from which on one of the gate's documents stands for those that fill a row: some have more."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    assets = Assets(**{name: Path(path) for name, path in asked["assets"].items()})
    legs = [Leg(**leg) for leg in asked["legs"]]
    make_model(assets, asked["shape"])
    process.say("model made")
    reference = Path(asked["reference"])
    if not reference.exists():
        adapter = None if asked["full"] else assets.adapter
        torch.save(gradient.reference(assets.model, adapter, read(assets.gate)), reference)
        _free()
        process.say("reference gradient made")
    expected = torch.load(reference, weights_only=True)
    verdicts = {}
    for leg in legs:
        verdicts[leg.kind] = gradient.judged(own_gradient(assets, leg), expected)
        process.say(f"{leg.kind}: {verdicts[leg.kind]}")
    for leg in [leg for leg in legs if leg is legs[0] or leg.length]:  # of each way to attend
        leaked = gradient.judged(own_gradient(assets, leg, leak=True), expected)
        process.say(f"documents that see each other, which must fail: {leaked}")
        if leaked["passed"]:
            raise SystemExit("the gate does not see a leak: nothing is timed")
    process.answer(verdicts)


def own_gradient(assets: Assets, leg: Leg, *, leak: bool = False) -> dict[str, Any]:
    """By the engine that would train, in the memory that it would have."""
    with ballast.held(leg.room_gib, beside=0), _long_from(LONG if leg.length else None):
        return _own_gradient(assets, leg, leak=leak)


@contextlib.contextmanager
def _long_from(tokens: int | None) -> Iterator[None]:
    """While documents of so many tokens are treated as those are that fill a row; None: as they would be."""
    with mock.patch.object(long_documents, "LEAST", tokens or long_documents.LEAST):
        yield


def _own_gradient(assets: Assets, leg: Leg, *, leak: bool) -> dict[str, Any]:
    config = config_of(assets, assets.model.parent / "runs" / "gate", leg, timed=1)
    config, _ = hardware.bring_in_line(config, hardware.detect(config.training))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(config.opensloth, device, bf16=bool(config.training.bf16))
    rows = read(assets.gate)
    documents = InMemoryDocuments(rows, name="gate", vocabulary=vocabulary_of(model), max_length=leg.row)
    longest = max(len(row["input_ids"]) for row in rows)
    isolate_documents(model, longest)
    packed = make_rows(documents, leg.row, packed=True, pad_id=0)
    autocast = torch.bfloat16 if config.training.bf16 else None
    objective, _ = engine.choose(
        model,
        packed,
        config.opensloth,
        optim=config.training.optim,
        longest_document=longest,
        rows_per_batch=leg.rows,
        autocast=autocast,
    )
    batch = flat_batch(documents, np.arange(len(rows)))
    if leak:
        batch.inputs["document_offsets"] = batch.inputs["document_offsets"][[0, -1]]
        batch.inputs["longest_document"] = batch.tokens
    accumulate_gradients(objective, [batch], World(0, 0, 1, device))
    found = gradient.gradients(model)
    del model, objective
    _free()
    return found


def _free() -> None:
    """What is no longer referred to; the next model needs the room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
