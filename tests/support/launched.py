"""A run folder with a tiny model's config, and launchers as real processes on it: one, or one for each node."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opensloth import run_config
from runner.event_log import parse_events

STEPS = 240
WAIT_SECONDS = 120
PYTHON = (sys.executable, "-m", "opensloth.launch")


def with_faults(**faults: Any) -> dict[str, str]:
    """The environment that puts faults into a run's processes: faults/sitecustomize.py."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent / "faults"), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "OSLO_TEST_FAULTS": json.dumps(faults)}


class Run:
    """A run folder, and the launcher's process on it."""

    log_level = "info"

    def __init__(self, folder: Path, model: Path, *, devices: int = 1, rows: int = 120, **training: Any) -> None:
        self.folder = folder / "runs" / "tiny-00000000"
        self.folder.mkdir(parents=True)
        self.data = folder / "train.jsonl"
        self.data.write_text("".join(row(i) for i in range(rows)))
        defaults = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "save_steps": 5}
        config, problems = run_config.check(
            {
                "name": "tiny",
                "opensloth": {
                    "data_cache_path": str(folder / "cache"),
                    "devices": list(range(devices)),
                    "log_level": self.log_level,
                    "fast_model_args": {"model_name": str(model), "max_seq_length": 128},
                },
                "dataset": {"path": str(self.data)},
                "training": defaults | training,
            }
        )
        assert config is not None, problems
        self.config_text = run_config.dump(config)
        (self.folder / "config.yaml").write_text(self.config_text)
        self.process: subprocess.Popen[bytes] | None = None
        self.env: dict[str, str] = {}
        """Of the launcher, besides this process's own."""

    def start(self) -> None:
        with (self.folder / "launcher.out").open("ab") as out:
            self.process = subprocess.Popen(
                [*PYTHON, str(self.folder)], stdout=out, stderr=out, env=os.environ | self.env, start_new_session=True
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=180)

    def finish(self) -> int:
        self.start()
        return self.wait()

    def attempt(self, name: str, number: int | None = None) -> dict[str, Any]:
        """A JSON file of the last attempt, or of attempt `number`."""
        last = number or max(int(path.name) for path in (self.folder / "attempts").iterdir())
        found: dict[str, Any] = json.loads((self.folder / "attempts" / str(last) / name).read_text())
        return found

    def events(self) -> list[dict[str, Any]]:
        """As readers see them: torn lines are passed over."""
        file = self.folder / "events.jsonl"
        return list(parse_events(file.read_bytes())) if file.exists() else []

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def until(self, seen: Callable[[list[dict[str, Any]]], bool]) -> None:
        self.until_true(lambda: seen(self.events()))

    def until_true(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not seen():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        self.until(lambda events: any(e["event"] == "step" and e["step"] >= step for e in events))

    def ranks(self, node: int | None = None) -> list[int]:
        """Process numbers of this run's ranks, or of those of one node."""
        return self._processes(node, b"torch.distributed.run", wanted=False)

    def torchruns(self, node: int) -> list[int]:
        return self._processes(node, b"torch.distributed.run", wanted=True)

    def _processes(self, node: int | None, word: bytes, *, wanted: bool) -> list[int]:
        mine = {f"OSLO_RUN_DIR={self.folder}".encode()} | (
            {f"PET_NODE_RANK={node}".encode()} if node is not None else set()
        )
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                if b"opensloth.train" not in command or (word in command) != wanted:
                    continue
                if mine <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
            except OSError:
                continue
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.folder / "final" / "adapter_model.safetensors")
        return found


class Pods(Run):
    """The same, started as the operator starts pods: one launcher a node, all on this machine."""

    log_level = "debug"  # ranks say which rows they train

    def __init__(self, folder: Path, model: Path, *, nodes: int = 2, env: dict[str, str] | None = None, **rest: Any):
        super().__init__(folder, model, **rest)
        (self.folder / "config.yaml").unlink()  # the launcher brings it
        self.config = folder / "config-of-the-pod.yaml"
        self.config.write_text(self.config_text)
        self.nodes, self.env = nodes, env or {}
        self.wrapper: tuple[str, ...] = ()
        """What stands before the launcher's command."""
        self.launchers: dict[int, subprocess.Popen[bytes]] = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def environment(self, node: int) -> dict[str, str]:
        return os.environ | {
            "OSLO_CONFIG": str(self.config),
            "OSLO_TERMINATION_LOG": str(self.termination_log(node)),
            "OSLO_MAX_RESTARTS": "3",
            "OSLO_START_TIMEOUT_SECONDS": "600",
            "OSLO_GRACE_SECONDS": "60",
            "PET_NNODES": str(self.nodes),
            "PET_NODE_RANK": str(node),
            "PET_NPROC_PER_NODE": "1",
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(self.port),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "RANK": str(node),
            "WORLD_SIZE": str(self.nodes),
            "GLOO_SOCKET_IFNAME": "lo",
            **self.env,
        }

    def termination_log(self, node: int) -> Path:
        return self.folder.parent.parent / f"termination-{node}"

    def start_node(self, node: int) -> None:
        with self.out(node).open("ab") as out:
            self.launchers[node] = subprocess.Popen(
                [*self.wrapper, *PYTHON, str(self.folder)],
                stdout=out,
                stderr=out,
                env=self.environment(node),
                start_new_session=True,
            )

    def out(self, node: int) -> Path:
        return self.folder / f"pod-{node}.out"

    def start(self) -> None:
        for node in range(self.nodes):
            self.start_node(node)

    def codes(self) -> list[int]:
        """Exit codes by node, when all have left."""
        try:
            return [self.launchers[node].wait(timeout=120) for node in range(self.nodes)]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def finish_all(self) -> list[int]:
        self.start()
        return self.codes()

    def kill_pod(self, node: int) -> None:
        """All of a pod's processes at once, as a lost machine would."""
        self.launchers[node].kill()
        for process in (*self.torchruns(node), *self.ranks(node)):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launchers[node].wait()

    def stop_all(self) -> None:
        """Leave nothing behind when a test fails."""
        for node in self.launchers:
            self.kill_pod(node)

    def resumed(self) -> list[int]:
        return [event["step"] for event in self.events() if event["event"] == "resumed"]


def row(i: int) -> str:
    user = {"role": "user", "content": f"What is {i} plus {i + 1}?"}
    return json.dumps({"messages": [user, {"role": "assistant", "content": f"It is {2 * i + 1}."}]}) + "\n"


MakePods = Callable[..., Pods]
"""What the fixture `pods` gives a test: options of Pods to Pods."""
