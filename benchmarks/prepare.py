"""Rows per second from a JSON-lines file to a prepared dataset: oslo beside TRL, interleaved, on the same rows.

    python benchmarks/prepare.py [--data FILE] [--rows 7473] [--repeat 3] [--output FILE]

All tokenise the same conversations with the same tokenizer, each in a fresh process, imports left out. oslo is timed
as `python -m opensloth.data build`: the tokenizer is loaded, the file hashed, the documents written and synchronised.
Of TRL's SFT trainer only the reading of the file and the preparation itself are timed. By prompt and completion it
masks as oslo does, which is checked first; plain messages it does not mask at all. Ends with 1 where a median misses
its bar.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import workload

CHECKED_ROWS = 500
OSLO = "oslo"
PAIRS = "TRL prompt/completion"
MESSAGES = "TRL messages"
WANTED = {PAIRS: 3.0, MESSAGES: 2.0}
CONTESTANTS = [OSLO, *(f"{what}, {n} {'process' if n == 1 else 'processes'}" for what in WANTED for n in (1, 2))]


def trl_prepared(data: Path, model: Path, what: str, processes: int) -> tuple[workload.Stopwatch, Any]:
    """What it takes TRL to read the file and prepare it, and the dataset that comes of it."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    disable_progress_bars()
    shape = AutoConfig.from_pretrained(model, num_hidden_layers=1, hidden_size=64, intermediate_size=64, head_dim=8)
    arguments = SFTConfig(
        output_dir=str(data.parent / "trl"),
        max_length=4096,
        dataset_num_proc=processes if processes > 1 else None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    tiny, tokenizer = AutoModelForCausalLM.from_config(shape), AutoTokenizer.from_pretrained(model)
    watch = workload.Stopwatch()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with watch:
                return super()._prepare_dataset(*args, **kwargs)

    with watch:
        rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
        if what == PAIRS:
            dataset = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
        else:
            dataset = Dataset.from_list([{"messages": row} for row in rows])
    trainer = Timed(model=tiny, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    return watch, trainer.train_dataset


def check_masks(data: Path, model: Path, folder: Path) -> str:
    """Compare ids and labels, document by document; raises SystemExit where they differ.

    SmolLM2's template ends a turn with a stop token and a line end. TRL trains both, oslo the stop token alone.
    """
    from opensloth.data.prepared import PreparedDataset

    ours = PreparedDataset.open(workload.build(data, model, folder)["path"])
    _, theirs = trl_prepared(data, model, PAIRS, 1)
    if len(ours) != len(theirs):
        raise SystemExit(f"oslo made {len(ours)} documents, TRL {len(theirs)}")
    line_ends = 0
    for i, row in enumerate(theirs):
        ids, labels = (column.tolist() for column in ours.row(i))
        if row["labels"][-1] != labels[-1] == -100:
            row["labels"][-1] = -100
            line_ends += 1
        if (ids, labels) != (row["input_ids"], row["labels"]):
            raise SystemExit(f"row {i}: the documents differ")
    return f"{len(ours)} documents equal, ids and labels; of {line_ends} TRL trains the line end after the stop token"


def worker(name: str, data: Path, model: Path, folder: Path) -> None:
    """One measurement, in a process of its own: {seconds, cpu_seconds}."""
    if name == OSLO:
        print(json.dumps(workload.build(data, model, folder / "cache")))
        return
    what, _, processes = name.partition(", ")
    watch, _ = trl_prepared(data, model, what, int(processes.split()[0]))
    print(json.dumps(workload.taken(watch)))


def report(rows: int, source: str, checked: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: medians with their ranges, and the ratios of each round, which a busy machine changes least."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("opensloth", "trl", "transformers", "tokenizers"))
    date = f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}"
    lines = [
        f"{date}, {workload.processor()}, {os.cpu_count()} cores, {versions}.",
        f"{rows:,} rows of {source}, SmolLM2's tokenizer, {len(runs[OSLO])} rounds. Masks: {checked}.",
        "",
        "| | rows/s, median (range) | processor, ms a row | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for name, taken in runs.items():
        rates = [rows / one["seconds"] for one in taken]
        processor = statistics.median(one["cpu_seconds"] for one in taken) / rows * 1000
        peak = max(one["peak_bytes"] for one in taken) / 2**20
        lines.append(f"| {name} | {_with_range(rates, ',.0f')} | {processor:.2f} | {peak:,.0f} |")
    lines += ["", "| oslo against TRL's best, round by round | wanted | times the rows/s | rows a processor second |"]
    lines.append("|---|---|---|---|")
    for what, wanted in WANTED.items():
        ratios = [_ratios(runs, what, measure) for measure in ("seconds", "cpu_seconds")]
        lines.append(f"| {what} | {wanted} | {' | '.join(_with_range(one, '.2f') for one in ratios)} |")
    return "\n".join(lines) + "\n"


def _ratios(runs: dict[str, list[dict[str, Any]]], what: str, measure: str) -> list[float]:
    """How many times oslo's figure the least of TRL's is, for each round."""
    theirs = [taken for name, taken in runs.items() if name.startswith(what)]
    return [
        min(one[measure] for one in in_round) / ours[measure]
        for ours, *in_round in zip(runs[OSLO], *theirs, strict=True)
    ]


def _with_range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows prepared per second, oslo beside TRL.")
    parser.add_argument("--data", type=Path, default=workload.ROWS, help="JSON lines; default: the quickstart's rows")
    parser.add_argument("--rows", type=int, default=7473, help="repeated with a number where the file has fewer")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; in each one everybody has a turn")
    parser.add_argument("--output", type=Path, help="where the report is written as well")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, *paths = arguments.worker
        worker(name, *map(Path, paths))
        return
    model = workload.quickstart_model()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        sample, data = Path(folder) / "sample.jsonl", Path(folder) / "train.jsonl"
        workload.write_rows(arguments.data, sample, min(CHECKED_ROWS, arguments.rows))
        checked = check_masks(sample, model, Path(folder) / "sample")
        workload.write_rows(arguments.data, data, arguments.rows)
        for turn in range(arguments.repeat):
            for name in (*CONTESTANTS[turn:], *CONTESTANTS[:turn]):
                found = workload.measured("prepare.py", "--worker", name, data, model, Path(folder) / f"{turn}")
                runs[name].append(found)
                print(f"{name}: {arguments.rows / found['seconds']:,.0f} rows/s", flush=True)
    source = "the quickstart" if arguments.data == workload.ROWS else arguments.data.name
    text = report(arguments.rows, source, checked, runs)
    print("\n" + text)
    if arguments.output:
        arguments.output.write_text(text)
    medians = {what: statistics.median(_ratios(runs, what, "seconds")) for what in WANTED}
    missed = [f"{what}: {median:.2f}" for what, median in medians.items() if median < WANTED[what]]
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
