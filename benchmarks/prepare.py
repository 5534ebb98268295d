"""Rows per second from a JSON-lines file to a prepared dataset: oslo beside TRL, interleaved, on the same rows.

    python benchmarks/prepare.py [--rows 20000] [--repeat 3]

Both tokenise the same conversations with the same tokenizer and mask all but what the assistant says: oslo as
`python -m opensloth.data build` does it, imports left out; TRL by prompt and completion, the masks of its own
that are exact without generation tags, with its best of one and two processes.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))


def write_rows(path: Path, count: int) -> None:
    """The quickstart's conversations, over and over, each with a number of its own."""
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()]
    with path.open("w") as stream:
        for i in range(count):
            *before, user, answer = rows[i % len(rows)]["messages"]
            numbered = {**user, "content": f"{user['content']} (order {i})"}
            stream.write(json.dumps({"messages": [*before, numbered, answer]}) + "\n")


def oslo(data: Path, model: Path, cache: Path) -> float:
    """Seconds of one build into an empty cache."""
    from opensloth import run_config
    from opensloth.data.build import build

    config, problems = run_config.check(
        {
            "name": "bench",
            "opensloth": {"data_cache_path": str(cache), "fast_model_args": {"model_name": str(model)}},
            "dataset": {"path": str(data)},
        }
    )
    assert config is not None, problems
    started = time.perf_counter()
    build(config, lambda *_, **__: None)
    return time.perf_counter() - started


def trl(data: Path, model: Path, processes: int | None) -> float:
    """Seconds in which TRL's SFT trainer reads and prepares the file."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    disable_progress_bars()
    shape = AutoConfig.from_pretrained(model, num_hidden_layers=1, hidden_size=64, intermediate_size=64, head_dim=8)
    arguments = SFTConfig(
        output_dir=str(data.parent / "trl"), max_length=4096, dataset_num_proc=processes, use_cpu=True, bf16=False
    )
    tiny, tokenizer = AutoModelForCausalLM.from_config(shape), AutoTokenizer.from_pretrained(model)
    started = time.perf_counter()
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    pairs = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    SFTTrainer(model=tiny, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows prepared per second, oslo beside TRL.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    from prepare_model import cache_folder, prepare

    model = prepare(cache_folder())
    seconds: dict[str, list[float]] = {"oslo": [], "TRL, 1 process": [], "TRL, 2 processes": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        write_rows(data, arguments.rows)
        for turn in range(arguments.repeat):
            seconds["oslo"].append(oslo(data, model, Path(folder) / f"cache-{turn}"))
            seconds["TRL, 1 process"].append(trl(data, model, None))
            seconds["TRL, 2 processes"].append(trl(data, model, 2))
    print(f"{arguments.rows} rows, {os.cpu_count()} cores, median of {arguments.repeat} (range), rows per second")
    medians = {name: arguments.rows / statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        slowest, fastest = arguments.rows / max(taken), arguments.rows / min(taken)
        print(f"  {name:18} {medians[name]:8,.0f}  ({slowest:,.0f} to {fastest:,.0f})")
    best = max(rate for name, rate in medians.items() if name.startswith("TRL"))
    print(f"  oslo / best TRL    {medians['oslo'] / best:8.2f}")


if __name__ == "__main__":
    main()
