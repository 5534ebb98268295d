"""Tokens per second of training on one GPU: oslo and its peers, interleaved, on the same documents.

    python benchmarks/train.py 0.5b --rows 2 --repeat 3
    python benchmarks/train.py 7b --rows 2 --peers trl+liger/flex,unsloth --recompute
    python benchmarks/train.py 0.5b --row 16384 --rows 1 --length 16384

A leg is timed only after its gradient has been compared with that of single documents in float32. It needs a CUDA
GPU, and trl, liger-kernel and unsloth for the peers: what is not installed is left out, and said.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

PEERS = ("trl/sdpa", "trl+liger/sdpa", "trl+liger/flex", "unsloth")
ATTENTION = {"sdpa": "sdpa", "flex": "flex_attention", "flash": "flash_attention_2"}
PACKAGES = {"trl": ["trl"], "trl+liger": ["trl", "liger_kernel"], "unsloth": ["unsloth"]}
VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "liger_kernel", "unsloth", "xformers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed on one GPU, oslo beside its peers.")
    parser.add_argument("shape", choices=["tiny", "0.5b", "1.5b", "7b"], help="Qwen2.5's, with random weights")
    parser.add_argument("--rows", type=int, default=2, help="packed rows a step")
    parser.add_argument("--row", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--length", type=int, help="of every document; left out: log-normal, median 350")
    parser.add_argument("--steps", type=int, default=200, help="timed steps")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="train every weight instead of an adapter")
    parser.add_argument("--recompute", choices=["off", "on", "host"], default="off")
    parser.add_argument("--within", action="store_true", help="one checkpoint and one evaluation within")
    parser.add_argument("--peers", default=",".join(PEERS), help="with commas; empty: none")
    parser.add_argument("--no-gate", action="store_true", help="only to look at speed: nothing is proved")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "oslo-benchmark")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    return parser.parse_args()


def main() -> None:
    from training import assets as made
    from training import oslo

    asked = arguments()
    tokens = (asked.steps + 30) * asked.rows * asked.row
    documents = max(50, min(6000, tokens // (asked.length or 480)))
    assets = made.make(asked.folder, asked.shape, documents, asked.row, asked.length)
    legs = {"oslo": leg_of(asked, "oslo")} | {
        name: leg_of(asked, name) for name in filter(None, asked.peers.split(",")) if _installed(name)
    }
    if not asked.no_gate and not asked.full:
        legs = gated(legs, assets, asked)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in legs}
    for turn in range(asked.repeat):
        for name, leg in legs.items():
            try:
                if name == "oslo":
                    result = oslo.run(assets, asked.folder / "runs" / f"{time.time_ns()}", leg)
                else:
                    result = peer(assets, leg)
            except RuntimeError as error:
                print(f"{name}: failed: {str(error)[-1500:]}", flush=True)
                continue
            results[name].append(result)
            figures = ", ".join(f"{k} {v:,.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
            print(f"turn {turn + 1}  {name}: {figures}", flush=True)
    report(asked, results)


def leg_of(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    peer_name, _, attention = name.partition("/")
    recompute: Any = {"off": False, "on": True, "host": "unsloth" if name == "oslo" else True}[asked.recompute]
    return {
        "peer": peer_name, "attention": ATTENTION.get(attention, "sdpa"), "rows": asked.rows, "row": asked.row,
        "steps": asked.steps, "full": asked.full, "recompute": recompute, "within": asked.within,
    }  # fmt: skip


def gated(legs: dict[str, Any], assets: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """The legs whose gradient is right; what the others' was is said."""
    import torch
    from training import gradient
    from training.assets import read

    expected = gradient.reference(assets.model, assets.adapter, read(assets.gate))
    torch.cuda.empty_cache()
    kept = {}
    for name, leg in legs.items():
        found = own_gradient(assets, leg) if name == "oslo" else peer_gradient(assets, leg, asked.folder)
        if found is None:
            continue
        cosine, norm = gradient.agreement(found, expected)
        right = gradient.passes(cosine, norm)
        print(
            f"gate  {name}: gradient cosine {cosine:.5f}, norm {norm:.4f}{'' if right else ': not timed'}", flush=True
        )
        if right:
            kept[name] = leg
    leaked = gradient.agreement(own_gradient(assets, legs["oslo"], leak=True), expected)
    print(f"gate  documents that see each other: cosine {leaked[0]:.3f}, norm {leaked[1]:.3f}: must fail", flush=True)
    if gradient.passes(*leaked):
        raise SystemExit("the gate does not see a leak: nothing is timed")
    return kept


