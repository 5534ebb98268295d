"""What the benchmarks of preparation share: the rows, one build, and a process measured with all that it starts."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
ROWS = QUICKSTART / "data" / "train.jsonl"
SAMPLING_SECONDS = 0.05


class Stopwatch:
    """Adds up the seconds that pass under it, by the clock and of processors, also those of ended child processes."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, *_: object) -> None:
        clock, cpu = self._started
        self.seconds += time.perf_counter() - clock
        self.cpu_seconds += sum(os.times()[:4]) - cpu


def quickstart_model() -> Path:
    """The folder of the quickstart's model, SmolLM2-135M-Instruct, which is fetched when it is not there yet."""
    sys.path.insert(0, str(QUICKSTART))
    from prepare_model import cache_folder, prepare

    return Path(prepare(cache_folder()))


def write_rows(source: Path, path: Path, count: int) -> None:
    """`count` conversations as `messages`: those of `source` over and over, each round with a number of its own.

    source: JSON lines with `messages`, `question` and `answer`, or `prompt` and `completion` as text.
    """
    conversations = [_messages(json.loads(line)) for line in source.read_text().splitlines()]
    with path.open("w") as stream:
        for i, turns in enumerate(itertools.islice(itertools.cycle(conversations), count)):
            repeat = i // len(conversations)
            *before, user, answer = turns
            if repeat:
                user = {**user, "content": f"{user['content']} ({repeat})"}
            stream.write(json.dumps({"messages": [*before, user, answer]}) + "\n")


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"])
    asked, said = ("question", "answer") if "question" in row else ("prompt", "completion")
    return [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": row[said]}]


def build(data: Path, model: Path, cache: Path, eval_fraction: float = 0.0) -> dict[str, Any]:
    """What `python -m opensloth.data build` does, imports left out: {path, seconds, cpu_seconds}."""
    from opensloth import run_config
    from opensloth.data.build import build
    from opensloth.tokenizer import load_tokenizer

    load_tokenizer(str(model))  # which imports what it needs; it is loaded again below
    config, problems = run_config.check(
        {
            "name": "bench",
            "opensloth": {"data_cache_path": str(cache), "fast_model_args": {"model_name": str(model)}},
            "dataset": {"path": str(data), "eval_fraction": eval_fraction},
        }
    )
    assert config is not None, problems
    with Stopwatch() as watch:
        built = build(config, lambda *_, **__: None)
    return {"path": built.path, **taken(watch)}


def taken(watch: Stopwatch) -> dict[str, float]:
    return {"seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds}


def measured(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this folder, whose last line of output is a JSON object, and add to that what memory it took.

    peak_bytes: the largest sum of the resident memory of the process and all that it started.
    peak_own_bytes: the same without pages of files, of which the system keeps more or fewer as it likes.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak = own_peak = 0
    while process.poll() is None:
        memory = [_memory_of(pid) for pid in _tree(process.pid)]
        peak = max(peak, sum(resident for resident, _ in memory))
        own_peak = max(own_peak, sum(own for _, own in memory))
        time.sleep(SAMPLING_SECONDS)
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return {**json.loads(output.splitlines()[-1]), "peak_bytes": peak, "peak_own_bytes": own_peak}


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for listed in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, listed.read_text().split())
            except OSError:
                continue  # it has just ended
    return found


def _memory_of(pid: int) -> tuple[int, int]:
    """Resident bytes, and those of them that are no file's; zeros when the process has just ended."""
    try:
        resident, of_files = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    except (OSError, ValueError):
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - of_files) * page


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
