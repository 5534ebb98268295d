"""A launcher without torch: follows opensloth.contract, does in steps of `step_seconds` what it is told to.

usage: stand_in_launcher.py OPTIONS_JSON RUN_DIR
options: steps, step_seconds, start_seconds, prepare_seconds; fail_at {step: message}; refuse: exit before starting;
ranks; crash_at: step; ignore_stop: never look at stop.json; child: start a process in a session of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from opensloth import contract
from opensloth.contract import EXIT_CODE_OF_CAUSE, Cause
from opensloth.events import Events
from opensloth.files import create_json, read_json, write_json


def main() -> int:
    options, run = json.loads(sys.argv[1]), Path(sys.argv[2])
    if options.get("refuse"):
        sys.stderr.write("no room on the device\n")
        return 1
    time.sleep(options.get("start_seconds", 0))
    folder, number = next_attempt(run)
    signal.signal(signal.SIGTERM, lambda *_: create_json(folder / contract.STOP_FILE, {"cause": Cause.TERMINATED}))
    stat = Path("/proc/self/stat").read_text()
    identity = {"pid": os.getpid(), "pid_started": int(stat.rpartition(")")[2].split()[19])}
    identity["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    write_json(folder / contract.STARTED_FILE, identity | {"host": socket.gethostname(), "time": time.time()})
    if options.get("child"):
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        (run / "child.pid").write_text(str(child.pid))
    launcher = Events(run / contract.EVENTS_FILE, rank=-1, attempt=number)
    launcher.emit("phase", phase="data")
    wait(options.get("prepare_seconds", 0), folder, options)
    cause, message = train(options, run, folder, number)
    if cause == Cause.SUCCEEDED:
        final = run / contract.FINAL_DIR
        final.mkdir(exist_ok=True)
        (final / "adapter_config.json").write_text("{}")
    sys.stdout = sys.__stdout__
    time.sleep(0.005)  # events are sorted by milliseconds; torchrun takes longer to leave
    code = int(EXIT_CODE_OF_CAUSE[cause])
    record = {"cause": cause, "exit_code": code, "message": message, "hint": ""}
    write_json(folder / contract.ENDED_FILE, record | {"time": time.time()})
    launcher.emit("end", **record)
    return code


def train(options: dict, run: Path, folder: Path, number: int) -> tuple[str, str]:
    steps, first = options.get("steps", 3), read_json(run / "checkpoint.json") or 0
    log = (folder / contract.RANK_LOG.format(rank=0)).open("a", buffering=1)
    others = [
        (folder / contract.RANK_LOG.format(rank=r)).open("a", buffering=1) for r in range(1, options.get("ranks", 1))
    ]
    sys.stdout = log  # events echo there
    events = Events(run / contract.EVENTS_FILE, rank=0, attempt=number)
    events.emit("phase", phase="train")
    for step in range(first + 1, steps + 1):
        stop = wait(options.get("step_seconds", 0), folder, options)
        if stop:
            write_json(run / "checkpoint.json", step - 1)
            return stop, f"{stop} at step {step - 1}"
        if step == options.get("crash_at"):
            1 / 0  # noqa: B018 a mistake in the launcher itself
        events.emit(
            "step",
            step=step,
            total_steps=steps,
            epoch=step / steps,
            loss=4 / step,
            target_tokens_per_second=1234.5,
            eta=(steps - step) * 0.5,
            memory=3 * 1024**2,
        )
        log.write(f"a raw line of step {step}\n")
        for rank, other in enumerate(others, 1):
            other.write(f"rank {rank} at step {step}\n")
        if str(step) in options.get("fail_at", {}) and number == 1:
            write_json(run / "checkpoint.json", step)
            return Cause.DATA, options["fail_at"][str(step)]
    return Cause.SUCCEEDED, ""


def wait(seconds: float, folder: Path, options: dict) -> str | None:
    """Sleep, and say why to stop if somebody asks for it."""
    end = time.monotonic() + seconds
    while True:
        stop = None if options.get("ignore_stop") else read_json(folder / contract.STOP_FILE)
        if stop or time.monotonic() >= end:
            return stop["cause"] if stop else None
        time.sleep(0.01)


def next_attempt(run: Path) -> tuple[Path, int]:
    number = 1
    (run / contract.ATTEMPTS_DIR).mkdir(exist_ok=True)
    while True:
        folder = run / contract.ATTEMPTS_DIR / str(number)
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder, number


if __name__ == "__main__":
    sys.exit(main())
