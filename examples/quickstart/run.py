"""Teach a small model a task that it cannot do, and show it before and after. `make demo` runs this.

    python examples/quickstart/run.py              # trains on this machine
    python examples/quickstart/run.py --cluster    # on the cluster of your kubeconfig; more --set go to `oslo submit`

Everything here is what you would do by hand: get a model, write a data set, `oslo submit`, use the adapter.
Exits with 1 when fewer than 90 % of the held-out answers are right afterwards.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_data import DATA, Case, is_exact, make_cases, write_cases
from prepare_model import DEFAULT_CACHE, cache_folder, prepare

CONFIG = Path(__file__).with_name("sft.yaml")
OSLO = Path(sys.executable).with_name("oslo")
ENOUGH = 0.9
SHOWN = 3


class Clock:
    """Heads each part of the output with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def heading(self, text: str) -> None:
        print(f"\n[{self.seconds():3.0f} s] {text}")


@dataclass(frozen=True)
class Answers:
    """The held-out cases and what the model said to each, before and after training."""

    cases: Sequence[Case]
    before: Sequence[str]
    after: Sequence[str]

    def good(self) -> bool:
        """Whether training did what this example is made to show."""
        return count_right(self.after, self.cases) >= ENOUGH * len(self.cases)


def main() -> int:
    options = parse_arguments()
    clock = Clock()
    print("A model of 135 million parameters learns to turn a sentence about an order into one line of JSON.")
    clock.heading("The model: SmolLM2-135M-Instruct")
    model_folder = prepare(cache_folder())

    clock.heading("The data set")
    train, heldout = make_cases()
    write_cases(train, DATA / "train.jsonl")
    write_cases(heldout, DATA / "heldout.jsonl")
    print(f"{len(train)} orders to learn from, {len(heldout)} of other customers held out, in {relative(DATA)}")

    clock.heading("The dtype")
    import torch  # takes seconds, which the lines above need not wait for
    from choose_dtype import choose_dtype
    from evaluate import respond

    dtype, why = choose_dtype(model_folder)
    print(f"Training in {str(dtype).removeprefix('torch.')}: {why}")

    clock.heading("Before: the held-out orders, answered by the model as it is")
    before = respond(model_folder, None, heldout, dtype)
    print(f"{score(before, heldout)} answers are right")

    clock.heading("Training")
    settings = [f"training.bf16={'true' if dtype == torch.bfloat16 else 'false'}", *options.sets]
    if cache_folder() != DEFAULT_CACHE.expanduser():  # which is what sft.yaml names
        settings.append(f"opensloth.fast_model_args.model_name={model_folder}")
    handle = submit(settings, options.cluster)
    adapter = pull(handle) if options.cluster else Path(status_of(handle)["final"])

    clock.heading("After: the same orders, answered with the adapter by plain transformers and peft")
    after = respond(model_folder, adapter, heldout, dtype)
    answers = Answers(heldout, before, after)
    print(f"{score(after, heldout)} answers are right")

    clock.heading("The result")
    report(answers, handle, adapter, training_speed(events_of(handle)), clock)
    return 0 if answers.good() else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a small model a task, and show it before and after.")
    parser.add_argument("--cluster", action="store_true", help="train on the cluster of your kubeconfig")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as `oslo submit` takes it")
    return parser.parse_args()


def count_right(answers: Sequence[str], cases: Sequence[Case]) -> int:
    """How many answers are exactly the order."""
    return sum(is_exact(answer, case.order) for answer, case in zip(answers, cases, strict=True))


def score(answers: Sequence[str], cases: Sequence[Case]) -> str:
    return f"{count_right(answers, cases)} of {len(cases)}"


def submit(settings: Sequence[str], cluster: bool) -> str:
    """Run `oslo submit` as a person would, its output shown; returns the run's handle, its last line.

    Raises SystemExit with the command's own exit code when the training fails.
    """
    arguments = ["submit", relative(CONFIG), *([] if cluster else ["--local"]), "--follow", "-y"]
    for setting in settings:
        arguments += ["--set", setting]
    print(f"$ {oslo_command()} {' '.join(arguments)}", flush=True)
    handle = ""
    # One pipe for both keeps the lines in the order in which they were said.
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen([OSLO, *arguments], stdout=pipe, stderr=both, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            handle = line.strip()
    if process.returncode:
        sys.exit(process.returncode)
    return handle


def pull(handle: str) -> Path:
    """Copy the result from the cluster; returns its folder, the last line of what `oslo pull` prints."""
    folder = DATA / handle.rpartition("/")[2]
    print(f"$ {oslo_command()} pull {handle} {relative(folder)}", flush=True)
    subprocess.run([OSLO, "pull", handle, folder], stdout=subprocess.DEVNULL, check=True)
    return folder


def status_of(handle: str) -> dict[str, Any]:
    """What `oslo status` knows of a run."""
    answer = subprocess.run([OSLO, "status", handle, "-o", "json"], stdout=subprocess.PIPE, check=True)
    status: dict[str, Any] = json.loads(answer.stdout)
    return status


def report(answers: Answers, handle: str, adapter: Path, speed: str, clock: Clock) -> None:
    """Print samples, scores, speed, where the adapter lies, and how to look further."""
    # Quantities in words first: they tell more than a copied figure.
    order = sorted(range(len(answers.cases)), key=lambda i: any(map(str.isdigit, answers.cases[i].sentence)))
    for i in order[:SHOWN]:
        print(f"sentence   {answers.cases[i].sentence}")
        print(f"expected   {answers.cases[i].order.to_json()}")
        print(f"before     {on_one_line(answers.before[i])}")
        print(f"after      {on_one_line(answers.after[i])}\n")
    before, after = score(answers.before, answers.cases), score(answers.after, answers.cases)
    print(f"exact      {before} before training, {after} after")
    print(f"training   {speed}")
    print(f"adapter    {adapter}")
    print(f"in all     {clock.seconds():.0f} s\n")
    if not answers.good():
        print(f"Fewer than {ENOUGH:.0%} are right after training: that is not what this example is made to show.\n")
    print("Look further:")
    print(f"  {oslo_command()} status {handle}")
    print(f"  {oslo_command()} logs {handle}")
    print(f"  {oslo_command()} data preview {relative(CONFIG)}")


def events_of(handle: str) -> list[dict[str, Any]]:
    """The events in a run's log."""
    log = subprocess.run([OSLO, "logs", handle, "-o", "json"], stdout=subprocess.PIPE, check=True)
    return [event for line in log.stdout.splitlines() if (event := json.loads(line)["event"])]


def training_speed(events: Sequence[dict[str, Any]]) -> str:
    """Steps, tokens and time of a run's last attempt."""
    result = next(event for event in reversed(events) if event["event"] == "result")
    steps = [event for event in events if event["event"] == "step" and event["attempt"] == result["attempt"]]
    tokens, seconds = sum(event["tokens"] for event in steps), result["seconds"]
    return f"{result['steps']} steps, {tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:,.0f} tokens/s"


def on_one_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 4]} ..."


def relative(path: Path) -> str:
    """The path as a person would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def oslo_command() -> str:
    """`oslo` where the shell finds the one that runs here, else its path."""
    return "oslo" if shutil.which("oslo") == str(OSLO) else relative(OSLO)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
