"""Process 1 of a run: one attempt from its start to a classified exit code.

`python -m opensloth.launch RUN_DIR` makes the next attempt's folder, builds the dataset (before any process
group exists, so that no collective can time out over it), runs the ranks under torchrun, and says in
ended.json what happened: torchrun itself answers 1 for everything.

A request to stop is a file, stop.json. SIGTERM and SIGINT write it; they are not passed on, because torchrun
kills its ranks 30 s after it gets one, while a checkpoint may take longer. The ranks see the file, agree on a
step, save and leave; who has not left when the grace period ends is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensloth import contract, run_config
from opensloth.contract import LAUNCHER_RANK, Cause
from opensloth.errors import ConfigError
from opensloth.events import Events
from opensloth.files import create_json, read_json, write_json
from opensloth.opensloth_config import OpenSlothConfig
from opensloth.orders import CAUSES
from opensloth.process import identify_self
from opensloth.run_config import RunConfig

POLL_SECONDS = 0.1
GRACE_SECONDS = 120.0
"""How long ranks may take to agree, save and leave once they were asked to."""
PROGRESS_SECONDS = 1.0
"""At most one progress event of data preparation in this time."""


@dataclass(frozen=True)
class Ending:
    cause: str
    message: str
    hint: str = ""


class Attempt:
    """The folder of one attempt, made by this process alone."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.number, self.folder = _next_folder(run / contract.ATTEMPTS_DIR)
        self.stop_file = self.folder / contract.STOP_FILE
        write_json(self.folder / contract.STARTED_FILE, identify_self())

    def ask_to_stop(self, cause: str) -> None:
        """The first to ask decides the cause."""
        create_json(self.stop_file, {"cause": cause, "time": time.time()})

    def stop_cause(self) -> str | None:
        """Why the attempt was asked to stop, if it was."""
        if not self.stop_file.exists():
            return None
        return str((read_json(self.stop_file) or {}).get("cause", Cause.TERMINATED))

    def end(self, ending: Ending, events: Events) -> int:
        """Write down how it ended; returns the exit code."""
        code = int(contract.EXIT_CODE_OF_CAUSE[ending.cause])
        record = {"cause": ending.cause, "exit_code": code, "message": ending.message, "hint": ending.hint}
        write_json(self.folder / contract.ENDED_FILE, record | {"time": time.time()})
        events.emit("end", **record)
        return code


def launch(run: Path) -> int:
    """Run one attempt of the run in folder `run`; returns the exit code (contract.ExitCode)."""
    attempt = Attempt(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: attempt.ask_to_stop(Cause.TERMINATED))
    events = Events(run / contract.EVENTS_FILE, rank=LAUNCHER_RANK, attempt=attempt.number)
    try:
        ending = _prepare_and_train(attempt, events)
    except Exception as error:  # the boundary: an attempt without an end would look killed
        ending = Ending(Cause.ERROR, f"the launcher failed: {type(error).__name__}: {error}")
    events.emit("phase", phase="done")
    return attempt.end(ending, events)


def _prepare_and_train(attempt: Attempt, events: Events) -> Ending:
    try:
        config = run_config.load((attempt.run / contract.CONFIG_FILE).read_text())
    except ConfigError as error:
        return Ending(error.cause, error.message)
    except OSError as error:
        return Ending(Cause.CONFIG, f"{attempt.run / contract.CONFIG_FILE} cannot be read: {error.strerror}")
    _kill_strays(attempt.run)  # ranks that outlived an earlier launcher
    missing = _missing_devices(config)
    if missing:
        return missing
    events.emit("phase", phase="data")
    return _build_data(attempt, events) or _run_ranks(attempt, config.opensloth)


# --- data -------------------------------------------------------------------------------------------


def _build_data(attempt: Attempt, events: Events) -> Ending | None:
    """Prepare the dataset in a child; None when it is there, else how the attempt ends."""
    command = [
        sys.executable,
        "-m",
        "opensloth.data",
        "build",
        "--config",
        str(attempt.run / contract.CONFIG_FILE),
    ]
    env = os.environ | {contract.RUN_DIR_ENV: str(attempt.run)}  # the cache notes who uses an entry
    with (attempt.folder / contract.LAUNCHER_LOG).open("ab") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, start_new_session=True)
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    answer = _Answer(events)
    stopped = False
    while child.poll() is None:
        answer.feed(child.stdout.read() or b"")
        if attempt.stop_cause() and not stopped:
            stopped = True
            os.killpg(child.pid, signal.SIGKILL)  # the cache is built aside: nothing half-done is left in place
        time.sleep(POLL_SECONDS)
    answer.feed(child.stdout.read() or b"")
    cause = attempt.stop_cause()
    if cause:
        return Ending(cause, f"{cause} while the dataset was prepared")
    if answer.result is not None and child.returncode == 0:
        write_json(attempt.folder / contract.DATA_FILE, answer.result)
        return None
    if answer.error is not None:
        return Ending(answer.error["cause"], answer.error["message"], answer.error.get("hint", ""))
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return Ending(Cause.KILLED, f"data preparation was killed ({name})", _memory_hint(name))
    log_path = attempt.folder / contract.LAUNCHER_LOG
    return Ending(Cause.ERROR, f"data preparation failed with exit code {child.returncode}", f"see {log_path}")


