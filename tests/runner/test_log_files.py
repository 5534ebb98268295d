"""The logs of a run of several nodes, read from the volume: every launcher has its rank."""

from __future__ import annotations

import json
from pathlib import Path

from opensloth import contract
from opensloth.events import Events
from opensloth.pod_log import launcher_rank
from runner import log_files
from runner.backend import LogQuery
from runner.run_folder import RunFolder


def test_each_nodes_launcher_is_shown_under_its_rank(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-0"
    for attempt in (1, 2):
        attempts = folder / contract.ATTEMPTS_DIR / str(attempt)
        attempts.mkdir(parents=True)
        for node, path in ((0, folder / contract.EVENTS_FILE), (1, attempts / contract.NODE_EVENTS.format(node=1))):
            events = Events(path, rank=launcher_rank(node), attempt=attempt, say=lambda _: None)
            events.note(f"node {node} in attempt {attempt}")
            events.close()
    (attempts / contract.LAUNCHER_LOG).write_text("words of 0\n")
    (attempts / contract.NODE_LAUNCHER_LOG.format(node=1)).write_text("words of 1\n")
    (attempts / contract.NODE_TORCHRUN_LOG.format(node=1)).write_text("says less\n")
    (attempts / contract.NODE_FILE.format(node=1)).write_text(json.dumps({"cause": "killed"}))
    run = RunFolder(folder, "local://tiny-0")
    lines = [(line.rank, line.text) for line in log_files.read(run, LogQuery())]
    assert sorted(lines) == [
        (-2, "node 1 in attempt 2"),
        (-2, "words of 1"),
        (-1, "node 0 in attempt 2"),
        (-1, "words of 0"),
    ]
    assert [line.rank for line in log_files.read(run, LogQuery(rank=-2))] == [-2, -2]
