"""The steps of the fast path alone, way by way of keeping, beside what `oslo validate` predicts of them.

    python benchmarks/steps.py --shape 7b --keep all,inputs,host,host:7,host_inputs [--full] [--optim adamw_8bit]

A step is batch, forward, backward, clipping and optimizer, in a bare loop over a few batches. `host:7` keeps the MLPs
of 7 layers too, `inputs:7` all of 7. Random weights; it needs a CUDA GPU with room for the model and its optimizer (on
a CPU `--shape tiny` shows whether it works).
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from training import assets as made  # noqa: E402
from training.legs import OSLO, ROW, Leg  # noqa: E402

from opensloth import attention, memory_estimate, speed_estimate  # noqa: E402 (needs the path)
from opensloth.data.batch import Batch  # noqa: E402
from opensloth.data.in_memory import InMemoryDocuments  # noqa: E402
from opensloth.data.training_data import make_rows  # noqa: E402
from opensloth.fused import long_documents  # noqa: E402
from opensloth.fused.model import FusedModel  # noqa: E402
from opensloth.memory_estimate import GIB, Keep, Keeping, Method  # noqa: E402
from opensloth.model import attach_adapter, base_of, trainable_parameters  # noqa: E402
from opensloth.model_shape import ModelShape  # noqa: E402
from opensloth.opensloth_config import LORA_TARGETS, FastModelArgs, LoraArgs, OpenSlothConfig  # noqa: E402
from opensloth.optimizer import make_optimizer  # noqa: E402
from opensloth.training_keys import moment_bytes  # noqa: E402
from runner.gpu import Gpu  # noqa: E402

BATCHES, WARM_TURNS = 4, 2
RANK = 8
ON_GPU = torch.cuda.is_available()
GPU = torch.cuda.get_device_name() if ON_GPU else "no GPU"


def main() -> None:
    asked = arguments()
    leg = Leg(
        program=OSLO,
        shape=asked.shape,
        rows=asked.rows,
        row=asked.row,
        length=asked.length,
        full=asked.full,
        target_share=asked.target_share,
    )
    print(f"{GPU}, torch {torch.__version__}; {leg.name}, {asked.optim}", flush=True)
    model, batches = model_of(leg), batches_of(leg)
    tokens = sum(batch.tokens for batch in batches) / BATCHES
    for keeping in asked.keep:
        seconds, peak = measured(model, batches, keeping, asked.optim, asked.turns)
        peak_foreseen, rate_foreseen = predicted(model, leg, batches, keeping, moment_bytes(asked.optim))
        print(
            f"{keeping}: {seconds * 1e3:.1f} ms a step; {tokens / seconds:,.0f} tokens/s, predicted {rate_foreseen}; "
            f"peak {peak / GIB:.2f} GiB, predicted {peak_foreseen / GIB:.2f}",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Steps of the fast path alone, on one GPU.")
    parser.add_argument("--shape", choices=made.SHAPES, default="0.5b")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--row", type=int, default=ROW, help="tokens of a packed row")
    parser.add_argument("--length", type=int, help="tokens of every document; else log-normal")
    parser.add_argument("--target-share", type=float, default=1.0)
    parser.add_argument("--full", action="store_true", help="every weight is trained")
    parser.add_argument("--optim", choices=("adamw_torch_fused", "adamw_8bit"), default="adamw_torch_fused")
    parser.add_argument("--keep", type=_keepings, default=[Keeping(Keep.ALL)])
    parser.add_argument("--turns", type=int, default=4, help=f"timed turns of {BATCHES} steps")
    asked = parser.parse_args()
    layers = made.SHAPES[asked.shape]["num_hidden_layers"]
    if too_many := [keeping for keeping in asked.keep if not 0 <= keeping.whole < layers]:
        parser.error(f"--keep: {too_many[0]}: {asked.shape} has {layers} layers")
    return asked


def _keepings(text: str) -> list[Keeping]:
    try:
        ways = [part.partition(":") for part in text.split(",")]
        return [Keeping(Keep[name.upper()], int(whole or 0)) for name, _, whole in ways]
    except (KeyError, ValueError):
        names = ", ".join(keep.name.lower() for keep in Keep)
        raise argparse.ArgumentTypeError(f"{text}: not of {names}, each with or without :LAYERS") from None


def model_of(leg: Leg) -> Any:
    """On the GPU, as a run loads it: float32 if all of it is trained."""
    base = made.random_model(leg.shape, torch.float32 if leg.full else torch.bfloat16)
    lora, args = None if leg.full else LoraArgs(r=RANK), FastModelArgs(model_name="-", full_finetuning=leg.full)
    model = attach_adapter(base, OpenSlothConfig(data_cache_path="-", fast_model_args=args, lora_args=lora))
    attention.register()
    base.set_attn_implementation(attention.NAME)
    return model


def batches_of(leg: Leg) -> list[Batch]:
    with tempfile.TemporaryDirectory() as folder:
        assets = made.place(Path(folder), leg, BATCHES)
        made.write_documents(assets, leg, BATCHES)
        rows = made.read(assets.train)
    vocabulary = made.SHAPES[leg.shape]["vocab_size"]
    documents = InMemoryDocuments(rows, name="steps", vocabulary=vocabulary, max_length=leg.row)
    packed = make_rows(documents, leg.row, packed=True, pad_id=0)
    return [packed.batch(np.arange(i * leg.rows, (i + 1) * leg.rows)) for i in range(BATCHES)]


def measured(model: Any, batches: list[Batch], keeping: Keeping, optim: str, turns: int) -> tuple[float, int]:
    """Seconds of a step, and the most bytes that torch has allocated on the GPU."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    named = TrainingArguments(output_dir=tempfile.gettempdir(), optim=optim, learning_rate=1e-5)
    optimizer = make_optimizer(trainable_parameters(model), named, flat_gradients=True)
    base, longest = base_of(model), max(batch.inputs["longest_document"] for batch in batches)
    long_document, _ = long_documents.least_for(base, longest)
    full = max(batch.tokens for batch in batches)
    fused = FusedModel(base, keeping=keeping, full_batch=full, long_document=long_document)
    started = 0.0
    for turn in range(WARM_TURNS + turns):
        if turn == WARM_TURNS:
            started = now()
        for batch in batches:
            fused.begin_step()
            fused.accumulate(batch, 1 / len(batch.targets))
            fused.clip(1.0)
            optimizer.step()
    seconds = (now() - started) / (turns * len(batches))
    fused.release()
    return seconds, torch.cuda.max_memory_allocated() if ON_GPU else 0


def now() -> float:
    """Seconds, once all that was launched is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def predicted(model: Any, leg: Leg, batches: list[Batch], keeping: Keeping, moments: int) -> tuple[int, str]:
    """Bytes, and tokens a second if the card is known."""
    shape = ModelShape.from_config(base_of(model).config.to_dict())
    method = Method(0 if leg.full else RANK, () if leg.full else LORA_TARGETS, 16, moments, fused=True)
    tokens = leg.rows * leg.row
    batch = memory_estimate.Batch(tokens, round(tokens * leg.target_share))
    foreseen = memory_estimate.estimate(shape, method, batch, keeping).peak
    product = Gpu(GPU, None, "torch").product
    if product is None or product.card is None:
        return foreseen, "nothing (an unknown GPU)"
    count = sum(len(batch.inputs["document_offsets"]) - 1 for batch in batches)
    step = speed_estimate.Step(batch, 1, sum(batch.tokens for batch in batches) / count, leg.row)
    return foreseen, f"{speed_estimate.tokens_per_second(shape, method, step, keeping, product.card):,.0f}"


if __name__ == "__main__":
    main()