def own_gradient(assets: Any, leg: dict[str, Any], *, leak: bool = False) -> dict[str, Any]:
    """By the engine that would train."""
    import numpy as np
    import torch
    from training.assets import read
    from training.gradient import gradients
    from training.oslo import config_of

    from opensloth import engine, hardware
    from opensloth.data.batch import flat_batch
    from opensloth.data.in_memory import InMemoryDocuments
    from opensloth.data.training_data import make_rows
    from opensloth.dist import World
    from opensloth.isolation import isolate_documents
    from opensloth.model import load_model, vocabulary_of
    from opensloth.step import accumulate_gradients

    config = config_of(assets, assets.model.parent / "runs" / "gate", leg)
    config, _ = hardware.bring_in_line(config, hardware.detect(config.training))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(config.opensloth, device, bf16=bool(config.training.bf16))
    ids = read(assets.gate)
    rows = [{"input_ids": i, "labels": i} for i in ids]
    documents = InMemoryDocuments(rows, name="gate", vocabulary=vocabulary_of(model), max_length=leg["row"])
    isolate_documents(model, max(map(len, ids)))
    packed = make_rows(documents, leg["row"], packed=True, pad_id=0)
    autocast = torch.bfloat16 if config.training.bf16 else None
    objective, _ = engine.choose(model, packed, config.opensloth, rows_per_batch=leg["rows"], autocast=autocast)
    batch = flat_batch(documents, np.arange(len(ids)))
    if leak:
        batch.inputs["document_offsets"] = batch.inputs["document_offsets"][[0, -1]]
        batch.inputs["longest_document"] = batch.tokens
    accumulate_gradients(objective, [batch], World(0, 0, 1, device))
    return gradients(model)


def peer_gradient(assets: Any, leg: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    import torch

    file = folder / f"gradient-{time.time_ns()}.pt"
    try:
        peer(assets, {**leg, "gate": str(file), "rows": 1})
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found
    except RuntimeError as error:
        print(f"gate  {leg['peer']}/{leg['attention']}: failed: {str(error)[-1500:]}", flush=True)
        return None
    finally:
        file.unlink(missing_ok=True)


def peer(assets: Any, leg: dict[str, Any]) -> dict[str, Any]:
    """One run in a fresh process. Raises RuntimeError with the end of its output."""
    given = {"assets": {k: str(v) for k, v in vars(assets).items()}, "leg": leg, "started": time.time()}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-m", "training.peer", json.dumps(given)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr)
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def report(asked: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    import torch

    rates = {name: [r["tokens_per_second"] for r in of] for name, of in results.items() if of}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = "every weight" if asked.full else "LoRA r=8"
    documents = f"documents of {asked.length}" if asked.length else "documents of median 350"
    print(f"\n{asked.shape}, {what}, {asked.rows} rows of {asked.row}, {documents}, recompute {asked.recompute}, {gpu}")
    print("| | tok/s, median | range | peak GiB | first step after |\n|---|---|---|---|---|")
    for name, of in results.items():
        if of:
            peak = max(r["peak_gib"] for r in of)
            first = statistics.median(r["first_step_seconds"] for r in of)
            low, high = min(rates[name]), max(rates[name])
            median = statistics.median(rates[name])
            print(f"| {name} | {median:,.0f} | {low:,.0f} to {high:,.0f} | {peak:.2f} | {first:.0f} s |")
    peers = {name: statistics.median(of) for name, of in rates.items() if name != "oslo"}
    if peers and "oslo" in rates:
        best = max(peers, key=lambda name: peers[name])
        print(f"\noslo / best peer ({best}): {statistics.median(rates['oslo']) / peers[best]:.2f}")
    if asked.results:
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) for k, v in vars(asked).items() if k not in ("folder", "results")}
        record = {"date": dt.date.today().isoformat(), "gpu": gpu, "versions": _versions(), "settings": settings}
        asked.results.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


def _installed(name: str) -> bool:
    for package in PACKAGES[name.partition("/")[0]]:
        try:
            version(package)
        except PackageNotFoundError:
            print(f"{name}: left out: {package} is not installed")
            return False
    return True


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
