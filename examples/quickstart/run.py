"""Teach a small model a task that it cannot do, and show it before and after. `make demo` runs this.

    python examples/quickstart/run.py

Everything here is what you would do by hand: get a model, write a data set, `oslo submit`, use the adapter.
Exits with 1 when fewer than 90 % of the held-out answers are right afterwards.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_data import DATA, Case, make_cases, write_cases
from prepare_model import DEFAULT_CACHE, cache_folder, prepare

CONFIG = Path(__file__).with_name("sft.yaml")
OSLO = Path(sys.executable).with_name("oslo")
ENOUGH = 0.9
SAMPLES = 3


class Clock:
    """Heads each part of the output with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def heading(self, text: str) -> None:
        print(f"\n[{self.seconds():3.0f} s] {text}")


def main() -> int:
    clock = Clock()
    print("A model of 135 million parameters learns to turn a sentence about an order into one line of JSON.")

    clock.heading("The model: SmolLM2-135M-Instruct")
    model_folder = prepare(cache_folder())

    clock.heading("The data")
    train, heldout = make_cases()
    write_cases(train, DATA / "train.jsonl")
    write_cases(heldout, DATA / "heldout.jsonl")
    print(f"{len(train)} orders to learn from, {len(heldout)} of other customers held out, in {DATA}")

    import torch  # here, because it takes seconds and the lines above need not wait for it
    from choose_dtype import choose_dtype
    from evaluate import exact_matches, respond

    clock.heading("The dtype")
    dtype, why = choose_dtype(model_folder)
    in_bfloat16 = dtype == torch.bfloat16
    print(f"Training in {'bfloat16' if in_bfloat16 else 'float32'}: {why}")

    clock.heading("Before: the held-out orders, answered by the model as it is")
    before = respond(model_folder, None, heldout, dtype)
    before_count = exact_matches(before, heldout)
    print(f"{before_count} of {len(heldout)} answers are right")

    clock.heading("Training")
    settings = [f"training.bf16={str(in_bfloat16).lower()}"]
    if cache_folder() != DEFAULT_CACHE.expanduser():  # sft.yaml names the default
        settings.append(f"opensloth.fast_model_args.model_name={model_folder}")
    handle = submit(settings)
    status = oslo_json("status", handle)
    adapter = Path(status["final"])

    clock.heading("After: the same orders, answered with the adapter by plain transformers and peft")
    after = respond(model_folder, adapter, heldout, dtype)
    after_count = exact_matches(after, heldout)
    print(f"{after_count} of {len(heldout)} answers are right")

    clock.heading("The result")
    for case, one_before, one_after in list(zip(heldout, before, after, strict=True))[:SAMPLES]:
        print_sample(case, one_before, one_after)
    print(f"exact match   {before_count / len(heldout):.0%} before, {after_count / len(heldout):.0%} after")
    print(f"training      {training_speed(Path(status['folder']))}")
    print(f"adapter       {adapter}")
    print(f"total time    {clock.seconds():.0f} s")
    print("\nLook further:")
    print(f"  oslo status {handle}")
    print(f"  oslo logs {handle}")
    print(f"  oslo data preview {relative(CONFIG)}")
    if after_count < ENOUGH * len(heldout):
        print(f"\nFewer than {ENOUGH:.0%} of the answers are right after training: something is wrong.")
        return 1
    return 0


def submit(settings: Sequence[str]) -> str:
    """Run `oslo submit` as a person would, its output shown; returns the run's handle, its last line.

    Raises SystemExit with the command's own exit code when the training fails.
    """
    command = ["oslo", "submit", relative(CONFIG), "--local", "--follow", "-y"]
    for setting in settings:
        command += ["--set", setting]
    print("$ " + " ".join(command), flush=True)
    handle = ""
    with subprocess.Popen([OSLO, *command[1:]], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            handle = line.strip()
    if process.returncode:
        sys.exit(process.returncode)
    return handle


def oslo_json(*arguments: str) -> Any:
    """The answer of an oslo command with `-o json`."""
    answer = subprocess.run([OSLO, *arguments, "-o", "json"], stdout=subprocess.PIPE, check=True)
    return json.loads(answer.stdout)


def training_speed(run: Path) -> str:
    """Steps, tokens and time of a run, from its events."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    result = next(event for event in reversed(events) if event["event"] == "result")
    steps = [event for event in events if event["event"] == "step" and event["attempt"] == result["attempt"]]
    tokens = sum(event["tokens"] for event in steps)
    seconds = result["seconds"]
    return f"{result['steps']} steps, {tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:,.0f} tokens/s"


def print_sample(case: Case, before: str, after: str) -> None:
    """One held-out order with both answers, each on one line."""
    print(f"sentence  {case.sentence}")
    print(f"expected  {case.order.to_json()}")
    print(f"before    {one_line(before)}")
    print(f"after     {one_line(after)}\n")


def one_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 4] + " ..."


def relative(path: Path) -> str:
    """The path as a person would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
