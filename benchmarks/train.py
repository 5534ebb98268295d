"""Training on one GPU: oslo and its peers, interleaved, on the same documents, against the bars of training/cases.py.

    python benchmarks/train.py --results FILE.json [--cases 0.5b,7b] [--minutes 9]

A leg is timed only after its gradient has been compared with that of single documents in float32 (but one that tells no
more than when its first step ends). It needs a CUDA GPU, and trl, liger-kernel and unsloth for the peers: what is not
installed is left out, and said. FILE is written after every leg; a second call with the same file goes on where the
first stopped. To have a leg that failed tried again, take it out of the file.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from training import assets as made  # noqa: E402 (needs the path)
from training import process, report  # noqa: E402
from training.cases import CASES, DEFAULT  # noqa: E402
from training.legs import OSLO, Leg, lacking  # noqa: E402
from training.results import Results, is_due, queue  # noqa: E402

VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "liger_kernel", "unsloth", "xformers")
END_SECONDS = 20
"""Left when the last leg has to be over: to end it, and to write."""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a leg is ended too
    asked = arguments()
    results = Results.read(asked.results)
    results.about = {"date": dt.date.today().isoformat(), "gpu": gpu(), "versions": versions()}
    bench = Bench(asked, results)
    legs = queue(asked.cases, asked.repeat)
    results.left_out = {leg.name: f"{lacking(leg)} is not installed" for _, leg in legs if lacking(leg)}
    for turn, leg in legs:
        if is_due(results, turn, leg, bench.seconds_left()) and bench.is_gated(leg, [leg for _, leg in legs]):
            bench.time(turn, leg)
    print(report.text(results, asked.cases))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed on one GPU, oslo beside its peers.")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file to go on with, or to begin")
    parser.add_argument("--cases", type=_cases, default=DEFAULT, help=f"with commas, of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of a leg")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=420, help="seconds after which a leg is ended")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no leg that would end later")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "oslo-benchmark")
    return parser.parse_args()


def _cases(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return names


class Bench:
    """Runs legs and keeps what comes of them."""

    def __init__(self, asked: argparse.Namespace, results: Results) -> None:
        self._asked, self._results = asked, results
        self._until = time.monotonic() + asked.minutes * 60 - END_SECONDS
        self._prepared: set[str] = set()

    def seconds_left(self) -> float:
        return self._until - time.monotonic()

    def is_gated(self, leg: Leg, legs: list[Leg]) -> bool:
        """Whether the leg may start: its group's model is there, and its gradient was right, as far as is known.

        A peer's is compared before its first leg.
        """
        if leg.group not in self._prepared:
            own = {other.kind: other for other in legs if other.program == OSLO and other.group == leg.group}
            ungated = [other for kind, other in own.items() if kind not in self._results.gates]
            if not self._prepare(leg, ungated):
                return False
            self._prepared.add(leg.group)
        return not self._results.barred(leg) and self.seconds_left() > 0

    def _prepare(self, leg: Leg, ungated: list[Leg]) -> bool:
        """The model of the leg's group, its reference gradient, and whether oslo's is the same."""
        assets = made.place(self._asked.folder, leg, self._asked.steps)
        made.write_documents(assets, leg, self._asked.steps)
        given = {"shape": leg.shape, "full": leg.full, "reference": str(self._reference(leg))}
        given |= {"assets": _text(assets), "legs": [asdict(other) for other in ungated]}
        try:
            found = self._run("training.gate", given, f"gate {leg.group}")
        except (process.LegError, process.UnfinishedError) as error:
            print(f"gate {leg.group}: {error}\nnone of its legs is timed", flush=True)
            return False
        self._results.gates |= found
        self._results.write()
        return True

    def time(self, turn: int, leg: Leg) -> None:
        assets = made.place(self._asked.folder, leg, self._asked.steps)
        made.write_documents(assets, leg, self._asked.steps)
        given: dict[str, Any] = {"assets": _text(assets), "leg": asdict(leg), "steps": self._asked.steps}
        label = f"{leg.name}, turn {turn}"
        if leg.program != OSLO and not self._is_peer_gated(leg, given, label):
            return
        began = time.time()
        if leg.program == OSLO:
            runs = made.home(self._asked.folder, leg.shape) / "runs"
            figures = self._tried(leg, "training.oslo", given | {"runs": str(runs)}, label)
        else:
            figures = self._tried(leg, "training.peer", given | {"started": began, "reference": None}, label)
        if figures is None:
            return
        about = {"steps": self._asked.steps, "leg_seconds": time.time() - began, "machine": platform.node()}
        self._results.of(leg)["turns"][str(turn)] = figures | about
        print(f"{label}: {json.dumps(figures | about)}", flush=True)
        self._results.write()

    def _is_peer_gated(self, leg: Leg, given: dict[str, Any], label: str) -> bool:
        """In a process of its own: what is compiled for the gate must not be what is timed.

        Of a start no speed is told.
        """
        if not leg.start and leg.kind not in self._results.gates:
            asked = given | {"reference": str(self._reference(leg))}
            verdict = self._tried(leg, "training.peer", asked, f"{label}, gate")
            if verdict is None:
                return False
            print(f"{label}, gate: {json.dumps(verdict)}", flush=True)
            self._results.gates[leg.kind] = verdict
            self._results.write()
        return not self._results.barred(leg)

    def _tried(self, leg: Leg, module: str, given: dict[str, Any], label: str) -> dict[str, Any] | None:
        """What it answers; None when it fails or is not finished, which is said and kept."""
        record, allowed = self._results.of(leg), self._allowed()
        try:
            return self._run(module, given, label)
        except process.LegError as error:
            record["failed"] = str(error)
            print(f"{label}: failed: {error}", flush=True)
        except process.UnfinishedError as error:
            print(f"{label}: {error}", flush=True)
            if allowed == self._asked.limit:  # else another call may give it the time
                record["unfinished"] = str(error)
        self._results.write()
        return None

    def _reference(self, leg: Leg) -> Path:
        return made.home(self._asked.folder, leg.shape) / f"reference-{'full' if leg.full else 'adapter'}.pt"

    def _run(self, module: str, given: dict[str, Any], label: str) -> dict[str, Any]:
        search = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        log = self._asked.folder / "logs" / f"{re.sub('[^0-9a-zA-Z.+-]+', '-', label)}.log"
        command = [sys.executable, "-m", module, json.dumps(given)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
        return process.run(command, environment, label, log, self._allowed())

    def _allowed(self) -> float:
        """Seconds, of what is started now."""
        return min(self._asked.limit, self.seconds_left())


def _text(assets: made.Assets) -> dict[str, str]:
    return {name: str(path) for name, path in vars(assets).items()}


def gpu() -> str:
    """As its driver names it; torch is left to the legs."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no GPU"


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