def _parsed(line: bytes) -> dict[str, Any]:
    """An event; whatever else was printed becomes a note."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict) and "event" in record:
        return record
    return {"event": "note", "level": "warning", "message": line.decode(errors="replace")}


class _Answer:
    """Reads the JSON lines of `python -m opensloth.data build`."""

    def __init__(self, events: Events) -> None:
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self._events, self._torn, self._progress_at = events, b"", 0.0

    def feed(self, data: bytes) -> None:
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            record = _parsed(line)
            kind = record.pop("event")
            if kind == "result":
                self.result = record
            elif kind == "error":
                self.error = record
            elif kind == "progress":
                self._progress(record)
            else:
                self._events.emit(kind, **record)

    def _progress(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._progress_at >= PROGRESS_SECONDS or record.get("done") == record.get("total"):
            self._progress_at = now
            self._events.emit("progress", **record)


# --- ranks ------------------------------------------------------------------------------------------


def _run_ranks(attempt: Attempt, config: OpenSlothConfig) -> Ending:
    ranks = len(config.devices)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)),
        *("-m", "opensloth.train"),
    ]
    log_path = attempt.folder / contract.TORCHRUN_LOG
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment(attempt, config), start_new_session=True
        )
    _wait(child, attempt)
    return _classify(child.returncode, ranks, attempt, log_path.read_text(errors="replace"))


def _environment(attempt: Attempt, config: OpenSlothConfig) -> dict[str, str]:
    env = dict(os.environ)
    env[contract.RUN_DIR_ENV] = str(attempt.run)
    env[contract.ATTEMPT_ENV] = str(attempt.number)
    env[contract.LAUNCHER_ENV] = str(os.getpid())
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // len(config.devices))))
    env.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    visible = _visible_devices()
    if visible:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[device] for device in config.devices)
    return env


def _missing_devices(config: RunConfig) -> Ending | None:
    """How the attempt ends when `devices` names a GPU that is not there; machines without any train on the CPU."""
    visible, wanted = _visible_devices(), config.opensloth.devices
    if not visible or config.training.use_cpu or max(wanted) < len(visible):
        return None
    have = ", ".join(map(str, range(len(visible))))
    return Ending(Cause.CONFIG, f"opensloth.devices: asks for {wanted}; this machine has {have}")


def _visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists, or else the numbers of all NVIDIA GPUs; a variable set to nothing hides all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(child: subprocess.Popen[bytes], attempt: Attempt) -> None:
    """Until torchrun has left; after a request to stop at most for the grace period."""
    grace = float(os.environ.get(contract.GRACE_ENV, GRACE_SECONDS))
    asked_at: float | None = None
    while child.poll() is None:
        if asked_at is None and attempt.stop_cause():
            asked_at = time.monotonic()
        if asked_at is not None and time.monotonic() - asked_at > grace:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(POLL_SECONDS)
    _kill_strays(attempt.run)  # torchrun ends its ranks, unless it was killed itself


def _kill_strays(run: Path) -> None:
    """Kill every rank of this run: torchrun starts each in a session of its own, but all know the run's folder."""
    mine = f"{contract.RUN_DIR_ENV}={run}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = b"opensloth.train" in (process / "cmdline").read_bytes()
            if is_rank and mine in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue  # it left, or is another user's


def _classify(code: int, ranks: int, attempt: Attempt, torchrun_says: str) -> Ending:
    """The first cause, from what the ranks wrote: victims of another rank's end come last."""
    if code == 0:
        return Ending(Cause.SUCCEEDED, "")
    outcomes = {rank: read_json(attempt.folder / contract.RANK_OUTCOME.format(rank=rank)) for rank in range(ranks)}
    written = sorted((o for o in outcomes.values() if o), key=lambda outcome: outcome["time"])
    own_fault = [o for o in written if o["cause"] not in (*CAUSES, Cause.PEER_LOST, Cause.SUCCEEDED)]
    if own_fault:
        return Ending(own_fault[0]["cause"], own_fault[0]["message"], own_fault[0]["hint"])
    stopped = [o for o in written if o["cause"] in CAUSES]
    if stopped:
        return Ending(stopped[0]["cause"], stopped[0]["message"], stopped[0]["hint"])
    cause = attempt.stop_cause()
    if cause:
        return Ending(cause, f"{cause}; the ranks had to be killed, the last checkpoint stands")
    victim, number = _first_killed(torchrun_says) or ("torchrun", -code)
    if number <= 0:
        log = attempt.folder / contract.TORCHRUN_LOG
        return Ending(Cause.ERROR, f"the ranks could not be run (exit code {code})", f"see {log} and the ranks' logs")
    name = signal.Signals(number).name
    return Ending(Cause.KILLED, f"{victim} was killed ({name})", _memory_hint(name))


def _first_killed(torchrun_says: str) -> tuple[str, int] | None:
    """The rank that torchrun calls the root cause, and the signal that ended it."""
    root_cause = torchrun_says.partition("Root Cause")[2]
    found = re.search(r"rank\s*: (\d+).*?exitcode\s*: -(\d+)", root_cause, re.DOTALL)
    return (f"rank {found[1]}", int(found[2])) if found else None


def _memory_hint(signal_name: str) -> str:
    if signal_name == "SIGKILL":
        return "if nobody killed it, the machine ran out of memory: see `dmesg`, and try a smaller batch or model"
    return ""


# --- the attempt's folder ---------------------------------------------------------------------------------


def _next_folder(attempts: Path) -> tuple[int, Path]:
    """Make attempts/<n> for the first n that nobody has."""
    attempts.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in attempts.iterdir() if path.name.isdigit()), default=0)
    while True:
        folder = attempts / str(number)
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return number, folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m opensloth.launch", description="Run one attempt of a run.")
    parser.add_argument("run_dir", type=Path, help="the run folder, with its config.yaml")
    return launch(parser.parse_args().run_dir.resolve())


if __name__ == "__main__":
    sys.exit(main())
